"""`sparsejax pack-data`: texts to rows of tokens for training."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "pack-data",
        help="tokenize texts and pack them for train-compressor",
        description="Tokenizes documents, puts them end to end with the tokenizer's begin and end tokens around each, "
        "and cuts the stream into rows of one length. Where documents begin is kept, so that training can keep "
        "attention within them (--document-masks). OUT appears only when it is complete.",
        epilog="example: sparsejax pack-data corpus.jsonl packed --model Qwen/Qwen2.5-7B-Instruct --length 8192",
    )
    parser.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="FILE",
        help='.jsonl (an object a line with a text, or chat "messages" for the chat template) or text files',
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    parser.add_argument(
        "--model", metavar="NAME", help="whose tokenizer: folder or id (default: the embedded tiny model)"
    )
    parser.add_argument("--length", type=int, default=8192, metavar="N", help="tokens of a row (default: %(default)s)")
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="of the text in .jsonl (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="most rows")
    parser.add_argument(
        "--no-wrap", action="store_true", help="add no begin and end tokens: the texts spell them out already"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sparsejax.assets import tiny_model_path
    from sparsejax.checkpoint import load_tokenizer
    from train.compressor.packing import pack

    packed = pack(
        args.sources,
        args.out,
        load_tokenizer(args.model or tiny_model_path()),
        length=args.length,
        text_key=args.text_key,
        wrap=not args.no_wrap,
        limit=args.limit,
        progress=not args.no_progress,
    )
    rows, length = packed.tokens.shape
    print(f"wrote {args.out}: {rows} rows of {length} tokens, {len(packed.starts)} documents")
    return 0
