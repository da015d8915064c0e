"""`sparsejax eval calibrate`: fit how much of a context a method must keep for a given quality."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.cli import compression_options, options
from sparsejax.cli.outputs import check_outputs
from sparsejax.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sparsejax.evaluation.calibration_texts import CalibrationText

DESCRIPTION = """Asks about contexts of which a method, before it saw the question, kept different fractions,
and fits how the likelihood of the right answers depends on the fraction and on how well the model predicts the
context. The fit, saved with --json, then says how much of another context to keep:
  sparsejax generate --calibration FILE --quality-target 0.95 ...
It holds for this model and method, and for contexts like those measured. They are retrieval tasks, or --file: a .jsonl
with one {"context": ..., "question": ..., "answer": ...} or {"text": ...} a line, or any text, taken in pieces."""

EXAMPLES = """examples:
  sparsejax eval calibrate --json compactor.json --plot compactor.png
  sparsejax eval calibrate --method snapkv --file book.txt --lengths 2048,4096 --target 0.9 --json snapkv.json
"""


def add_parser(suites) -> None:
    parser = suites.add_parser(
        "calibrate",
        help="fit how much of a context must be kept for a given quality",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--method", default="compactor", metavar="NAME", help="a method that evicts (default: %(default)s)"
    )
    compression_options.add_common_arguments(parser)
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method or the budget rule's own, e.g. pooling=avg (repeatable)",
    )
    parser.add_argument(
        "--target", type=float, default=0.95, metavar="Q", help="quality to report for, in (0, 1] (default: 0.95)"
    )
    parser.add_argument(
        "--fractions", default="0.05,0.1,0.2,0.3,0.5,0.75", metavar="F,F", help="fractions kept (default: %(default)s)"
    )
    parser.add_argument("--lengths", default="1024,4096", metavar="N,N", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="per task and length (default: 8)")
    parser.add_argument("--tasks", metavar="A,B", help=f"retrieval tasks (default: {options.TASKS})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the tasks (default: 0)")
    parser.add_argument("--file", type=Path, metavar="FILE", help="texts to measure on instead of the tasks")
    parser.add_argument(
        "--answer-tokens", type=int, default=64, metavar="N", help="end of a text, to be predicted (default: 64)"
    )
    parser.add_argument(
        "--smoothing", type=float, default=0.05, metavar="S", help="nats a token that hardly count (default: 0.05)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the fit there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what was measured and the fit")
    options.add_model_options(parser, dense=True)
    parser.set_defaults(run=functools.partial(run, default_of=parser.get_default))


def run(args: argparse.Namespace, *, default_of: Callable[[str], Any]) -> int:
    """Measures and fits. default_of: what an option is when it is not given."""
    from sparsejax import methods
    from sparsejax.cli.evaluate import numbers, task_names
    from sparsejax.evaluation import calibration
    from sparsejax.evaluation.plots import plot_calibration
    from sparsejax.validation import number, whole

    if methods.get(args.method).family != "evict":
        raise InvalidArgumentError(f"--method must be one that evicts: {args.method!r} keeps everything.")
    target = number("--target", args.target, 0.0, 1.0, above=True)
    fractions = _fractions(args.fractions)
    lengths, tasks = numbers("--lengths", args.lengths), task_names(args.tasks)
    if args.samples < 1:
        raise InvalidArgumentError(f"--samples must be at least 1, got {args.samples}.")
    whole("--answer-tokens", args.answer_tokens, 1)
    if args.file is not None:
        options.refuse_given(args, default_of, ("tasks", "seed"), "--file")
        if args.file.suffix == ".jsonl":
            options.refuse_given(args, default_of, ("lengths", "samples"), "a .jsonl, whose texts are taken whole")
    else:
        options.refuse_given(args, default_of, ("answer_tokens",), "tasks, which have answers of their own")
    check_outputs(args)
    compression = compression_options.compression_from(args, keep_fraction=fractions[0])
    # On a CPU every slot that a row could have costs time, so that rows are made no longer than the tasks.
    room = {"max_model_len": max(lengths)} if args.max_model_len is None and args.file is None else {}
    llm = options.make_llm(args, methods=tuple(dict.fromkeys(["full", args.method])), **room)
    texts = _texts(args, llm.get_tokenizer(), lengths, tasks)
    if len(texts) < 2:
        raise InvalidArgumentError("There is one text to measure on; a fit needs two (--file, --lengths, --samples).")
    points = calibration.measure_points(
        llm, compression, texts, keep_fractions=fractions, smoothing=args.smoothing, progress=True
    )
    ratio = calibration.fit(compression, points)
    print(calibration.format_calibration(ratio, points, target))
    if args.json is not None:
        ratio.save(args.json)
    if args.plot is not None:
        plot_calibration(ratio, points, target, args.plot)
    return 0


def _texts(args: argparse.Namespace, tokenizer: Any, lengths: list[int], tasks: list[str]) -> list[CalibrationText]:
    from sparsejax.evaluation.calibration_texts import file_texts, task_texts

    if args.file is not None:
        return file_texts(tokenizer, args.file, lengths=lengths, samples=args.samples, answer_tokens=args.answer_tokens)
    return task_texts(tokenizer, tasks=tasks, lengths=lengths, samples=args.samples, seed=args.seed)


def _fractions(text: str) -> list[float]:
    """ "0.1,0.5" -> [0.1, 0.5], all in (0, 1]."""
    try:
        fractions = [float(part) for part in text.split(",")]
    except ValueError:
        fractions = [0.0]
    if not all(0 < fraction <= 1 for fraction in fractions):
        raise InvalidArgumentError(f"--fractions must be in (0, 1] with commas between, got {text!r}.")
    if min(fractions) == 1:
        raise InvalidArgumentError(f"--fractions must have one below 1, where something is lost, got {text!r}.")
    return fractions
