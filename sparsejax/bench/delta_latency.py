"""Latency of fixed batches that are stored compressed (DeltaKV), beside their own limit and beside dense requests.

A decode step has to read the weights and the up-projections, all keys and values of the full layers, and in the sparse
layers what a view names: sinks, recent tokens and selected centers as they are, latents with the numbers of their
references, and the references themselves, each once however many latents refer to it:
`bytes / read-only bandwidth` is the limit. What choosing reads beside that is no part of it.

Prompts are computed one cell after the other. One prompt alone is timed with the method and, if asked, dense in the
same engine: their ratio is what reading back and compressing add to a prefill, and what smaller chunks cost. KV bytes
are whole pages of all three pools as a request holds them, over what its tokens take when dense.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.bench.ceilings import Ceilings
from sparsejax.bench.latency import (
    STEP_COLUMNS,
    kv_bytes_per_token,
    prefill_flops,
    run_batch,
    time_prompt,
    tokens_decoded,
    weight_bytes_read,
)
from sparsejax.bench.profile import Profile
from sparsejax.bench.table import Column, format_rows, number, percent
from sparsejax.bench.timing import summary
from sparsejax.cache import DeltaCacheLayout
from sparsejax.engine.llm import LLM
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import DeltaKV

DENSE_FRACTION = 0.3  # of the cache, for the dense prompt of a comparison


@dataclass(frozen=True)
class DeltaLatency:
    """One batch.

    Attributes:
      batch, context: requests at once, and tokens of each prompt.
      method, compression: its name, and all that was asked for.
      full_layers: how many layers keep everything.
      latent: type and size of a latent.
      prompt_seconds: of one prompt alone, until its first token: read back, compressed and all.
      prefill_rate: prompt tokens per second in that time.
      prefill_fraction: of the bf16 matmul rate, counting the model's and attention's products.
      added_share: prompt_seconds over those of the same prompt when dense, less one; None unless compared.
      step_seconds: median wall time of a decode step.
      step_spread: width of the middle half of the step times, as a fraction.
      mean_step_seconds: mean of all timed steps, those behind which rings are compressed among them.
      host_seconds: median time the host needs to plan and dispatch a step.
      bytes_read: what a step must read; see the module's docstring.
      step_fraction: of the limit: bytes_read over the read-only bandwidth, over step_seconds.
      kv_bytes: of a request, whole pages of all pools.
      kv_share: of what its tokens take when dense.
      pool_bytes: device memory of the whole cache.
      dense_step_seconds: of one dense request of the same length, alone; None unless compared.
      dense_step_fraction: of its own limit; None likewise.
      dense_prompt_seconds: None likewise.
      profile: of the decode steps; None if not profiled.
    """

    batch: int
    context: int
    method: str
    compression: str
    full_layers: int
    latent: str
    prompt_seconds: float
    prefill_rate: float
    prefill_fraction: float
    added_share: float | None
    step_seconds: float
    step_spread: float
    mean_step_seconds: float
    host_seconds: float
    bytes_read: float
    step_fraction: float
    kv_bytes: int
    kv_share: float
    pool_bytes: int
    dense_step_seconds: float | None = None
    dense_step_fraction: float | None = None
    dense_prompt_seconds: float | None = None
    profile: Profile | None = None


def measure(
    llm: LLM,
    ceilings: Ceilings,
    compression: CompressionParams,
    *,
    batch: int,
    context: int,
    steps: int,
    repeats: int = 2,
    compare_dense: bool = False,
    seed: int = 0,
    profiled: bool = False,
    trace_folder: Path | None = None,
) -> DeltaLatency:
    """Measures one batch of random tokens.

    Args:
      llm: built for the method; its max_num_seqs must hold the batch, and its max_model_len and pools
        `latency.tokens_needed` for each request.
      steps: timed decode steps.
      repeats: timed prefills of one prompt alone; the median counts. One more before them compiles.
      compare_dense: serve one dense prompt, too, for which the pools have room.
      profiled, trace_folder: as in `latency.measure`.

    Raises:
      InvalidArgumentError: another method, or repeats is not positive.
    """
    runner = llm.engine.runner
    if not compression.compresses or runner.store is None:
        raise InvalidArgumentError(f"method {compression.method!r} stores nothing compressed.")
    if repeats < 1:
        raise InvalidArgumentError(f"repeats must be at least 1, got {repeats}.")
    config, layout = llm.model_config, runner.layout
    assert isinstance(layout, DeltaCacheLayout)
    model = {name: leaf for name, leaf in runner.params.items() if name != "compressor"}
    weights = weight_bytes_read(config, model)
    prompts: list[list[int]] = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, context)).tolist()
    limits = llm.engine.scheduler.config.store
    assert limits is not None

    def together(prompts: list[list[int]], asked: CompressionParams | None, **options: Any):
        num_tokens = tokens_decoded(steps, batch=len(prompts), context=context, chunk=limits.cell)
        return run_batch(llm, prompts, num_tokens=num_tokens, steps=steps, compression=asked, **options)

    prompt_seconds = time_prompt(llm, prompts[0], compression, repeats=repeats)
    runner.warm_up_rings()
    run = together(prompts, compression, profiled=profiled, trace_folder=trace_folder)
    length = run.tokens // batch
    bytes_read = weights + _up_bytes(runner.params) + batch * _view_bytes(llm, compression, length)
    step = summary(run.steps)
    kv_bytes = layout.bytes_of(limits.held(length, compressed=True))
    dense: dict[str, Any] = {}
    if compare_dense:
        dense_run = together(prompts[:1], None)
        dense_step = summary(dense_run.steps).median
        dense_bytes = weights + dense_run.tokens * kv_bytes_per_token(llm)
        dense = {
            "dense_step_seconds": dense_step,
            "dense_step_fraction": dense_bytes / ceilings.read / dense_step,
            "dense_prompt_seconds": time_prompt(llm, prompts[0], None, repeats=repeats),
        }
    return DeltaLatency(
        batch=batch,
        context=context,
        method=compression.method,
        compression=str(compression),
        full_layers=len(layout.full_layers),
        latent=f"{layout.latent_dtype} x {layout.latent.head_dim}",
        prompt_seconds=prompt_seconds,
        prefill_rate=context / prompt_seconds,
        prefill_fraction=prefill_flops(config, model, context) / prompt_seconds / ceilings.matmul,
        added_share=prompt_seconds / dense["dense_prompt_seconds"] - 1 if dense else None,
        step_seconds=step.median,
        step_spread=step.spread,
        mean_step_seconds=statistics.fmean(run.steps),
        host_seconds=summary(run.host).median,
        bytes_read=bytes_read,
        step_fraction=bytes_read / ceilings.read / step.median,
        kv_bytes=kv_bytes,
        kv_share=kv_bytes / (length * kv_bytes_per_token(llm)),
        pool_bytes=layout.bytes(),
        profile=run.profile,
        **dense,
    )


def _up_bytes(params: Any) -> int:
    """Bytes of the up-projections of the sparse layers."""
    return sum(x.nbytes for layer in params["compressor"].values() for x in jax.tree.leaves(layer["up"]))


def _view_bytes(llm: LLM, compression: CompressionParams, length: int) -> float:
    """Bytes that a decode step reads of one request's cache, as if centers were selected as often as other tokens."""
    layout, spec, method = llm.engine.runner.layout, llm.engine.runner.store, compression.policy
    assert isinstance(layout, DeltaCacheLayout)
    assert spec is not None
    assert isinstance(method, DeltaKV)
    geometry, layers = spec.geometry, layout.near.num_layers
    exact = 2 * layout.full.num_kv_heads * layout.full.head_dim * np.dtype(layout.dtype).itemsize
    latent = layout.entry_bytes.latent / layout.latent.pages_per_entry / layout.page_size  # references included
    history = geometry.history_at_query(length)
    sinks, recent = min(history, geometry.sinks), length - history
    selected = method.wanted(history - sinks)
    latents = selected * (1 - 1 / geometry.step)
    centers = geometry.centers(length)
    references = min(latents * spec.compressor.neighbors + selected / geometry.step, centers)
    near = (sinks + recent + references) * exact
    return length * exact * len(layout.full_layers) + layers * (near + latents * latent)


COLUMNS: list[Column] = [
    ("batch", lambda row: str(row.batch)),
    ("context", lambda row: str(row.context)),
    ("latent", lambda row: row.latent),
    ("prompt s", lambda row: number(row.prompt_seconds, 2)),
    ("tok/s", lambda row: number(row.prefill_rate, 0)),
    ("of matmul", lambda row: number(row.prefill_fraction, 3)),
    ("added", lambda row: percent(row.added_share)),
    *STEP_COLUMNS,
    ("limit ms", lambda row: number(row.step_fraction * row.step_seconds, 2, times=1e3)),
    ("mean ms", lambda row: number(row.mean_step_seconds, 2, times=1e3)),
    ("KV GiB", lambda row: number(row.kv_bytes, 2, times=2**-30)),
    ("of dense", lambda row: number(row.kv_share, 3)),
    ("dense ms", lambda row: number(row.dense_step_seconds, 2, times=1e3)),
    ("of limit", lambda row: number(row.dense_step_fraction, 3)),
    ("dense prompt s", lambda row: number(row.dense_prompt_seconds, 2)),
]


def format_table(rows: Sequence[DeltaLatency]) -> str:
    """A line per batch; "-" where there was no comparison with dense requests."""
    return format_rows(COLUMNS, rows)
