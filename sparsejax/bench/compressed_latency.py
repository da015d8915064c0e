"""Latency of fixed batches whose prompts are compressed, beside its own limit and, if asked, beside dense decoding.

What is measured, with random weights and tokens:

* One prompt alone, from its first chunk to its first token: with the method, recording and compression included, and
  dense. Their ratio is what compressing a prompt adds to its prefill.
* The compression itself: what the host waits for it behind the model's last chunk, as the device runs one after the
  other. The median over the prompts.
* A decode step of all prompts after compression. It has to read the weights and what is left of K and V, as counted in
  the slot tables while it ran: `(weights + kept KV bytes) / read-only bandwidth` is its limit.

Every row of the batch is prefilled once for itself; nothing is forked. The dense step runs in the same engine, over
tables of each head.
"""

from __future__ import annotations

import statistics
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
    prefill_flops,
    run_batch,
    time_prompt,
    tokens_decoded,
    tokens_needed,
    weight_bytes_read,
)
from sparsejax.bench.profile import Profile
from sparsejax.bench.table import Column, format_rows, number, percent
from sparsejax.bench.timing import summary
from sparsejax.engine.llm import LLM
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.errors import InvalidArgumentError


@dataclass(frozen=True)
class DenseLatency:
    """The same without compression.

    Attributes:
      context: tokens of each prompt whose decode steps are timed.
      prompt_seconds: of one prompt, as long as the compressed ones, alone, until its first token.
      step_seconds: median wall time of a decode step.
      step_fraction: of its limit.
      bytes_read: weights and K/V that a step must read.
    """

    context: int
    prompt_seconds: float
    step_seconds: float
    step_fraction: float
    bytes_read: int


@dataclass(frozen=True)
class CompressedLatency:
    """One batch of compressed prompts.

    Attributes:
      batch, context: requests at once, and tokens of each prompt.
      method: its name.
      compression: all that was asked for.
      prompt_seconds: of one prompt alone, until its first token: recording, compression and all.
      prefill_rate: prompt tokens per second in that time.
      prefill_fraction: of the bf16 matmul rate, counting the model's and attention's products.
      compress_seconds: of the compression of one prompt, median over the batch.
      compress_share: of prompt_seconds less compress_seconds.
      added_share: prompt_seconds over the dense prompt_seconds, less one; None unless compared.
      step_seconds: median wall time of a decode step.
      step_spread: width of the middle half of the step times, as a fraction.
      host_seconds: median time the host needs to plan and dispatch a step.
      kept_tokens: of each request, mean over layers and heads, while the steps ran.
      kept_bytes: K and V that all requests held then.
      bytes_read: weights and kept_bytes.
      step_fraction: of the limit: bytes_read over the read-only bandwidth, over step_seconds.
      speedup: the dense step_seconds over these; None unless compared.
      dense: None unless compared.
      profile: of the decode steps, what they evict included; None if not profiled.
    """

    batch: int
    context: int
    method: str
    compression: str
    prompt_seconds: float
    prefill_rate: float
    prefill_fraction: float
    compress_seconds: float
    compress_share: float
    added_share: float | None
    step_seconds: float
    step_spread: float
    host_seconds: float
    kept_tokens: float
    kept_bytes: float
    bytes_read: float
    step_fraction: float
    speedup: float | None
    dense: DenseLatency | None
    profile: Profile | None = None


def model_length(context: int, steps: int, *, batch: int, chunk: int, dense_context: int | None) -> int:
    """The max_model_len that `measure` needs. chunk: the engine's max_mixed_tokens."""
    return tokens_needed(max(context, dense_context or 0), steps, batch=batch, chunk=chunk)


def check(compression: CompressionParams, context: int) -> None:
    """Raises InvalidArgumentError if nothing of prompts of `context` tokens is evicted."""
    if not compression.evicts or compression.budget(context) >= context:
        raise InvalidArgumentError(
            f"method {compression.method!r} evicts nothing of prompts of {context} tokens: give a budget below that."
        )


def measure(
    llm: LLM,
    ceilings: Ceilings,
    compression: CompressionParams,
    *,
    batch: int,
    context: int,
    steps: int,
    dense_context: int | None = None,
    repeats: int = 2,
    seed: int = 0,
    profiled: bool = False,
    trace_folder: Path | None = None,
) -> CompressedLatency:
    """Measures one batch.

    Args:
      llm: built for the method; its max_num_seqs must hold the batch, its max_model_len reach `model_length`.
      steps: timed decode steps.
      dense_context: compare with dense decoding behind prompts of so many tokens; None: do not.
      repeats: timed prefills of one prompt alone; the median counts. One more before them compiles.
      profiled, trace_folder: as in `latency.measure`.

    Raises:
      InvalidArgumentError: the method evicts nothing of such prompts, or repeats is not positive.
    """
    check(compression, context)
    if repeats < 1:
        raise InvalidArgumentError(f"repeats must be at least 1, got {repeats}.")
    config, params = llm.model_config, llm.engine.runner.params
    rng = np.random.default_rng(seed)
    prompts: list[list[int]] = rng.integers(0, config.vocab_size, (batch, context)).tolist()
    chunk = llm.engine.scheduler.config.max_mixed_tokens
    weights = weight_bytes_read(config, params)

    def together(prompts: list[list[int]], asked: CompressionParams | None, **options: Any) -> BatchRun:
        num_tokens = tokens_decoded(steps, batch=batch, context=len(prompts[0]), chunk=chunk)
        return run_batch(llm, prompts, num_tokens=num_tokens, steps=steps, compression=asked, **options)

    prompt_seconds = time_prompt(llm, prompts[0], compression, repeats=repeats)
    run = together(prompts, compression, profiled=profiled, trace_folder=trace_folder)
    assert run.live is not None, "something was evicted"
    dense = None
    if dense_context is not None:
        dense_run = together(rng.integers(0, config.vocab_size, (batch, dense_context)).tolist(), None)
        dense_bytes = weights + dense_run.tokens * kv_bytes_per_token(llm)
        dense_step = summary(dense_run.steps).median
        dense = DenseLatency(
            context=dense_context,
            prompt_seconds=time_prompt(llm, prompts[0], None, repeats=repeats),
            step_seconds=dense_step,
            step_fraction=dense_bytes / ceilings.read / dense_step,
            bytes_read=dense_bytes,
        )
    step = summary(run.steps)
    tables = config.num_layers * config.num_kv_heads
    kept_bytes = run.live / tables * kv_bytes_per_token(llm)
    compress_seconds = statistics.median(run.compressions)
    return CompressedLatency(
        batch=batch,
        context=context,
        method=compression.method,
        compression=str(compression),
        prompt_seconds=prompt_seconds,
        prefill_rate=context / prompt_seconds,
        prefill_fraction=prefill_flops(config, params, context) / prompt_seconds / ceilings.matmul,
        compress_seconds=compress_seconds,
        compress_share=compress_seconds / max(prompt_seconds - compress_seconds, 1e-9),
        added_share=None if dense is None else prompt_seconds / dense.prompt_seconds - 1,
        step_seconds=step.median,
        step_spread=step.spread,
        host_seconds=summary(run.host).median,
        kept_tokens=run.live / tables / batch,
        kept_bytes=kept_bytes,
        bytes_read=weights + kept_bytes,
        step_fraction=(weights + kept_bytes) / ceilings.read / step.median,
        speedup=None if dense is None else dense.step_seconds / step.median,
        dense=dense,
        profile=run.profile,
    )


COLUMNS: list[Column] = [
    ("method", lambda row: row.method),
    ("batch", lambda row: str(row.batch)),
    ("context", lambda row: str(row.context)),
    ("kept", lambda row: number(row.kept_tokens, 0)),
    ("prompt s", lambda row: number(row.prompt_seconds, 3)),
    ("compress s", lambda row: number(row.compress_seconds, 4)),
    ("share", lambda row: percent(row.compress_share, 2)),
    ("added", lambda row: percent(row.added_share)),
    *STEP_COLUMNS,
    ("dense ms", lambda row: row.dense and number(row.dense.step_seconds, 2, times=1e3)),
    ("of limit", lambda row: row.dense and number(row.dense.step_fraction, 3)),
    ("speedup", lambda row: number(row.speedup, 2)),
]


def format_table(rows: Sequence[CompressedLatency]) -> str:
    """A line per batch; "-" where there was no comparison with dense decoding."""
    return format_rows(COLUMNS, rows)
