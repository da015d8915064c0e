"""`sparsejax eval`: measure what a model (and later a sparse method) gets right."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from sparsejax.cli import options
from sparsejax.errors import InvalidArgumentError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("eval", help="score a model on long-context tasks")
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)
    ruler = suites.add_parser(
        "ruler",
        help="retrieval tasks at any length, by exact match",
        description="Generates needle retrieval, variable tracking and most-common-word tasks at the given lengths "
        "from a seed, answers them greedily and prints the share of exact answers per task.",
        epilog="example: sparsejax eval ruler --lengths 1024,4096 --samples 50 --json scores.json",
    )
    ruler.add_argument("--lengths", default="1024,4096", metavar="N,N", help="prompt tokens (default: %(default)s)")
    ruler.add_argument("--tasks", metavar="A,B", help="some tasks only (default: all)")
    ruler.add_argument(
        "--samples", type=int, default=20, metavar="N", help="per task and length (default: %(default)s)"
    )
    ruler.add_argument("--seed", type=int, default=0, metavar="N", help="of the tasks (default: %(default)s)")
    ruler.add_argument("--json", type=Path, metavar="FILE", help="write the scores there too")
    options.add_compression_options(ruler)
    options.add_model_options(ruler)
    ruler.set_defaults(run=run_ruler)


def run_ruler(args: argparse.Namespace) -> int:
    from sparsejax.evaluation import TASKS, evaluate, format_table

    lengths = numbers("--lengths", args.lengths)
    tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InvalidArgumentError(f"--tasks has no task {unknown[0]!r}; there are {', '.join(TASKS)}.")
    if args.samples < 1:
        raise InvalidArgumentError(f"--samples must be at least 1, got {args.samples}.")
    if args.json is not None and not args.json.parent.is_dir():
        raise InvalidArgumentError(f"--json {args.json} cannot be written: there is no folder {args.json.parent}.")
    llm = options.make_llm(args)
    rows = evaluate(
        answering(llm, options.compression_params(args)),
        llm.get_tokenizer(),
        tasks=tasks,
        lengths=lengths,
        samples=args.samples,
        seed=args.seed,
    )
    print(format_table(rows))
    if args.json is not None:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    return 0


def answering(llm, compression):
    """The function that `evaluate` wants: prompts (token ids) -> greedily generated token ids."""
    from sparsejax import SamplingParams
    from sparsejax.evaluation import ANSWER_TOKENS

    params = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)

    def answer(prompts: list[list[int]]) -> list[list[int]]:
        outputs = llm.generate(prompts, params, compression, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    return answer


def numbers(name: str, text: str) -> list[int]:
    """ "1024,4096" -> [1024, 4096], all positive; `name` is the option, for messages."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"{name} must be whole numbers with commas between, got {text!r}.") from None
    if min(numbers) < 1:
        raise InvalidArgumentError(f"{name} must be positive, got {text!r}.")
    return numbers
