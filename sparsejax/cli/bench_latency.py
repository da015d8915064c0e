"""`sparsejax bench latency`: batches of one shape, dense or under a sparse method, beside their physical limit.

Methods of one family are measured alike. A `Family` says what differs from the next: what its engine is built with,
how a batch is measured, and how its table and figure are made. One loop over shapes and methods serves all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsejax.cli.bench_options import (
    add_delta_options,
    add_model,
    add_outputs,
    check_delta_options,
    check_model,
    delta_engine_options,
    engine_options,
    given,
    load,
    reaching,
    shapes,
    write_json,
)
from sparsejax.cli.compression_options import add_compression_options, compression_from
from sparsejax.cli.outputs import check_outputs
from sparsejax.errors import InvalidArgumentError
from sparsejax.folders import check_can_make

if TYPE_CHECKING:
    from sparsejax.engine.requests.compression_params import CompressionParams

PREFILLS = 2  # timed of one prompt


def add_parser(suites: Any) -> None:
    latency = suites.add_parser(
        "latency",
        help="prefill and decode times of fixed batches",
        description="Measures the card's ceilings, then for every batch and context: prefill tokens/s, milliseconds a "
        "decode step, host time a step, and the fraction of the physical limit (weights + KV bytes over bandwidth). "
        "With --method, prompts are compressed: the limit counts what is left of them. It may name several of one "
        "family, with commas between them.",
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
    group = latency.add_argument_group("compressed prompts, or a part of them read")
    group.add_argument(
        "--compare-dense",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="measure dense decoding too, behind prompts of N tokens (default: as long as the compressed ones)",
    )
    group.add_argument(
        "--prefills",
        type=int,
        metavar="N",
        help=f"timed prefills of one prompt, for methods that evict or store compressed (default: {PREFILLS})",
    )
    add_delta_options(latency)
    add_compression_options(latency)
    add_outputs(latency)
    add_model(
        latency,
        max_num_seqs="each shape's batch",
        num_pages="dense: what the batch needs; else: what fits",
    )
    latency.set_defaults(run=run)


@dataclass(frozen=True)
class Family:
    """How batches under methods of one family are measured.

    Attributes:
      measure: (llm, ceilings, compression, shape and steps, profiler's options) -> a row of figures.
      table: rows -> text.
      plot: (rows, path): draws them.
      needed: (batch, context, chunk) -> the max_model_len that it takes.
      engine: keyword options of the LLM beside those of every benchmark.
      methods: that the LLM is built for, beside the one that is measured.
      sized: the pool is just as large as the batch needs, unless the command line says otherwise.
    """

    measure: Callable[..., Any]
    table: Callable[[Sequence[Any]], str]
    plot: Callable[[Sequence[Any], Path], None]
    needed: Callable[[int, int, int], int]
    engine: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ("full",)
    sized: bool = False


def run(args: argparse.Namespace) -> int:
    check_outputs(args)
    wanted = shapes(args.shapes)
    if args.steps < 1:
        raise InvalidArgumentError(f"--steps must be at least 1, got {args.steps}.")
    asked = [compression_from(args, method=name) for name in args.method.split(",")]
    check_delta_options(args)
    check_model(args)
    kinds = {compression.policy.family for compression in asked}
    if len(kinds) > 1:
        raise InvalidArgumentError(
            f"--method names methods of different families ({', '.join(sorted(kinds))}): measure them apart."
        )
    (kind,) = kinds
    _check(args, kind)
    if args.profile:
        check_can_make(Path(args.profile), name="--profile")
    from sparsejax.bench.profile import format_profile, keep_command_buffers
    from sparsejax.engine.execution.memory import reserve_device_memory

    reserve_device_memory(args.gpu_memory_utilization)
    if args.profile is not None:
        keep_command_buffers()
    import jax

    from sparsejax import LLM
    from sparsejax.bench import ceilings, latency
    from sparsejax.engine.build import default_batched_tokens

    family = {"full": _dense, "evict": _evicting, "select": _selecting, "store": _storing}[kind](args)
    if kind == "evict":
        from sparsejax.bench import compressed_latency

        for compression in asked:
            for _, context in wanted:
                compressed_latency.check(compression, context)
    ceiling = ceilings.measure()
    print(ceiling, flush=True)
    name, config, params = load(args)
    chunk = args.max_mixed_tokens or args.max_num_batched_tokens or default_batched_tokens(jax.default_backend())
    options = engine_options(args, config, params) | delta_engine_options(args, config, params) | family.engine
    rows = []
    for batch, context in wanted:
        # One engine a shape, with tables and batch as large as needed: as somebody serving that shape would set them.
        needed = family.needed(batch, context, chunk)
        pages = config.num_layers * config.num_kv_heads * -(-needed // options["page_size"])
        # Pages for that shape and no more: to see what fits, large steps would be compiled that are never run.
        sizes = {"num_pages": (batch + 1) * pages} if family.sized else {}
        for compression in asked:
            llm = LLM.from_params(
                config if args.model else reaching(config, needed),
                params,
                max_num_seqs=given(args.max_num_seqs, batch),
                max_model_len=given(args.max_model_len, needed),
                methods=tuple(dict.fromkeys((*family.methods, compression.method))),
                **(sizes | options),
            )
            label = f"{batch}x{context}" + ("" if kind == "full" else f"-{compression.method}")
            profiler = {"profiled": True, "trace_folder": Path(args.profile) / label if args.profile else None}
            row = family.measure(
                llm,
                ceiling,
                compression,
                {"batch": batch, "context": context, "steps": args.steps},
                {} if args.profile is None else profiler,
            )
            rows.append(row)
            print(family.table([row]), flush=True)
            if args.profile is not None:
                print(f"decode step, batch {batch}, context {context}:\n{format_profile(row.profile)}\n", flush=True)
            llm.engine.close()
            # What was measured so far is kept, whatever becomes of the rest.
            write_json(args.json, latency.as_dict(rows, ceiling, model=name))
    print(f"\n{name}\n{family.table(rows)}")
    if args.plot is not None:
        family.plot(rows, args.plot)
    return 0


def _check(args: argparse.Namespace, kind: str) -> None:
    """Refuses options that have no meaning for methods of a family."""
    if args.prefills is not None and kind not in ("evict", "store"):
        raise InvalidArgumentError("--prefills is for a --method that evicts or stores compressed.")
    if args.prefills is not None and args.prefills < 1:
        raise InvalidArgumentError(f"--prefills must be at least 1, got {args.prefills}.")
    if kind == "full" and args.compare_dense is not None:
        raise InvalidArgumentError("--compare-dense compares a --method with dense decoding: give one.")
    if args.max_num_seqs is not None and 0 < args.max_num_seqs < max(batch for batch, _ in shapes(args.shapes)):
        raise InvalidArgumentError(f"--max-num-seqs must be at least the batch of --shapes, got {args.max_num_seqs}.")
    if args.compare_dense is not None and args.compare_dense < 0:
        raise InvalidArgumentError(f"--compare-dense must be at least 1 token, got {args.compare_dense}.")
    if kind in ("select", "store") and args.compare_dense:
        raise InvalidArgumentError(
            "--compare-dense takes no N with methods that select or store compressed: it serves the same prompts."
        )


def _dense(args: argparse.Namespace) -> Family:
    from sparsejax.bench import latency, plots

    def measure(llm, ceiling, compression: CompressionParams, shape, profiler):
        del compression
        return latency.measure(llm, ceiling, **shape, **profiler)

    def needed(batch: int, context: int, chunk: int) -> int:
        return latency.tokens_needed(context, args.steps, batch=batch, chunk=chunk)

    return Family(
        measure=measure,
        table=latency.format_table,
        plot=plots.plot_latency,
        needed=needed,
        sized=True,
    )


def _evicting(args: argparse.Namespace) -> Family:
    from sparsejax.bench import compressed_latency, plots

    def dense_context(context: int) -> int | None:
        return None if args.compare_dense is None else args.compare_dense or context

    def measure(llm, ceiling, compression: CompressionParams, shape, profiler):
        dense = dense_context(shape["context"])
        return compressed_latency.measure(
            llm, ceiling, compression, **shape, dense_context=dense, repeats=args.prefills or PREFILLS, **profiler
        )

    def needed(batch: int, context: int, chunk: int) -> int:
        return compressed_latency.model_length(
            context, args.steps, batch=batch, chunk=chunk, dense_context=dense_context(context)
        )

    return Family(
        measure=measure,
        table=compressed_latency.format_table,
        plot=plots.plot_compressed_latency,
        needed=needed,
        methods=(),
    )


def _selecting(args: argparse.Namespace) -> Family:
    from sparsejax.bench import latency, plots, selection_latency

    def measure(llm, ceiling, compression: CompressionParams, shape, profiler):
        compare = args.compare_dense is not None
        return selection_latency.measure(llm, ceiling, compression, **shape, compare_dense=compare, **profiler)

    def plot(rows, path: Path) -> None:
        labels = {f"{row.method} {row.batch} x {row.context}": row.step_fraction for row in rows}
        plots.plot_fractions(labels, "decode steps that select, fraction of the limit", path)

    def needed(batch: int, context: int, chunk: int) -> int:
        return latency.tokens_needed(context, args.steps, batch=batch, chunk=chunk)

    return Family(
        measure=measure,
        table=selection_latency.format_table,
        plot=plot,
        needed=needed,
    )


def _storing(args: argparse.Namespace) -> Family:
    from sparsejax.bench import delta_latency, latency, plots

    compare = args.compare_dense is not None

    def measure(llm, ceiling, compression: CompressionParams, shape, profiler):
        return delta_latency.measure(
            llm, ceiling, compression, **shape, repeats=args.prefills or PREFILLS, compare_dense=compare, **profiler
        )

    def plot(rows, path: Path) -> None:
        labels = {f"deltakv {row.batch} x {row.context}": row.step_fraction for row in rows}
        plots.plot_fractions(labels, "decode steps of compressed requests, fraction of the limit", path)

    def needed(batch: int, context: int, chunk: int) -> int:
        # Prompts are computed cell by cell, each at most half a step.
        return latency.tokens_needed(context, args.steps, batch=batch, chunk=max(chunk // 2, 1))

    return Family(
        measure=measure,
        table=delta_latency.format_table,
        plot=plot,
        needed=needed,
        engine={"dense_cache_fraction": delta_latency.DENSE_FRACTION if compare else 0.0},
    )
