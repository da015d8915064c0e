"""The benchmark of methods that select: batches whose decoding reads a part of what is kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsejax.cli.bench_options import engine_options, load, reaching, write_json
from sparsejax.errors import InvalidArgumentError

if TYPE_CHECKING:
    from sparsejax.engine.sampling_params import CompressionParams


def run_latency(args: argparse.Namespace, wanted: list[tuple[int, int]], asked: Sequence[CompressionParams]) -> int:
    """`sparsejax bench latency` with methods that select."""
    if args.compare_dense:
        raise InvalidArgumentError("--compare-dense takes no N with a method that selects: it reads the same prompts.")
    from sparsejax.bench.profile import format_profile, keep_command_buffers
    from sparsejax.engine.memory import reserve_device_memory

    reserve_device_memory(args.gpu_memory_utilization)
    if args.profile is not None:
        keep_command_buffers()
    import jax

    from sparsejax import LLM
    from sparsejax.bench import ceilings, latency, plots, selection_latency
    from sparsejax.engine.build import default_batched_tokens

    ceiling = ceilings.measure()
    print(ceiling, flush=True)
    name, config, params = load(args)
    chunk = args.max_mixed_tokens or args.max_num_batched_tokens or default_batched_tokens(jax.default_backend())
    rows = []
    for batch, context in wanted:
        needed = latency.tokens_needed(context, args.steps, batch=batch, chunk=chunk)
        for compression in asked:
            llm = LLM.from_params(
                config if args.model else reaching(config, needed),
                params,
                max_num_seqs=args.max_num_seqs or batch,
                max_model_len=args.max_model_len or needed,
                methods=("full", compression.method),
                **engine_options(args, config, params),
            )
            row = selection_latency.measure(
                llm,
                ceiling,
                compression,
                batch=batch,
                context=context,
                steps=args.steps,
                compare_dense=args.compare_dense is not None,
                profiled=args.profile is not None,
                trace_folder=Path(args.profile) / f"{batch}x{context}-{compression.method}" if args.profile else None,
            )
            rows.append(row)
            print(selection_latency.format_table([row]), flush=True)
            if row.profile is not None:
                print(f"decode step, batch {batch}, context {context}:\n{format_profile(row.profile)}\n", flush=True)
            llm.engine.close()
            # What was measured so far is kept, whatever becomes of the rest.
            write_json(args.json, latency.as_dict(rows, ceiling, model=name))
    print(f"\n{name}\n{selection_latency.format_table(rows)}")
    if args.plot is not None:
        labels = {f"{row.method} {row.batch} x {row.context}": row.step_fraction for row in rows}
        plots.plot_fractions(labels, "decode steps that select, fraction of the limit", args.plot)
    return 0
