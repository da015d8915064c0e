"""Latency of fixed batches whose decoding reads a part of what is kept, beside its own limit and beside dense decoding.

A step has to read the weights, everything in the layers that read all, and in the others what they select:
`(weights + KV bytes read) / read-only bandwidth` is its limit. What choosing reads beside that (logits, bounds of
pages) is not part of the limit but for the bounds, which stand for keys. Nothing is saved of the memory, and prompts
are computed with dense attention. The dense step runs in the same engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.bench.ceilings import Ceilings
from sparsejax.bench.latency import (
    STEP_COLUMNS,
    BatchRun,
    kv_bytes_per_token,
    run_batch,
    tokens_decoded,
    weight_bytes_read,
)
from sparsejax.bench.profile import Profile
from sparsejax.bench.table import Column, format_rows, number
from sparsejax.bench.timing import summary
from sparsejax.cache import CacheLayout
from sparsejax.engine.llm import LLM
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.errors import InvalidArgumentError


@dataclass(frozen=True)
class DenseStep:
    """A decode step of the same prompts that reads everything.

    Attributes:
      step_seconds: median wall time.
      step_fraction: of its limit.
      bytes_read: weights and K/V that it must read.
    """

    step_seconds: float
    step_fraction: float
    bytes_read: float


@dataclass(frozen=True)
class SelectionLatency:
    """One batch.

    Attributes:
      batch, context: requests at once, and tokens of each prompt.
      method: its name.
      compression: all that was asked for.
      step_seconds: median wall time of a decode step.
      step_spread: width of the middle half of the step times, as a fraction.
      host_seconds: median time the host needs to plan and dispatch a step.
      read_tokens: that a step reads of each request, mean over the layers.
      bytes_read: weights and K/V (and bounds of pages) that a step must read.
      step_fraction: of the limit: bytes_read over the read-only bandwidth, over step_seconds.
      relative: step_seconds over those of dense decoding; None unless compared.
      relative_limit: bytes_read over those of dense decoding; None likewise.
      dense: None unless compared.
      profile: of the decode steps; None if not profiled.
    """

    batch: int
    context: int
    method: str
    compression: str
    step_seconds: float
    step_spread: float
    host_seconds: float
    read_tokens: float
    bytes_read: float
    step_fraction: float
    relative: float | None
    relative_limit: float | None
    dense: DenseStep | None
    profile: Profile | None = None


def measure(
    llm: LLM,
    ceilings: Ceilings,
    compression: CompressionParams,
    *,
    batch: int,
    context: int,
    steps: int,
    compare_dense: bool = False,
    seed: int = 0,
    profiled: bool = False,
    trace_folder: Path | None = None,
) -> SelectionLatency:
    """Measures one batch of random tokens.

    Args:
      llm: built for the method; its max_num_seqs must hold the batch, and its max_model_len and pool
        `latency.tokens_needed` for each request.
      steps: timed decode steps.
      compare_dense: measure dense decoding too.
      profiled, trace_folder: as in `latency.measure`.

    Raises:
      InvalidArgumentError: the method does not select.
    """
    selections = llm.engine.runner.selections
    if not compression.selects or selections is None:
        raise InvalidArgumentError(f"method {compression.method!r} reads everything that it keeps.")
    config, weights = llm.model_config, weight_bytes_read(llm.model_config, llm.engine.runner.params)
    prompts = np.random.default_rng(seed).integers(0, config.vocab_size, (batch, context)).tolist()
    chunk = llm.engine.scheduler.config.max_mixed_tokens
    num_tokens = tokens_decoded(steps, batch=batch, context=context, chunk=chunk)

    def run(asked: CompressionParams | None, **options: Any) -> BatchRun:
        return run_batch(llm, prompts, num_tokens=num_tokens, steps=steps, compression=asked, **options)

    selected = run(compression, profiled=profiled, trace_folder=trace_folder)
    length = selected.tokens // batch
    read = float(selections.read_tokens(compression, np.asarray([length], np.int32))[0])
    bytes_read = weights + batch * (read * kv_bytes_per_token(llm) + _bounds_bytes(llm, compression, length))
    dense = None
    if compare_dense:
        dense_run = run(None)
        dense_bytes, dense_step = weights + dense_run.tokens * kv_bytes_per_token(llm), summary(dense_run.steps).median
        dense = DenseStep(dense_step, dense_bytes / ceilings.read / dense_step, dense_bytes)
    step = summary(selected.steps)
    return SelectionLatency(
        batch=batch,
        context=context,
        method=compression.method,
        compression=str(compression),
        step_seconds=step.median,
        step_spread=step.spread,
        host_seconds=summary(selected.host).median,
        read_tokens=read,
        bytes_read=bytes_read,
        step_fraction=bytes_read / ceilings.read / step.median,
        relative=None if dense is None else step.median / dense.step_seconds,
        relative_limit=None if dense is None else bytes_read / dense.bytes_read,
        dense=dense,
        profile=selected.profile,
    )


def _bounds_bytes(llm: LLM, compression: CompressionParams, length: int) -> int:
    """Bytes of the bounds that a step reads of a request with so many tokens."""
    selections, layout = llm.engine.runner.selections, llm.engine.runner.layout
    assert selections is not None
    assert isinstance(layout, CacheLayout)
    layers = selections.roles_of(compression).roles.count("pages")
    page = 2 * layout.head_dim * np.dtype(layout.dtype).itemsize
    return layers * layout.num_kv_heads * layout.pages_for(length) * page


COLUMNS: list[Column] = [
    ("method", lambda row: row.method),
    ("batch", lambda row: str(row.batch)),
    ("context", lambda row: str(row.context)),
    ("read", lambda row: number(row.read_tokens, 0)),
    *STEP_COLUMNS,
    ("dense ms", lambda row: row.dense and number(row.dense.step_seconds, 2, times=1e3)),
    ("of limit", lambda row: row.dense and number(row.dense.step_fraction, 3)),
    ("of dense", lambda row: number(row.relative, 3)),
    ("limit of that", lambda row: number(row.relative_limit, 3)),
]


def format_table(rows: Sequence[SelectionLatency]) -> str:
    """A line per batch; "-" where there was no comparison with dense decoding."""
    return format_rows(COLUMNS, rows)
