"""`sparsejax eval`: measure what a model gets right, dense and under sparse methods."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.cli import compression_options, evaluate_calibration, options
from sparsejax.cli.outputs import check_outputs
from sparsejax.config import LATENT_DTYPES
from sparsejax.errors import InvalidArgumentError, SparsejaxError

if TYPE_CHECKING:
    from sparsejax.evaluation import Row
    from sparsejax.evaluation.method_sweep import MethodRow

BUDGETS = "0.125,0.25,0.5"

RULER = """Generates needle retrieval, variable tracking and most-common-word tasks at the given lengths from a seed,
answers them greedily and prints the share of exact answers per task.

With --methods it compares sparse methods. Each compresses once, to each of --budgets, and the tables keep apart what
must not be mixed:
  aware     compressed with the question in sight: after all of the prompt but its last token, so that every token of
            the answer is computed from what was kept
  agnostic  compressed before the question is seen
Methods that select keep everything; their budget is what their selecting layers read of the text:
  reading   the last token of the prompt is decoded, so that every token of the answer is computed from what was read
A method that stores tokens compressed (deltakv) is compared by what its cache takes:
  storing   as reading; the budget is what is read of the compressed tokens
How tokens are stored belongs to an engine, so each of --latent-dtypes has an engine of its own, one after the other.
A table has the dense line first, the bytes that were kept (measured, whole pages), the tokens that were read (mean over
all layers), and 95 % bootstrap intervals."""

EXAMPLES = """examples:
  sparsejax eval ruler --lengths 1024,4096 --samples 50 --json scores.json
  sparsejax eval ruler --methods snapkv,compactor,random --budgets 0.125,0.25,256 --plot accuracy.png
  sparsejax eval ruler --methods all --budgets 0.25 --mode agnostic --option snapkv.pooling=avg
  sparsejax eval ruler --methods omnikv,quest,deltakv --budgets 0.125,0.25 --latent-dtypes bfloat16,int4
"""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("eval", help="score a model, dense or sparse, on long-context tasks")
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)
    ruler = suites.add_parser(
        "ruler",
        help="retrieval tasks at any length, by exact match",
        description=RULER,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ruler.add_argument("--lengths", default="1024,4096", metavar="N,N", help="prompt tokens (default: %(default)s)")
    ruler.add_argument("--tasks", metavar="A,B", help=f"(default: {options.TASKS})")
    ruler.add_argument(
        "--samples", type=int, default=20, metavar="N", help="per task and length (default: %(default)s)"
    )
    ruler.add_argument("--seed", type=int, default=0, metavar="N", help="of the tasks (default: %(default)s)")
    ruler.add_argument(
        "--json", type=Path, metavar="FILE", help="write the scores there too; an interrupted run those that it has"
    )
    sweep = ruler.add_argument_group("sparse methods")
    sweep.add_argument(
        "--methods", metavar="A,B", help="methods to compare, or all; `sparsejax methods` lists them (default: dense)"
    )
    sweep.add_argument(
        "--budgets",
        metavar="B,B",
        help=f"with a point: fraction to keep or read, in (0, 1]; whole: tokens (default: {BUDGETS})",
    )
    sweep.add_argument("--mode", choices=("aware", "agnostic", "both"), help="(default: both)")
    compression_options.add_common_arguments(sweep)
    sweep.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="an option of one method, or an argument of CompressionParams for it (repeatable)",
    )
    sweep.add_argument(
        "--full-attention-layers",
        metavar="N,N",
        help="for deltakv: layers that keep and read everything (default: those known for the model); for omnikv write "
        "--option omnikv.full_attention_layers=N,N",
    )
    sweep.add_argument(
        "--latent-dtypes",
        metavar="A,B",
        help=f"for deltakv: types of compressed tokens to compare, of {', '.join(LATENT_DTYPES)} (default: that of "
        "--latent-dtype)",
    )
    sweep.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy over what is kept")
    options.add_model_options(ruler)
    ruler.set_defaults(run=run_ruler)
    evaluate_calibration.add_parser(suites)


def run_ruler(args: argparse.Namespace) -> int:
    lengths, tasks = numbers("--lengths", args.lengths), task_names(args.tasks)
    if args.samples < 1:
        raise InvalidArgumentError(f"--samples must be at least 1, got {args.samples}.")
    check_outputs(args)
    samples = {"tasks": tasks, "lengths": lengths, "samples": args.samples, "seed": args.seed}
    if args.methods is None:
        _dense(args, samples)
    else:
        _sweep(args, samples)
    return 0


def _keep(args: argparse.Namespace, rows: list, more: Sequence, scores: Callable[[Any], dict]) -> None:
    """Adds what has been measured, and writes --json, whatever becomes of the rest."""
    rows.extend(more)
    if args.json is not None and rows:
        args.json.write_text(json.dumps([scores(row) for row in rows], indent=2) + "\n", encoding="utf-8")


def _dense(args: argparse.Namespace, samples: dict) -> None:
    """The model as it is: a line a task, a column a length."""
    from sparsejax import CompressionParams
    from sparsejax.evaluation import evaluate, format_table

    sweeps = ("plot", "budgets", "mode", "full_attention_layers", "latent_dtypes", *options.STORE_OPTIONS)
    for name in (*sweeps, *compression_options.COMMON_ARGUMENTS):
        if getattr(args, name) is not None:
            raise InvalidArgumentError(f"--{name.replace('_', '-')} needs --methods.")
    if args.option:
        raise InvalidArgumentError("--option needs --methods.")
    llm = options.make_llm(args, **_room(args, samples["lengths"]))
    rows: list[Row] = []
    try:
        evaluate(
            answering(llm, CompressionParams()),
            llm.get_tokenizer(),
            **samples,
            on_rows=lambda more: _keep(args, rows, more, dataclasses.asdict),
        )
    finally:  # of an interrupted run, what there is
        if rows:
            print(format_table(rows))


def _room(args: argparse.Namespace, lengths: Sequence[int]) -> dict[str, int]:
    """What `make_llm` is told of the lengths. On a CPU every slot that a row could have costs time."""
    if args.max_model_len is None:
        return {"max_model_len": max(lengths)}
    if max(lengths) > args.max_model_len:
        raise InvalidArgumentError(f"--lengths has {max(lengths)}, more than --max-model-len {args.max_model_len}.")
    return {}


def _sweep(args: argparse.Namespace, samples: dict) -> None:
    """Methods against dense: a table for each length and mode."""
    from sparsejax import methods
    from sparsejax.evaluation.method_sweep import MODES, format_methods, make_settings
    from sparsejax.evaluation.plots import plot_methods

    names = args.methods.split(",")
    if args.methods == "all":  # of those that one cache serves
        names = [name for name in methods.available() if methods.get(name).family != "store"]
    for name in names:
        if name not in methods.available():
            raise InvalidArgumentError(f"--methods has no method {name!r}; there are {', '.join(methods.available())}.")
    if args.plot is not None and set(names) <= {"full"}:
        raise InvalidArgumentError("--plot needs a method beside full: there is nothing to draw.")
    engines = _engines(args, names)
    _check_used(args, {methods.get(name).family for name in names})
    own = compression_options.method_options(args.option)
    unknown = next((name for name in own if name not in names), None)
    if unknown is not None:
        raise InvalidArgumentError(f"--option is given for method {unknown!r}, which is not among --methods.")
    try:
        settings = [
            make_settings(
                served,
                budgets("--budgets", BUDGETS if args.budgets is None else args.budgets),
                MODES if args.mode in (None, "both") else (args.mode,),
                common=compression_options.common_arguments(args),
                options={name: given for name, given in own.items() if name in served},
                variant=variant,
            )
            for served, variant in engines
        ]
    except SparsejaxError as error:
        raise type(error)(f"--methods, --budgets and their options do not fit: {error}") from None
    rows: list[MethodRow] = []
    try:
        _compare(args, samples, zip(engines, settings, strict=True), rows)
    finally:  # of an interrupted run, what there is
        if rows:
            print(format_methods(rows))
    if args.plot is not None:
        plot_methods(rows, args.plot)


def _compare(args: argparse.Namespace, samples: dict, engines: Iterable, rows: list[MethodRow]) -> None:
    """Adds the rows of every engine.

    Args:
      engines: ((methods that it serves, its variant), its settings) of each.
    """
    from sparsejax.evaluation.method_sweep import MethodRow, compare_methods

    room = _room(args, samples["lengths"])
    for (served, variant), asked in engines:
        stored: dict[str, Any] = {"latent_dtype": variant} if variant else {}
        if not rows:  # it serves the dense lines, which need room of their own where others are stored compressed
            stored["dense_cache_fraction"] = 0.5
        llm = options.make_llm(args, methods=tuple(dict.fromkeys(["full", *served])), **room, **stored)
        # The dense lines of the first engine are those that all others are compared with.
        compare_methods(
            llm,
            asked[1:] if rows else asked,
            **samples,
            dense=tuple(rows),
            on_rows=lambda more: _keep(args, rows, more, MethodRow.as_dict),
        )
        llm.engine.close()
        del llm  # the weights are loaded once more, and two copies would leave the next engine less memory


def _check_used(args: argparse.Namespace, families: set[str]) -> None:
    """Refuses options that no method of these families takes."""
    needed = dict.fromkeys((*options.STORE_OPTIONS, "full_attention_layers"), ("store",))
    needed |= dict.fromkeys(compression_options.COMMON_ARGUMENTS, ("evict",))
    needed |= dict.fromkeys(("sink_tokens", "recent_tokens"), ("evict", "select"))
    if args.budgets is not None and families <= {"full"}:
        raise InvalidArgumentError("--budgets needs a method beside full.")
    if args.mode is not None and "evict" not in families:
        raise InvalidArgumentError("--mode needs a method that evicts among --methods.")
    if args.latent_dtype is not None and args.latent_dtypes is not None:
        raise InvalidArgumentError("--latent-dtype has no meaning with --latent-dtypes; give one of them.")
    words = {"store": "stores tokens compressed, such as deltakv", "evict": "evicts", "select": "selects"}
    for name, takers in needed.items():
        if getattr(args, name) is not None and families.isdisjoint(takers):
            what = " or ".join(words[family] for family in takers)
            raise InvalidArgumentError(f"--{name.replace('_', '-')} needs a method that {what} among --methods.")


def _engines(args: argparse.Namespace, names: Sequence[str]) -> list[tuple[list[str], str]]:
    """The methods that each engine of a comparison serves, and the type of its compressed tokens ("": the default)."""
    from sparsejax import methods

    storing = [name for name in names if methods.get(name).family == "store"]
    others = [name for name in names if name not in storing]
    types = [args.latent_dtype or ""] if args.latent_dtypes is None else args.latent_dtypes.split(",")
    for kind in types:
        if kind and kind not in LATENT_DTYPES:
            raise InvalidArgumentError(f"--latent-dtypes must be of {', '.join(LATENT_DTYPES)}, got {kind!r}.")
    if args.latent_dtypes is not None and not storing:
        raise InvalidArgumentError("--latent-dtypes needs a method that stores tokens compressed, such as deltakv.")
    # One cache serves all methods that evict or select; each way of storing needs pools of its own.
    return [*([(others, "")] if others else []), *(([name], kind) for name in storing for kind in types)]


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
    """ "1024,4096" -> [1024, 4096], all positive, each once; `name` is the option, for messages."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgumentError(f"{name} must be whole numbers with commas between, got {text!r}.") from None
    if min(numbers) < 1:
        raise InvalidArgumentError(f"{name} must be positive, got {text!r}.")
    return list(dict.fromkeys(numbers))


def task_names(text: str | None) -> list[str]:
    """ "single,multi_key" of --tasks -> ["single", "multi_key"], each once; all tasks without it."""
    from sparsejax.evaluation import TASKS

    tasks = list(TASKS) if text is None else list(dict.fromkeys(text.split(",")))
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise InvalidArgumentError(f"--tasks has no task {unknown[0]!r}; there are {', '.join(TASKS)}.")
    return tasks


def budgets(name: str, text: str) -> list[float]:
    """ "0.25,256" -> [0.25, 256]: fractions in (0, 1] as floats, numbers of tokens as ints."""
    found: list[float] = []
    for part in text.split(","):
        try:
            value = int(part) if part.strip().isdecimal() else float(part)
        except ValueError:
            value = 0
        if not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
            raise InvalidArgumentError(
                f"{name} must be fractions in (0, 1], written with a point, and whole numbers of tokens, with commas "
                f"between; got {part!r}."
            )
        found.append(value)
    return found
