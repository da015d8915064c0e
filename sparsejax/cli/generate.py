"""`sparsejax generate`: complete prompts from the command line, a file or standard input."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sparsejax.cli import options
from sparsejax.cli.compression_options import ARGUMENTS, SELECTION_ARGUMENTS, add_compression_options, compression_from
from sparsejax.engine.requests.outputs import RequestMetrics, RequestOutput
from sparsejax.errors import InvalidArgumentError
from sparsejax.text_files import numbered_lines, read_text

if TYPE_CHECKING:
    from sparsejax import LLM
    from sparsejax.methods.calibrated_ratio import CalibratedRatio


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="complete one or more prompts",
        description="Completes prompts as plain text (use `sparsejax chat` for a chat template). Answers are printed "
        "as they end, in the order of the prompts; an interrupted run prints all that it has.",
        epilog='example: sparsejax generate "The capital of France is" --max-tokens 8 --json; '
        "with a sparse method: sparsejax generate --file prompts.txt --method snapkv --keep-fraction 0.25",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to complete; - reads standard input")
    parser.add_argument("--file", type=Path, metavar="FILE", help="a file of prompts, one a line")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt, metrics included")
    parser.add_argument("--n", type=int, default=1, metavar="N", help="answers to each prompt (default: 1)")
    options.add_sampling_options(parser, max_tokens=128)
    add_compression_options(parser)
    calibrated = parser.add_argument_group("calibrated compression")
    calibrated.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="written by `sparsejax eval calibrate`: its method keeps as much of each prompt as the target needs",
    )
    calibrated.add_argument(
        "--quality-target", type=float, metavar="Q", help="quality relative to dense, in (0, 1] (default: 0.95)"
    )
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(args)
    params, ratio = options.sampling_params(args, n=args.n), _calibration(args)
    compression = compression_from(args)
    method = compression.method if ratio is None else ratio.method
    options.check_store_options(args, method)
    llm = options.make_llm(args, methods=tuple(dict.fromkeys(["full", method])))
    if ratio is not None:
        compression = _calibrated(args, llm, ratio, prompts)
    several = len(prompts) > 1
    waiting: dict[int, RequestOutput] = {}
    printed = 0

    def take(index: int, output: RequestOutput) -> None:
        """Prints what has ended, in the order of the prompts: an interrupted run keeps what it has printed."""
        nonlocal printed
        waiting[index] = output
        while printed in waiting:
            _print(waiting[printed], as_json=args.json, titled=several or args.n > 1)
            del waiting[printed]
            printed += 1

    try:
        llm.generate(prompts, params, compression, use_tqdm=several, on_output=take)
    finally:  # after an error, those that ended before an earlier prompt did
        for index in sorted(waiting):
            _print(waiting[index], as_json=args.json, titled=True)
    return 0


def _print(output: RequestOutput, *, as_json: bool, titled: bool) -> None:
    """Standard output is the answers alone. titled: name the prompt, and the answer if there are several."""
    if as_json:
        lines = [json.dumps(dataclasses.asdict(output), ensure_ascii=False)]
    else:
        lines = []
        for completion in output.outputs:
            which = f" [{completion.index}]" if len(output.outputs) > 1 else ""
            lines += [f"--- {output.prompt!r}{which}", completion.text] if titled else [completion.text]
    with tqdm.external_write_mode():  # the progress bar steps aside
        print("\n".join(lines), flush=True)
        if not as_json and output.metrics.kv_bytes_before_compression:
            print(_compression_line(output.metrics), file=sys.stderr)


def _calibration(args: argparse.Namespace) -> CalibratedRatio | None:
    """What --calibration holds, which brings the method and its options."""
    from sparsejax.methods.calibrated_ratio import CalibratedRatio

    if args.calibration is None:
        if args.quality_target is not None:
            raise InvalidArgumentError("--quality-target needs --calibration.")
        return None
    for name in (*ARGUMENTS, *SELECTION_ARGUMENTS):
        if getattr(args, name) is not None:
            raise InvalidArgumentError(f"--{name.replace('_', '-')} has no meaning with --calibration, which sets it.")
    if args.method != "full" or args.option:
        raise InvalidArgumentError("--method and --option have no meaning with --calibration, which sets them.")
    ratio = CalibratedRatio.load(args.calibration)
    if not ratio.method:
        raise InvalidArgumentError(f"--calibration {args.calibration} names no method.")
    return ratio


def _calibrated(args: argparse.Namespace, llm: LLM, ratio: CalibratedRatio, prompts: list[str]):
    """Parameters of each prompt, all of which is compressed."""
    from sparsejax.evaluation.calibration import params_for

    target = 0.95 if args.quality_target is None else args.quality_target
    tokens = [llm.get_tokenizer().encode(prompt) for prompt in prompts]
    return params_for(llm, ratio, tokens, target=target, whole_prompt=True)


def _compression_line(metrics: RequestMetrics) -> str:
    before, after = metrics.kv_bytes_before_compression, metrics.kv_bytes_after_compression
    return (
        f"KV cache compressed: {before / 2**20:.2f} MiB -> {after / 2**20:.2f} MiB ({100 * after / before:.1f} % kept) "
        f"in {1e3 * metrics.compression_seconds:.1f} ms"
    )


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the arguments, then those of --file."""
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompts]
    if args.file is not None:
        prompts += [line for _, line in numbered_lines(read_text(args.file, name=f"--file {args.file}"))]
    if not prompts:
        raise InvalidArgumentError("no prompt was given: pass one or more, --file FILE, or - to read standard input.")
    return prompts
