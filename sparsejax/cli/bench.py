"""`sparsejax bench`: how fast this card is, and how near the engine comes to it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from sparsejax.cli.evaluate import numbers
from sparsejax.config import GRANULARITIES
from sparsejax.errors import InvalidArgumentError


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
    kernels.add_argument("--tune", metavar="KERNEL", help="time the tile candidates of a kernel instead")
    _add_outputs(kernels)
    kernels.set_defaults(run=run_kernels)

    latency = suites.add_parser(
        "latency",
        help="prefill and decode times of fixed batches",
        description="Measures the card's ceilings, then for every batch and context: prefill tokens/s, milliseconds a "
        "decode step, host time a step, and the fraction of the physical limit (weights + KV bytes over bandwidth).",
        epilog="example: sparsejax bench latency --random-weights llama-3.1-8b --shapes 1x1024,32x2048 --profile",
    )
    latency.add_argument(
        "--shapes", default="1x1024,8x1024,32x2048", metavar="BxC,...", help="batches x context (default: %(default)s)"
    )
    latency.add_argument("--steps", type=int, default=50, metavar="N", help="timed decode steps (default: %(default)s)")
    latency.add_argument(
        "--profile",
        nargs="?",
        const="",
        metavar="DIR",
        help="profile some decode steps: GPU idle share and time by kernel; keep the trace in DIR if given",
    )
    _add_outputs(latency)
    _add_model(latency)
    latency.set_defaults(run=run_latency)

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
        help="mix600, 512x1024x256, 24x32k, itl32k (a long prompt beside eight that decode), any "
        "REQUESTSxINPUTxOUTPUT, a JSONL file, random or lognormal (default: %(default)s)",
    )
    throughput.add_argument("--write-trace", type=Path, metavar="FILE", help="write the trace there and stop")
    throughput.add_argument("--no-warmup", action="store_true", help="compile while serving rather than before")
    group = throughput.add_argument_group("random and lognormal traces")
    group.add_argument("--requests", type=int, default=100, metavar="N", help="how many (default: %(default)s)")
    group.add_argument(
        "--input-len", type=int, default=1024, metavar="N", help="mean or median prompt tokens (default: %(default)s)"
    )
    group.add_argument(
        "--output-len", type=int, default=128, metavar="N", help="mean or median answer tokens (default: %(default)s)"
    )
    group.add_argument(
        "--spread",
        type=float,
        metavar="F",
        help="of the lengths: uniform in 1 - F to 1 + F times the mean (default 0.5), or the log-normal's sigma "
        "(default 1)",
    )
    group.add_argument("--rate", type=float, metavar="R", help="mean arrivals a second (default: all at once)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the trace (default: %(default)s)")
    _add_outputs(throughput)
    _add_model(throughput)
    throughput.set_defaults(run=run_throughput)

    compare = suites.add_parser(
        "compare",
        help="two --json files of the same benchmark side by side",
        description="Prints every metric of two runs of bench kernels, latency or throughput, and their ratio.",
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
    _add_random_weights(checkpoint)
    checkpoint.add_argument("--folder", type=Path, metavar="DIR", help="where to work (default: a temporary folder)")
    checkpoint.set_defaults(run=run_checkpoint)


def _add_random_weights(parser: Any) -> None:
    parser.add_argument(
        "--random-weights",
        default="llama-3.1-8b",
        metavar="CONFIG",
        help="a known model or a config.json, with weights drawn at random (default: %(default)s)",
    )


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (needs matplotlib)")


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The model and the engine's options; read them back with `_load` and `_engine_options`."""
    group = parser.add_argument_group("model and engine")
    _add_random_weights(group)
    group.add_argument("--model", metavar="NAME", help="a checkpoint instead: folder or Hugging Face id")
    group.add_argument("--max-model-len", type=int, metavar="N", help="tokens of a request (default: what is needed)")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most requests at once (default: up to 256)")
    group.add_argument(
        "--max-num-batched-tokens", "--chunk", type=int, metavar="N", help="most prompt tokens in one step"
    )
    group.add_argument(
        "--max-mixed-tokens", type=int, metavar="N", help="likewise, if requests decode in it (default: no less)"
    )
    group.add_argument("--granularity", choices=GRANULARITIES, help="of slot tables (default: the engine's)")
    group.add_argument("--page-size", type=int, metavar="N", help="tokens in a page of the KV cache (default: 32)")
    group.add_argument("--num-pages", type=int, metavar="N", help="physical pages in the pool (default: what fits)")
    group.add_argument("--implementation", choices=("triton", "xla"), help="kernels (default: triton on a GPU)")
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="F", help="to reserve (default: %(default)s)"
    )


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword options of an LLM, those left out that were not given."""
    chosen = {
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_mixed_tokens": args.max_mixed_tokens,
        "table_granularity": args.granularity,
        "page_size": args.page_size,
        "num_pages": args.num_pages,
        "implementation": args.implementation,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        # Timed prompts are run more than once; a cached prefix would leave nothing to time.
        "enable_prefix_caching": False,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _load(args: argparse.Namespace) -> tuple[str, Any, Any]:
    """(name, model configuration, parameters on the device) of --model or --random-weights."""
    import jax
    import jax.numpy as jnp

    from sparsejax.bench import presets
    from sparsejax.checkpoint import load_model
    from sparsejax.models import init_params

    on_gpu = jax.default_backend() == "gpu"
    if args.model is not None:
        return args.model, *load_model(args.model, dtype=None if on_gpu else "float32")
    config = presets.model_config(args.random_weights)
    return args.random_weights, config, init_params(config, jax.random.key(0), jnp.bfloat16 if on_gpu else jnp.float32)


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses before the measurement what could not be written after it."""
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise InvalidArgumentError(f"--{name} {path} cannot be written: there is no folder {path.parent}.")
    if args.plot is not None:
        from sparsejax.bench import plots

        plots.require_matplotlib()


def _write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report) + "\n", encoding="utf-8")


def shapes(text: str) -> list[tuple[int, int]]:
    """ "1x1024,8x32768" -> [(1, 1024), (8, 32768)]."""
    pairs = [numbers("--shapes", part.replace("x", ",")) for part in text.split(",")]
    for pair in pairs:
        if len(pair) != 2:
            raise InvalidArgumentError(f"--shapes must look like 1x1024,8x32768 (batch x context), got {text!r}.")
    return [(pair[0], pair[1]) for pair in pairs]


def _reaching(config: Any, length: int) -> Any:
    """The model's configuration, its positions stretched if random weights are to be run beyond them."""
    return dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, length))


def run_kernels(args: argparse.Namespace) -> int:
    _check_outputs(args)
    from sparsejax.bench import kernels, plots

    if args.tune:
        kernels.tune(args.tune, args.names or None)
        return 0
    json_path = None if args.json is None else str(args.json)
    rows = kernels.run(args.names or None, json_path, report=lambda line: print(line, flush=True))
    if args.plot is not None:
        plots.plot_fractions({row.name: row.fraction for row in rows}, "kernels, fraction of the ceiling", args.plot)
    return 0


def run_latency(args: argparse.Namespace) -> int:
    _check_outputs(args)
    wanted = shapes(args.shapes)
    if args.steps < 1:
        raise InvalidArgumentError(f"--steps must be at least 1, got {args.steps}.")
    from sparsejax.bench.profile import format_profile, keep_command_buffers
    from sparsejax.engine.memory import reserve_device_memory

    reserve_device_memory(args.gpu_memory_utilization)
    if args.profile is not None:
        keep_command_buffers()
    import jax

    from sparsejax import LLM
    from sparsejax.bench import ceilings, latency, plots
    from sparsejax.engine.build import default_batched_tokens

    ceiling = ceilings.measure()
    print(ceiling, flush=True)
    name, config, params = _load(args)
    chunk = args.max_mixed_tokens or args.max_num_batched_tokens or default_batched_tokens(jax.default_backend())
    rows = []
    for batch, context in wanted:
        # One engine a shape, with tables and batch as large as needed: as somebody serving that shape would set them.
        needed = latency.tokens_needed(context, args.steps, batch=batch, chunk=chunk)
        llm = LLM.from_params(
            config if args.model else _reaching(config, needed),
            params,
            max_num_seqs=args.max_num_seqs or batch,
            max_model_len=args.max_model_len or needed,
            **_engine_options(args),
        )
        folder = Path(args.profile) / f"{batch}x{context}" if args.profile else None
        row = latency.measure(
            llm,
            ceiling,
            batch=batch,
            context=context,
            steps=args.steps,
            profiled=args.profile is not None,
            trace_folder=folder,
        )
        rows.append(row)
        print(latency.format_table([row]), flush=True)
        if row.profile is not None:
            print(f"decode step, batch {batch}, context {context}:\n{format_profile(row.profile)}\n", flush=True)
        del llm
    print(f"\n{name}\n{latency.format_table(rows)}")
    _write_json(args.json, latency.as_dict(rows, ceiling, model=name))
    if args.plot is not None:
        plots.plot_latency(rows, args.plot)
    return 0


def run_throughput(args: argparse.Namespace) -> int:
    _check_outputs(args)
    from sparsejax.bench import traces

    if args.trace in traces.RANDOM:
        trace = traces.generate(
            args.trace,
            requests=args.requests,
            input_len=args.input_len,
            output_len=args.output_len,
            spread=args.spread,
            rate=args.rate,
            seed=args.seed,
        )
    else:
        trace = traces.load(args.trace)
    if args.write_trace is not None:
        traces.write_jsonl(trace, args.write_trace)
        return 0
    from sparsejax.engine.memory import reserve_device_memory

    reserve_device_memory(args.gpu_memory_utilization)
    from sparsejax import LLM
    from sparsejax.bench import plots, throughput

    name, config, params = _load(args)
    llm = LLM.from_params(
        config if args.model else _reaching(config, trace.longest),
        params,
        max_num_seqs=args.max_num_seqs or min(256, len(trace)),
        max_model_len=args.max_model_len or trace.longest,
        warmup=False if args.no_warmup else "greedy",
        **_engine_options(args),
    )
    result = throughput.serve(llm, trace)
    print(throughput.format_report(result))
    _write_json(args.json, throughput.as_dict(result, model=name))
    if args.plot is not None:
        plots.plot_throughput(result, args.plot)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    from sparsejax.bench import compare

    print(compare.format_comparison(compare.compare(args.a, args.b), str(args.a), str(args.b)))
    return 0


def run_checkpoint(args: argparse.Namespace) -> int:
    from sparsejax.bench import checkpoint, presets

    raw = presets.config_dict(args.random_weights)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report = checkpoint.run(raw, Path(folder))
    print(json.dumps(report, indent=2))
    return 0 if report["layouts_agree"] else 1
