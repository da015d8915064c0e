"""The `sparsejax` command: one module a subcommand, each with `add_parser(subparsers)` and `run(args) -> exit code`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsejax.cli import (
    bench,
    calibrate,
    chat,
    convert,
    demo,
    doctor,
    evaluate,
    generate,
    methods,
    pack_data,
    train_compressor,
)
from sparsejax.errors import InvalidArgumentError, SparsejaxError

COMMANDS = (
    generate,
    chat,
    convert,
    pack_data,
    train_compressor,
    methods,
    calibrate,
    evaluate,
    bench,
    demo,
    doctor,
)

EPILOG = """examples:
  sparsejax demo                                      answer long prompts with the embedded model
  sparsejax generate "Once upon a time" --max-tokens 64
  sparsejax chat --model Qwen/Qwen2.5-7B-Instruct
  sparsejax convert meta-llama/Llama-3.1-8B-Instruct llama-8b
  sparsejax train-compressor --data packed --out run  train a DeltaKV compressor
  sparsejax methods                                   what can be done to the KV cache
  sparsejax calibrate --model NAME                    choose the layers that read everything, for method omnikv
  sparsejax eval ruler --methods snapkv,random --budgets 0.25
  sparsejax --import mine.py eval ruler --methods mine --budgets 0.25
  sparsejax doctor                                    what runs here, and what to do where it does not
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from sparsejax import __version__

    parser = argparse.ArgumentParser(
        prog="sparsejax",
        description="Long-context LLM inference in JAX, with a KV cache that is sparse from the start.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sparsejax {__version__}")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        type=Path,
        default=[],
        metavar="FILE.py",
        help="Python file that registers methods or budget rules of your own; given before COMMAND (repeatable)",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; a foreseen error is one paragraph on stderr and exit code 1, not a traceback."""
    args = build_parser().parse_args(argv)
    try:
        for path in args.imports:
            _run_file(path)
        return args.run(args)
    except BrokenPipeError:  # whoever read the output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 141
    except (SparsejaxError, OSError) as error:  # OSError: a file of the command line that cannot be read or written
        print(f"sparsejax {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run_file(path: Path) -> None:
    """Imports a Python file, for what it registers.

    Raises:
      InvalidArgumentError: there is no such file. What its code raises is left as it is, with its traceback.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None or not path.is_file():
        raise InvalidArgumentError(f"--import must be a Python file, got {path}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # where dataclasses look for their names
    spec.loader.exec_module(module)
