"""Texts like those the embedded model was trained on, as JSONL: what its compressor is trained on.

    python -m train.tiny_corpus corpus.jsonl --documents 3000 --length 1024
    sparsejax pack-data corpus.jsonl packed --length 1024 --no-wrap

The texts spell out their special tokens (--no-wrap adds no others). No evaluation draws from their seeds.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from train.data import conversation


def documents(count: int, length: int, seed: int) -> list[str]:
    """Conversations of 0.4 to 1 times `length` tokens; the same arguments always give the same texts."""
    texts = []
    for index in range(count):
        rng = random.Random(f"train/compressor/{seed}/{index}")
        segments = conversation(rng, int(length * rng.uniform(0.4, 1.0)))
        texts.append("".join(text for text, _ in segments))
    return texts


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(
        prog="python -m train.tiny_corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="file to write")
    parser.add_argument("--documents", type=int, default=3000, metavar="N", help="how many (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="most tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the texts (default: %(default)s)")
    args = parser.parse_args(argv)
    lines = (json.dumps({"text": text}) for text in documents(args.documents, args.length, args.seed))
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
