"""The programs that evict. Of some rows, a method scores the slots, a budget rule picks what stays, pages come back.

    cache, output = compress_rows(params, cache, record, batch, decoder=..., spec=...)
    cache, record, output = evict_rows(cache, record, batch, spec=...)

`compress_rows` brings rows down to their budgets at once, behind the step that stored the last token it may judge;
`evict_rows` keeps rows at their budgets, behind every decode step. Both are programs of their own: the model's steps
know of no method, and a method is compiled without the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from sparsejax.cache import KVCache, RowUsage, compact, free_entries, row_usage
from sparsejax.engine.programs.eviction import EvictBatch, EvictReport, EvictSpec, evict_step
from sparsejax.engine.programs.recording import RecordState
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import BudgetRule, Method, ObservedQueries, QueryMoments, Slots, gather_slots
from sparsejax.models import Decoder
from sparsejax.models.rope import rope_cos_sin


@dataclass(frozen=True)
class CompressSpec:
    """What is fixed when the program is compiled.

    Attributes:
      method: with its options.
      rule: shares the budget out over layers and heads.
      max_slots: no head of the rows holds more tokens.
      in_text_order: nothing was ever evicted from the rows.
      max_keep: all layers and heads of all rows together keep no more tokens.
      implementation: "triton", "xla" or None, handed to the kernels.
    """

    method: Method
    rule: BudgetRule
    max_slots: int
    max_keep: int
    in_text_order: bool = False
    implementation: Implementation | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressBatch:
    """K rows, each with a budget of its own. i32[K] each.

    Attributes:
      rows: table rows; 0 for idle lanes.
      budget: tokens to keep, the mean over layers and heads.
      sinks, recent, window: first and last tokens of the text that stay; observation window.
      text_length: tokens of the text so far, evicted ones included.
      prompt_length: tokens of the prompt, which set the RoPE base of "dynamic" models.
      recorded: queries whose attention the scores sum up.
      seed: u32[K], of the request.
      moment_slot: where the moments of the row's queries are; 0: nowhere.
      observed: where the recorded queries stand.
    """

    rows: jax.Array | np.ndarray
    budget: jax.Array | np.ndarray
    sinks: jax.Array | np.ndarray
    recent: jax.Array | np.ndarray
    window: jax.Array | np.ndarray
    text_length: jax.Array | np.ndarray
    prompt_length: jax.Array | np.ndarray
    recorded: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    moment_slot: jax.Array | np.ndarray
    observed: ObservedQueries


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompressOutput:
    """What the host reads of a compression, one step late.

    Attributes:
      ok: bool[], false if shared pages could not be copied: then nothing was evicted.
      free_entries: i32[], table entries left in the pool.
      usage: entries of every row, R lanes.
      kept: i32[L, K, H], tokens that each layer and head of a row holds now.
    """

    ok: jax.Array
    free_entries: jax.Array
    usage: RowUsage
    kept: jax.Array


def compress_rows(
    params, cache: KVCache, record: RecordState, batch: CompressBatch, *, decoder: Decoder, spec: CompressSpec
) -> tuple[KVCache, CompressOutput]:
    """Evicts what the method likes least from each row, down to the row's budget. The cache is meant to be donated."""
    rows = jnp.asarray(batch.rows)
    slots = view_slots(
        params,
        cache,
        record,
        batch,
        decoder=decoder,
        max_slots=spec.max_slots,
        in_text_order=spec.in_text_order,
    )
    keep = choose_slots(spec.method, spec.rule, slots, jnp.asarray(batch.budget))
    cache, ok = compact(cache, rows, keep, max_keep=spec.max_keep, implementation=spec.implementation)
    return cache, CompressOutput(
        ok=ok,
        free_entries=free_entries(cache),
        usage=row_usage(cache),
        kept=cache.table.length[:, rows],
    )


def choose_slots(method: Method, rule: BudgetRule, slots: Slots, budget: jax.Array) -> jax.Array:
    """bool[L, K, H, S]: what the rule keeps by the method's scores. budget: i32[K].

    Raises:
      InvalidArgumentError: the method's scores or the rule's choice have another shape or kind of dtype.
    """
    shape = slots.live.shape
    scores = method.scores(slots)
    if jnp.shape(scores) != shape or not jnp.issubdtype(jnp.result_type(scores), np.floating):
        raise InvalidArgumentError(
            f"layer_scores of method {method.name!r} must give a float for each slot of a layer, f32{list(shape[1:])} "
            f"here; of {shape[0]} layers it gave {jnp.result_type(scores)}{list(jnp.shape(scores))}."
        )
    keep = rule.keep(scores, slots, budget)
    if jnp.shape(keep) != shape or jnp.result_type(keep) != np.bool_:
        raise InvalidArgumentError(
            f"keep of budget rule {rule.name!r} must say of each slot whether it stays, bool{list(shape)} here; "
            f"it gave {jnp.result_type(keep)}{list(jnp.shape(keep))}."
        )
    return keep


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EvictOutput:
    """What the host reads of an evict step, one step late.

    Attributes:
      ok: bool[], every row is within its budget.
      free_entries: i32[], table entries left in the pool.
      usage: entries of every row, R lanes.
      report: what was evicted and copied.
    """

    ok: jax.Array
    free_entries: jax.Array
    usage: RowUsage
    report: EvictReport

    @property
    def kept(self) -> jax.Array:
        """As `CompressOutput` has it."""
        return self.report.live


def evict_rows(
    cache: KVCache, record: RecordState, batch: EvictBatch, *, spec: EvictSpec
) -> tuple[KVCache, RecordState, EvictOutput]:
    """`evict_step`, and what the host needs to know of it. Cache and record are meant to be donated."""
    cache, hole, report = evict_step(cache, record.hole, batch, spec=spec)
    output = EvictOutput(
        ok=jnp.all(report.ok),
        free_entries=free_entries(cache),
        usage=row_usage(cache, hole=hole),
        report=report,
    )
    return cache, replace(record, hole=hole), output


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Measured:
    """What the cache holds. free_entries: i32[], table entries left; usage: entries of every row, R lanes."""

    free_entries: jax.Array
    usage: RowUsage


def measure(cache: KVCache, hole: jax.Array | None) -> Measured:
    """Counts, where no step that does is at hand. hole: `RecordState.hole`."""
    return Measured(free_entries=free_entries(cache), usage=row_usage(cache, hole=hole))


def view_slots(
    params,
    cache: KVCache,
    record: RecordState,
    batch: CompressBatch,
    *,
    decoder: Decoder,
    max_slots: int,
    in_text_order: bool,
) -> Slots:
    """What methods see of the rows. max_slots, in_text_order: as in CompressSpec."""
    config = decoder.config
    prompt_length = jnp.asarray(batch.prompt_length)

    def rope(position: jax.Array) -> tuple[jax.Array, jax.Array]:
        lengths = prompt_length.reshape(-1, *[1] * (position.ndim - 1))
        lengths = jnp.maximum(position + 1, lengths)
        cos, sin = rope_cos_sin(config.rope, config.head_dim, position.reshape(-1), lengths.reshape(-1))
        return cos.reshape(*position.shape, -1), sin.reshape(*position.shape, -1)

    def output_kernel(layer: int) -> jax.Array:
        kernel = params[f"layers_{layer}"]["o"]["kernel"]
        return kernel.reshape(config.num_heads, config.head_dim, config.hidden_size)

    moments = None
    if record.moments is not None and record.counts is not None:
        slot = jnp.asarray(batch.moment_slot)
        found, count = record.moments[:, slot], record.counts[slot]
        moments = QueryMoments(
            first=found[..., -1, :],
            second=found[..., :-1, :],
            count=jnp.broadcast_to(count, (config.num_layers, slot.shape[0])),
        )
    return gather_slots(
        cache,
        jnp.asarray(batch.rows),
        max_slots=max_slots,
        text_length=jnp.asarray(batch.text_length),
        sink_tokens=jnp.asarray(batch.sinks),
        recent_tokens=jnp.asarray(batch.recent),
        window_tokens=jnp.asarray(batch.window),
        recorded=jnp.asarray(batch.recorded),
        seed=jnp.asarray(batch.seed),
        num_query_heads=config.num_heads,
        in_text_order=in_text_order,
        moments=moments,
        observed=batch.observed,
        budget=jnp.asarray(batch.budget),
        rope=rope,
        output_kernel=output_kernel,
    )
