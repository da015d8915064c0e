"""The benchmark of requests that are stored compressed (method deltakv)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparsejax.cli.bench_options import engine_options, load, reaching, write_json
from sparsejax.cli.compression_options import compression_from
from sparsejax.cli.options import add_store_options, store_options
from sparsejax.errors import InvalidArgumentError

SIZES = ("kv_compressed_size", "neighbors", "cluster_ratio")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `sparsejax bench latency` for method deltakv."""
    group = parser.add_argument_group("method deltakv", "Without --compressor, one with random weights is made.")
    add_store_options(group)
    group.add_argument("--kv-compressed-size", type=int, metavar="N", help="numbers of a latent (default: 512)")
    group.add_argument("--neighbors", type=int, metavar="N", help="references of a latent (default: 4)")
    group.add_argument("--cluster-ratio", type=float, metavar="F", help="share of centers (default: 0.1)")


def run_latency(args: argparse.Namespace, wanted: list[tuple[int, int]]) -> int:
    """`sparsejax bench latency --method deltakv`."""
    if args.compare_dense:
        raise InvalidArgumentError("--compare-dense takes no N with method deltakv: it serves one of the same prompts.")
    compression = compression_from(args)
    from sparsejax.bench.profile import format_profile, keep_command_buffers
    from sparsejax.engine.memory import reserve_device_memory

    reserve_device_memory(args.gpu_memory_utilization)
    if args.profile is not None:
        keep_command_buffers()
    import jax

    from sparsejax import LLM
    from sparsejax.bench import ceilings, delta_latency, latency, plots
    from sparsejax.engine.build import default_batched_tokens

    ceiling = ceilings.measure()
    print(ceiling, flush=True)
    name, config, params = load(args)
    compressor = args.compressor or _random_compressor(args, config, params)
    chunk = args.max_mixed_tokens or args.max_num_batched_tokens or default_batched_tokens(jax.default_backend())
    compare = args.compare_dense is not None
    rows = []
    for batch, context in wanted:
        # Prompts are computed cell by cell, each at most half a step.
        needed = latency.tokens_needed(context, args.steps, batch=batch, chunk=max(chunk // 2, 1))
        llm = LLM.from_params(
            config if args.model else reaching(config, needed),
            params,
            max_num_seqs=args.max_num_seqs or batch,
            max_model_len=args.max_model_len or needed,
            methods=("full", "deltakv"),
            dense_cache_fraction=delta_latency.DENSE_FRACTION if compare else 0.0,
            **engine_options(args, config, params),
            **(store_options(args) | {"compressor": compressor}),
        )
        row = delta_latency.measure(
            llm,
            ceiling,
            compression,
            batch=batch,
            context=context,
            steps=args.steps,
            repeats=args.prefills,
            compare_dense=compare,
            profiled=args.profile is not None,
            trace_folder=Path(args.profile) / f"{batch}x{context}-deltakv" if args.profile else None,
        )
        rows.append(row)
        print(delta_latency.format_table([row]), flush=True)
        if row.profile is not None:
            print(f"decode step, batch {batch}, context {context}:\n{format_profile(row.profile)}\n", flush=True)
        llm.engine.close()
        # What was measured so far is kept, whatever becomes of the rest.
        write_json(args.json, latency.as_dict(rows, ceiling, model=name))
    print(f"\n{name}\n{delta_latency.format_table(rows)}")
    if args.plot is not None:
        labels = {f"deltakv {row.batch} x {row.context}": row.step_fraction for row in rows}
        plots.plot_fractions(labels, "decode steps of compressed requests, fraction of the limit", args.plot)
    return 0


def _random_compressor(args: argparse.Namespace, config: Any, params: Any) -> tuple[Any, Any]:
    """A linear compressor of the sizes that were asked for, as training starts from."""
    import jax

    from sparsejax.compressor import CompressorConfig, init_params
    from sparsejax.compressor.config import kv_dim_of

    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    compressor = CompressorConfig(
        num_layers=config.num_layers, kv_dim=kv_dim_of(config), **dict[str, Any]({"kv_compressed_size": 512} | sizes)
    )
    weights = init_params(compressor, jax.random.key(1))
    return compressor, jax.tree.map(lambda x: x.astype(params["embed"].dtype), weights)
