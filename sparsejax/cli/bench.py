"""`sparsejax bench`: how fast this card is, and how near the engine comes to it."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sparsejax.cli import bench_fragmentation, bench_latency
from sparsejax.cli.bench_options import (
    RANDOM_MODEL,
    add_delta_options,
    add_model,
    add_outputs,
    add_random_weights,
    check_delta_options,
    check_model,
    compiling,
    delta_engine_options,
    engine_options,
    given,
    load,
    reaching,
    write_json,
)
from sparsejax.cli.compression_options import add_compression_options, compression_from
from sparsejax.cli.outputs import check_outputs
from sparsejax.errors import InvalidArgumentError
from sparsejax.folders import check_can_make

if TYPE_CHECKING:
    from sparsejax.bench.traces import Trace

TUNE = (
    "time the candidates of a kernel instead: decode_attention, decode_work, prefill_attention, gated_linear, "
    "add_linear, record_attention, block_attention_mass, delta_attention, delta_compress, delta_reconstruct or "
    "reference_search"
)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("bench", help="measure speed as a fraction of what the card can do")
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)

    kernels = suites.add_parser(
        "kernels",
        help="every kernel at production shapes against the card's ceilings",
        description="Measures the card's ceilings, then every kernel: time, rate and fraction of the ceiling.",
        epilog="example: sparsejax bench kernels decode_attention --json kernels.json",
    )
    kernels.add_argument("names", nargs="*", metavar="NAME", help="cases or kernels (default: all)")
    kernels.add_argument("--tune", metavar="KERNEL", help=TUNE)
    add_outputs(kernels)
    kernels.set_defaults(run=run_kernels)

    bench_latency.add_parser(suites)
    throughput = suites.add_parser(
        "throughput",
        help="a trace of requests through the whole engine",
        description="Serves a trace: time to first token, time per output token, between tokens and end to end, tokens "
        "a second, memory, pages, preemptions, and compilations while serving (after a warm-up there are none).",
        epilog="example: sparsejax bench throughput --trace mix600 --json mix600.json --plot mix600.png",
    )
    throughput.add_argument(
        "--trace",
        default="random",
        metavar="NAME",
        help="mix600, 512x1024x256, 24x32k, itl32k (a long prompt beside eight that decode), prefix64x8k (a shared "
        "system prompt), any "
        "REQUESTSxINPUTxOUTPUT, a JSONL file, or several of these with commas between them (one engine serves them in "
        "turn, and the trace's name is added to --json and --plot); or, alone, random or lognormal (default: "
        "%(default)s)",
    )
    throughput.add_argument("--write-trace", type=Path, metavar="FILE", help="write the trace there and stop")
    throughput.add_argument(
        "--no-prefix-caching",
        action="store_true",
        help="compute the tokens that prompts of a trace share every time (drawn prompts share none)",
    )
    throughput.add_argument("--no-warmup", action="store_true", help="compile while serving rather than before")
    group = throughput.add_argument_group("random and lognormal traces")
    group.add_argument("--requests", type=int, metavar="N", help="how many (default: 100)")
    group.add_argument("--input-len", type=int, metavar="N", help="mean or median prompt tokens (default: 1024)")
    group.add_argument("--output-len", type=int, metavar="N", help="mean or median answer tokens (default: 128)")
    group.add_argument(
        "--spread",
        type=float,
        metavar="F",
        help="of the lengths: uniform in 1 - F to 1 + F times the mean (default 0.5), or the log-normal's sigma "
        "(default 1)",
    )
    group.add_argument("--rate", type=float, metavar="R", help="mean arrivals a second (default: all at once)")
    group.add_argument("--seed", type=int, metavar="N", help="of the trace (default: 0)")
    add_compression_options(throughput)
    add_delta_options(throughput)
    add_outputs(throughput)
    add_model(throughput)
    throughput.set_defaults(run=run_throughput)

    startup = suites.add_parser(
        "startup",
        help="the time an engine takes to be ready, and the pages it gets",
        description="Builds an engine on weights that are in memory and warms it up: seconds, what is compiled, and "
        "the share of the card that goes to pages. Run it twice with the same --compilation-cache for a cold start "
        "and a warm one.",
        epilog="example: sparsejax bench startup --random-weights llama-3.1-8b --compilation-cache xla-cache",
    )
    startup.add_argument("--compilation-cache", type=Path, metavar="DIR", help="where compiled programs are kept")
    startup.add_argument("--greedy-only", action="store_true", help="warm up the steps of plain greedy requests only")
    startup.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    add_model(startup, max_model_len="the model's", max_num_seqs="256, 16 on a CPU")
    startup.set_defaults(run=run_startup, plot=None)

    bench_fragmentation.add_parser(suites)

    compare = suites.add_parser(
        "compare",
        help="two --json files of the same benchmark side by side",
        description="Prints every metric of two runs of the same benchmark (their --json), and their ratio.",
        epilog="example: sparsejax bench compare before.json after.json",
    )
    compare.add_argument("a", type=Path, metavar="A.json")
    compare.add_argument("b", type=Path, metavar="B.json")
    compare.set_defaults(run=run_compare)

    checkpoint = suites.add_parser(
        "checkpoint",
        help="convert, load and generate from a random checkpoint of full size",
        description="Writes a random Hugging Face checkpoint, converts it, loads both layouts, compares answers.",
        epilog="example: sparsejax bench checkpoint --random-weights llama-3.1-8b",
    )
    add_random_weights(checkpoint)
    checkpoint.add_argument("--folder", type=Path, metavar="DIR", help="where to work (default: a temporary folder)")
    checkpoint.set_defaults(run=run_checkpoint)


def run_kernels(args: argparse.Namespace) -> int:
    check_outputs(args)
    from sparsejax.bench import kernels, plots

    if args.tune:
        if args.json is not None or args.plot is not None:
            raise InvalidArgumentError("--json and --plot have no meaning with --tune, which prints what it finds.")
        kernels.tune(args.tune, args.names or None)
        return 0
    json_path = None if args.json is None else str(args.json)
    rows = kernels.run(args.names or None, json_path, report=lambda line: print(line, flush=True))
    if args.plot is not None:
        plots.plot_fractions({row.name: row.fraction for row in rows}, "kernels, fraction of the ceiling", args.plot)
    return 0


def _traces(args: argparse.Namespace) -> list[Trace]:
    """The traces that `bench throughput` is asked for."""
    from sparsejax.bench import traces

    if args.trace in traces.RANDOM:
        return [
            traces.generate(
                args.trace,
                requests=given(args.requests, 100),
                input_len=given(args.input_len, 1024),
                output_len=given(args.output_len, 128),
                spread=args.spread,
                rate=args.rate,
                seed=given(args.seed, 0),
            )
        ]
    for name in ("requests", "input_len", "output_len", "spread", "rate", "seed"):
        if getattr(args, name) is not None:
            raise InvalidArgumentError(
                f"--{name.replace('_', '-')} is for the traces {' and '.join(traces.RANDOM)}, which are drawn; "
                f"got --trace {args.trace}."
            )
    return [traces.load(name) for name in args.trace.split(",")]


def run_throughput(args: argparse.Namespace) -> int:
    check_outputs(args)
    from sparsejax.bench import traces

    wanted = _traces(args)
    names = [trace.name for trace in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None and (args.json is not None or args.plot is not None):
        raise InvalidArgumentError(f"--trace has {twice!r} twice: --json and --plot write a file for each name.")
    if args.write_trace is not None:
        if len(wanted) > 1:
            raise InvalidArgumentError(f"--write-trace takes one trace, got {len(wanted)}.")
        if args.json is not None or args.plot is not None:
            raise InvalidArgumentError("--write-trace serves nothing: --json and --plot have nothing to tell of.")
        traces.write_jsonl(wanted[0], args.write_trace)
        return 0
    from sparsejax.engine.execution.memory import reserve_device_memory

    compression = compression_from(args)
    check_delta_options(args)
    check_model(args)
    reserve_device_memory(args.gpu_memory_utilization)
    from sparsejax import LLM
    from sparsejax.bench import plots, throughput

    name, config, params = load(args)
    longest = max(trace.longest for trace in wanted)
    # Prompts that are drawn share nothing unless they are to: rows that stay resident for them would be in the way.
    may_share = any(r.shared_tokens or r.prompt_token_ids is not None for trace in wanted for r in trace.requests)
    shares = may_share and not args.no_prefix_caching
    llm = LLM.from_params(
        config if args.model else reaching(config, longest),
        params,
        max_num_seqs=given(args.max_num_seqs, min(256, max(map(len, wanted)))),
        max_model_len=given(args.max_model_len, longest),
        methods=(compression.method,),
        **engine_options(args, config, params) | {"enable_prefix_caching": shares},
        **delta_engine_options(args, config, params),
    )
    for trace in wanted:  # what cannot be served is refused before the warm-up
        throughput.check(llm, trace, compression)
    if not args.no_warmup:
        throughput.prepare(llm, wanted, compression, progress=compiling)
    for trace in wanted:
        result = throughput.serve(llm, trace, compression)
        print(throughput.format_report(result), flush=True)
        if args.json is not None:
            write_json(_named(args.json, trace.name, wanted), throughput.as_dict(result, model=name))
        if args.plot is not None:
            plots.plot_throughput(result, _named(args.plot, trace.name, wanted))
        if result.interrupted:
            raise KeyboardInterrupt
    return 0


def run_startup(args: argparse.Namespace) -> int:
    check_outputs(args)
    if args.compilation_cache is not None:  # or JAX would only warn, and a warm start would be a cold one
        check_can_make(args.compilation_cache, name="--compilation-cache")
    check_model(args)
    from sparsejax.engine.execution.memory import reserve_device_memory

    reserve_device_memory(args.gpu_memory_utilization)
    from sparsejax.bench import startup

    name, config, params = load(args)
    if args.compilation_cache is not None:  # the weights' own programs are no part of the start
        startup.use_compilation_cache(args.compilation_cache)
    asked = {"max_num_seqs": args.max_num_seqs, "max_model_len": args.max_model_len, "enable_prefix_caching": True}
    result = startup.measure(
        config,
        params,
        greedy_only=args.greedy_only,
        utilization=args.gpu_memory_utilization,
        progress=compiling,
        **engine_options(args, config, params) | {name: value for name, value in asked.items() if value is not None},
    )
    print(f"{name}: {startup.format_report(result)}")
    write_json(args.json, startup.as_dict(result, model=name))
    return 0


def _named(path: Path, name: str, wanted: list[Trace]) -> Path:
    """A file for each of several traces: report.json -> report-NAME.json."""
    return path if len(wanted) == 1 else path.with_stem(f"{path.stem}-{name}")


def run_compare(args: argparse.Namespace) -> int:
    from sparsejax.bench import compare

    print(compare.format_comparison(compare.compare(args.a, args.b), str(args.a), str(args.b)))
    return 0


def run_checkpoint(args: argparse.Namespace) -> int:
    from sparsejax.bench import checkpoint, presets

    raw = presets.config_dict(args.random_weights or RANDOM_MODEL)
    if args.folder is not None and not args.folder.is_dir():
        raise InvalidArgumentError(f"--folder {args.folder} must be a folder that exists.")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report = checkpoint.run(raw, Path(folder))
    print(json.dumps(report, indent=2))
    return 0 if report["layouts_agree"] else 1
