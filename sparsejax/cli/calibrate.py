"""`sparsejax calibrate`: choose the layers that read everything, for methods whose other layers follow them."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsejax.cli.evaluate import numbers
from sparsejax.cli.options import refuse_given
from sparsejax.cli.outputs import check_outputs
from sparsejax.config import DTYPES
from sparsejax.errors import InvalidArgumentError
from sparsejax.validation import whole

DESCRIPTION = """Measures how much of each layer's attention goes to the tokens that another layer would choose, and
finds the full-attention layers that leave the most to those that follow them (method omnikv, and deltakv). The queries
are the last tokens of sample texts: retrieval tasks, or --data, a text, a .jsonl with one {"text": ...} (or "context",
"question" and "answer") a line, or a folder of such files."""

EXAMPLES = """examples:
  sparsejax calibrate
  sparsejax calibrate --model Qwen/Qwen2.5-7B-Instruct --data book.txt --count 6 --json layers.json --plot layers.png
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "calibrate",
        help="choose the full-attention layers of a model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME", help="folder or Hugging Face id (default: the embedded tiny model)")
    parser.add_argument(
        "--dtype", choices=DTYPES[1:], help="compute dtype (default: the checkpoint's; float32 on a CPU)"
    )
    parser.add_argument("--data", type=Path, metavar="PATH", help="texts (default: retrieval tasks)")
    parser.add_argument("--lengths", default="1024,4096", metavar="N,N", help="tokens of a text (default: %(default)s)")
    parser.add_argument(
        "--samples",
        type=int,
        default=4,
        metavar="N",
        help="texts of each length, and of each task (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the tasks (default: 0)")
    parser.add_argument("--count", type=int, metavar="N", help="full-attention layers (default: one in six, and one)")
    parser.add_argument(
        "--top-tokens", default="0.05", metavar="N", help="tokens to choose, or their fraction (default: %(default)s)"
    )
    parser.add_argument(
        "--sink-tokens", type=int, default=4, metavar="N", help="first tokens, always read (default: 4)"
    )
    parser.add_argument("--recent-tokens", type=int, default=32, metavar="N", help="last tokens likewise (default: 32)")
    parser.add_argument("--queries", type=int, default=16, metavar="N", help="last tokens that ask (default: 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write layers and matrix there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the matrix (needs matplotlib)")
    parser.set_defaults(run=functools.partial(run, default_of=parser.get_default))


def run(args: argparse.Namespace, *, default_of: Callable[[str], Any]) -> int:
    """Measures and chooses. default_of: what an option is when it is not given."""
    from sparsejax.cli.compression_options import selection_options
    from sparsejax.methods.selection import top_tokens

    lengths = numbers("--lengths", args.lengths)
    for name in ("samples", "queries"):
        if getattr(args, name) < 1:
            raise InvalidArgumentError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if args.data is not None:
        refuse_given(args, default_of, ("seed",), "--data")
        if args.data.suffix == ".jsonl":
            refuse_given(args, default_of, ("lengths", "samples"), "a .jsonl, whose texts are taken whole")
    check_outputs(args)
    for name in ("sink_tokens", "recent_tokens"):
        whole(f"--{name.replace('_', '-')}", getattr(args, name), 0)
    top = top_tokens(selection_options(args)["top_tokens"])
    import jax
    from tqdm import tqdm

    from sparsejax.assets import tiny_model_path
    from sparsejax.checkpoint import load_model, load_tokenizer, resolve
    from sparsejax.evaluation.layer_choice import choose_layers, format_coverage, measure_coverage, save_choice

    checkpoint = resolve(args.model or tiny_model_path())
    tokenizer = load_tokenizer(checkpoint.folder)
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else None)
    config, params = load_model(checkpoint.folder, dtype=dtype)
    count = config.num_layers // 6 + 1 if args.count is None else whole("--count", args.count, 1, config.num_layers)
    texts = _texts(args, tokenizer, lengths)
    asked = {"top_tokens": top, "sinks": args.sink_tokens, "recent": args.recent_tokens, "queries": args.queries}
    coverage = measure_coverage(config, params, tqdm(texts, desc="texts"), **asked)
    choice = choose_layers(coverage, count)
    print(format_coverage(coverage))
    print("\nfull layers  attention kept by followers  layers")
    for number in sorted({*range(1, min(config.num_layers, 2 * count) + 1), count}):
        each = choose_layers(coverage, number)
        print(f"{number:11d}  {each.coverage:27.1%}  {','.join(map(str, each.layers))}")
    print(f"\n--full-attention-layers {','.join(map(str, choice.layers))}")
    if args.json is not None:
        save_choice(args.json, choice, coverage, config, texts=len(texts), **asked)
    if args.plot is not None:
        from sparsejax.evaluation.plots import plot_coverage

        plot_coverage(coverage, choice.layers, args.plot)
    return 0


def _texts(args: argparse.Namespace, tokenizer: Any, lengths: list[int]) -> list[list[int]]:
    from sparsejax.evaluation.calibration_texts import file_texts, task_texts

    if args.data is None:
        found = task_texts(tokenizer, lengths=lengths, samples=args.samples, seed=args.seed)
    else:
        files = sorted(path for path in args.data.rglob("*") if path.is_file()) if args.data.is_dir() else [args.data]
        found = [text for file in files for text in file_texts(tokenizer, file, lengths=lengths, samples=args.samples)]
    if not found:
        raise InvalidArgumentError(f"--data {args.data} holds no text.")
    return [text.tokens for text in found]
