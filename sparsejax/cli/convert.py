"""`sparsejax convert`: Hugging Face checkpoints to Orbax and back."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="convert a checkpoint from Hugging Face to Orbax, or back",
        description="Reads safetensors tensor group by tensor group, fuses the projections and writes an Orbax "
        "checkpoint with the config and tokenizer beside it. OUT appears only when it is complete. "
        "With --to-hf it goes the other way, bit for bit if q, k and v of a layer have one type.",
        epilog="example: sparsejax convert meta-llama/Llama-3.1-8B-Instruct llama-8b",
    )
    parser.add_argument("source", metavar="SOURCE", help="Hugging Face folder or id (with --to-hf: an Orbax folder)")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument("--to-hf", action="store_true", help="write a Hugging Face folder from an Orbax one")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sparsejax.checkpoint import convert_from_hf, convert_to_hf

    convert = convert_to_hf if args.to_hf else convert_from_hf
    convert(args.source, args.out, progress=not args.no_progress)
    print(f"wrote {args.out}")
    return 0
