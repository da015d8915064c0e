"""Latency of fixed batches on a model with random weights: time to first token, and milliseconds a decode step.

Every figure stands beside its physical limit: a decode step cannot be faster than reading the weights and the K/V once,
a prefill not faster than its matrix products.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.bench.ceilings import Ceilings
from sparsejax.bench.profile import Profile, profile
from sparsejax.bench.table import Column, format_rows, number, percent
from sparsejax.bench.timing import summary
from sparsejax.cache import row_usage
from sparsejax.engine.execution.memory import tree_bytes
from sparsejax.engine.llm import LLM
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.requests.submission import Answer
from sparsejax.engine.scheduling.buckets import prompt_room
from sparsejax.models import ModelConfig

WARMUP_STEPS = 6  # decode steps before the clock starts
PROFILED_STEPS = 10  # decode steps under the profiler, after those that are timed

STEP_COLUMNS: list[Column] = [
    ("step ms", lambda row: number(row.step_seconds, 2, times=1e3)),
    ("spread", lambda row: number(row.step_spread, 3)),
    ("host ms", lambda row: number(row.host_seconds, 2, times=1e3)),
    ("of limit", lambda row: number(row.step_fraction, 3)),
]
"""What every benchmark of latency tells of its decode steps."""


@dataclass(frozen=True)
class Latency:
    """One batch.

    Attributes:
      batch: requests at once, all with a prompt of `context` tokens.
      context: tokens of each prompt.
      prefill_seconds: from the first chunk to the last prompt's first token.
      prefill_rate: prompt tokens per second.
      prefill_fraction: of the bf16 matmul rate, counting the model's and attention's products.
      step_seconds: median wall time of a decode step.
      step_spread: width of the middle half of the step times, as a fraction.
      host_seconds: median time the host needs to plan and dispatch a step.
      bytes_read: weights and K/V that a step must read.
      step_fraction: of the limit: bytes_read over the read-only bandwidth, over step_seconds.
      weight_bytes, cache_bytes, state_bytes: device memory of the parameters, of the KV cache (pool, tables, free list)
        and of the decode state.
      peak_bytes: most device memory in use so far, as the allocator reports; 0 where it does not. What it exceeds the
        three by is a step's scratch.
      device_seconds: of a decode step with a kernel running, by the profiler; None if not profiled, or without a GPU.
      idle_share: of step_seconds in which no kernel runs (profiled kernels against the time without a profiler).
      trace_idle_share: of the profiled steps' span; larger where the profiler holds up the host.
      profile: of the decode steps; None if not profiled.
    """

    batch: int
    context: int
    prefill_seconds: float
    prefill_rate: float
    prefill_fraction: float
    step_seconds: float
    step_spread: float
    host_seconds: float
    bytes_read: int
    step_fraction: float
    weight_bytes: int
    cache_bytes: int
    state_bytes: int
    peak_bytes: int
    device_seconds: float | None = None
    idle_share: float | None = None
    trace_idle_share: float | None = None
    profile: Profile | None = None


def weight_bytes_read(config: ModelConfig, params) -> int:
    """Bytes of parameters that every step reads: all, but of an untied embedding table only single rows."""
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    return total if config.tie_embeddings else total - params["embed"].nbytes


def prefill_flops(config: ModelConfig, params, context: int) -> int:
    """Floating-point operations of one prompt: two per weight and token, and causal attention's two products."""
    weights = sum(x.size for x in jax.tree.leaves(params)) - params["embed"].size
    if not config.tie_embeddings:
        weights -= params["lm_head"].size  # logits of the last token only
    attention = 2 * context**2 * config.num_heads * config.head_dim * config.num_layers
    return 2 * weights * context + attention


def kv_bytes_per_token(llm: LLM) -> int:
    """Bytes of K and V of one token in all layers and heads."""
    config = llm.model_config
    item = np.dtype(llm.engine.runner.layout.dtype).itemsize
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * item


def tokens_needed(context: int, steps: int, *, batch: int, chunk: int) -> int:
    """The max_model_len that `measure` needs: every prompt, and what it decodes until all have been measured.

    Args:
      chunk: the engine's max_mixed_tokens.
    """
    return context + tokens_decoded(steps, batch=batch, context=context, chunk=chunk)


def tokens_decoded(steps: int, *, batch: int, context: int, chunk: int) -> int:
    """Tokens each prompt may generate: the first prompts decode while the last are still being prefilled."""
    chunks = -(-batch * context // prompt_room(chunk, batch))
    return steps + PROFILED_STEPS + 2 * WARMUP_STEPS + batch + chunks


def measure(
    llm: LLM,
    ceilings: Ceilings,
    *,
    batch: int,
    context: int,
    steps: int,
    seed: int = 0,
    profiled: bool = False,
    trace_folder: Path | None = None,
) -> Latency:
    """Prefills `batch` prompts of random tokens, then times decode steps with all of them running.

    Args:
      llm: its max_num_seqs must hold the batch, and its max_model_len and pool `tokens_needed` for each request.
      profiled: run some more steps under the profiler.
      trace_folder: keeps the profiler's trace.
    """
    config, runner = llm.model_config, llm.engine.runner
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, config.vocab_size, (batch, context)).tolist()
    chunk = runner.prefill_buckets[-1]
    total = batch * context
    # Compiles what the timed prefill needs: a full chunk, a last one of the same size, the release of rows.
    rehearsal = min(total, chunk + total % chunk)
    starts = range(0, rehearsal, context)
    run_batch(
        llm,
        [prompt[: rehearsal - start] for prompt, start in zip(prompts, starts, strict=False)],
        num_tokens=1,
        steps=0,
    )
    before = runner.compilations
    prefill_seconds = run_batch(llm, prompts, num_tokens=1, steps=0).first_tokens
    if runner.compilations != before:  # chunks of few tokens, which many short prompts make, needed other steps
        prefill_seconds = run_batch(llm, prompts, num_tokens=1, steps=0).first_tokens
    num_tokens = tokens_decoded(steps, batch=batch, context=context, chunk=llm.engine.scheduler.config.max_mixed_tokens)
    decode = run_batch(llm, prompts, num_tokens=num_tokens, steps=steps, profiled=profiled, trace_folder=trace_folder)
    step = summary(decode.steps)
    bytes_read = weight_bytes_read(config, runner.params) + decode.tokens * kv_bytes_per_token(llm)
    stats = jax.devices()[0].memory_stats() or {}
    busy = decode.profile.busy_seconds if decode.profile and decode.profile.kernels else None
    return Latency(
        batch=batch,
        context=context,
        prefill_seconds=prefill_seconds,
        prefill_rate=total / prefill_seconds,
        prefill_fraction=batch * prefill_flops(config, runner.params, context) / prefill_seconds / ceilings.matmul,
        step_seconds=step.median,
        step_spread=step.spread,
        host_seconds=summary(decode.host).median,
        bytes_read=bytes_read,
        step_fraction=bytes_read / ceilings.read / step.median,
        weight_bytes=tree_bytes([runner.params]),
        cache_bytes=tree_bytes([runner.cache]),
        state_bytes=tree_bytes([runner.state]),
        peak_bytes=stats.get("peak_bytes_in_use", 0),
        device_seconds=busy,
        idle_share=None if busy is None else max(0.0, 1 - busy / step.median),
        trace_idle_share=None if decode.profile is None else decode.profile.idle_share,
        profile=decode.profile,
    )


@dataclass(frozen=True)
class BatchRun:
    """A batch that was run once.

    Attributes:
      first_tokens: seconds to the last prompt's first token; the compression of the prompts is part of it.
      steps: seconds of each decode step.
      host: of these, the host's share.
      tokens: of all texts together, evicted ones included, in the mean of the timed steps.
      live: tokens that all layers and KV heads hold of all requests, in the mean of the timed steps, as counted in the
        slot tables; None if nothing was compressed.
      compressions: seconds of the compression of each request's prompt, where it was compressed.
      profile: of decode steps; None if not profiled.
    """

    first_tokens: float
    steps: list[float]
    host: list[float]
    tokens: int
    live: float | None
    compressions: list[float]
    profile: Profile | None


def run_batch(
    llm: LLM,
    prompts: list[list[int]],
    *,
    num_tokens: int,
    steps: int,
    compression: CompressionParams | None = None,
    profiled: bool = False,
    trace_folder: Path | None = None,
) -> BatchRun:
    """Runs the prompts together, times `steps` decode steps once all of them decode, and cancels what is left."""
    engine = llm.engine
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    counts = steps > 0 and compression is not None and compression.evicts
    start = time.perf_counter()
    submissions = [
        engine.add(f"latency-{i}", TokenizedPrompt(None, prompt), params, compression)
        for i, prompt in enumerate(prompts)
    ]
    answers = [answer for submission in submissions for answer in submission.answers]
    while any(not submission.num_generated_tokens for submission in submissions):
        engine.step()
    first_tokens = time.perf_counter() - start
    compressions = [answer.compression.seconds for answer in answers if answer.compression.count]
    for _ in range(WARMUP_STEPS // 2 if steps else 0):
        engine.step()
    before = _live_tokens(llm, answers) if counts else 0
    for _ in range(WARMUP_STEPS - WARMUP_STEPS // 2 if steps else 0):
        engine.step()
    seconds, host = [], []
    for _ in range(steps):
        began, waited = time.perf_counter(), engine.wait_seconds
        engine.step()
        seconds.append(time.perf_counter() - began)
        host.append(seconds[-1] - (engine.wait_seconds - waited))
    held = sum(answer.request.num_computed for answer in answers)
    live = (before + _live_tokens(llm, answers)) / 2 if counts else None

    def step() -> Any:
        engine.step()
        return engine.runner.state.token

    seen = profile(step, calls=PROFILED_STEPS, folder=trace_folder) if profiled else None
    for submission in submissions:
        engine.cancel(submission)
    while engine.has_unfinished:
        engine.step()
    engine.step()  # releases the rows, so that no later run pays for it
    return BatchRun(first_tokens, seconds, host, held - len(prompts) * steps // 2, live, compressions, seen)


def time_prompt(llm: LLM, prompt: list[int], compression: CompressionParams | None, *, repeats: int) -> float:
    """Seconds of a prompt alone to its first token: the median of the repeats, before which it runs once more."""
    runs = [
        run_batch(llm, [prompt], num_tokens=1, steps=0, compression=compression).first_tokens
        for _ in range(1 + repeats)
    ]
    return statistics.median(runs[1:])


def _live_tokens(llm: LLM, answers: list[Answer]) -> int:
    """Tokens that the tables of the answers' rows hold, evicted ones left out."""
    cache = llm.engine.runner.cache
    index = jnp.asarray([answer.request.row or 0 for answer in answers], jnp.int32)
    length = cache.table.length[:, index]
    if not any(answer.request.compression.per_step for answer in answers):
        return int(length.sum())
    # Only eviction at every step leaves slots that hold nothing.
    max_slots = cache.layout.page_size * cache.layout.pages_for(int(length.max()))
    usage = row_usage(cache, index, max_slots=max_slots)
    assert usage.active is not None, "it was asked for"
    return int(usage.active.sum())


COLUMNS: list[Column] = [
    ("batch", lambda row: str(row.batch)),
    ("context", lambda row: str(row.context)),
    ("prefill s", lambda row: number(row.prefill_seconds, 2)),
    ("tok/s", lambda row: number(row.prefill_rate, 0)),
    ("of matmul", lambda row: number(row.prefill_fraction, 2)),
    *STEP_COLUMNS,
    ("idle", lambda row: percent(row.idle_share)),
    ("weights", lambda row: number(row.weight_bytes, 1, times=2**-30)),
    ("+ cache", lambda row: number(row.cache_bytes, 1, times=2**-30)),
    ("+ state", lambda row: number(row.state_bytes, 2, times=2**-30)),
    ("peak GiB", lambda row: number(row.peak_bytes, 1, times=2**-30)),
]


def format_table(rows: Sequence[Latency]) -> str:
    """A line per batch; "idle" is the GPU's, and "-" where the steps were not profiled."""
    return format_rows(COLUMNS, rows)


def as_dict(rows: Iterable[Any], ceilings: Ceilings, *, model: str) -> dict[str, Any]:
    """For JSON, and for `sparsejax.bench.compare`. rows: dataclasses, of this benchmark of latency or of another."""
    return {
        "kind": "latency",
        "model": model,
        "jax": jax.__version__,
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in rows],
    }
