"""What the device remembers of each running request between two steps, and what a step is given and returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.cache import Entries, RowUsage
from sparsejax.engine.programs.recording import ChunkRecord, RecordState, start_record
from sparsejax.engine.programs.sampling import RowSampling, SampleOutput, to_rows
from sparsejax.engine.programs.selection import RowSelection, no_selection
from sparsejax.engine.requests.sampling_params import SamplingParams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoreState:
    """Which rows are stored compressed, and how much of their history a decode reads. R rows, or S segments.

    Attributes:
      compressed: bool[R].
      top_tokens: i32[R], tokens of the history to read; 0: by `top_fraction`.
      top_fraction: f32[R], fraction of the history to read.
    """

    compressed: jax.Array | np.ndarray
    top_tokens: jax.Array | np.ndarray
    top_fraction: jax.Array | np.ndarray

    def wanted(self, history: jax.Array) -> jax.Array:
        """i32[R]: tokens to read of a history of i32[R] tokens, which may be fewer."""
        share = jnp.ceil(jnp.asarray(self.top_fraction) * history.astype(jnp.float32)).astype(jnp.int32)
        return jnp.minimum(jnp.where(jnp.asarray(self.top_tokens) > 0, self.top_tokens, share), history)


def idle_store(num_rows: int) -> StoreState:
    """No row is compressed."""
    return StoreState(jnp.zeros(num_rows, bool), jnp.zeros(num_rows, jnp.int32), jnp.zeros(num_rows, jnp.float32))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """Per table row (row 0 is the null row). R rows, V vocabulary.

    Attributes:
      token: i32[R], the newest token, which the next decode step feeds to the model.
      position: i32[R], its position in the text (not its slot: eviction makes them differ).
      num_output: i32[R], tokens generated so far; it also numbers the random draws of a request.
      sampling: the request's sampling parameters, arrays of leading size R.
      prompt_seen: bool[R, V], tokens that occur in the prompt (repetition penalty).
      output_count: i32[R, V], how often each token was generated (presence and frequency penalty).
        Both count tables are kept only by steps compiled with `plain=False`.
      record: what eviction needs beside the cache; None if the cache cannot evict.
      store: which rows are stored compressed; None if the cache can store none so.
      select: what each row reads; None if all read everything.
    """

    token: jax.Array
    position: jax.Array
    num_output: jax.Array
    sampling: RowSampling
    prompt_seen: jax.Array
    output_count: jax.Array
    record: RecordState | None = None
    store: StoreState | None = None
    select: RowSelection | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillBatch:
    """A packed chunk of prompt tokens. T tokens (padded to a bucket), S segments (one request each; row 0: unused).

    Attributes:
      tokens: i32[T].
      targets: i32[T], the token that follows each (read only for prompt log-probabilities).
      positions: i32[T].
      rope_lengths: i32[T], length that sets the RoPE base of "dynamic" models (others ignore it).
      generated: bool[T], true for replayed tokens that the request itself generated before it was preempted.
      rows: i32[S], table row of each segment.
      starts: i32[S + 1], segment s owns tokens starts[s] to starts[s + 1]; starts[S] is the number of live tokens.
      first: bool[S], the segment starts its request, so the row's state is set up anew.
      last: bool[S], the segment ends the prompt, so the row becomes ready to decode.
      newest: i32[S], the token to decode from if it is known, or -1 to sample it from the last logits.
      num_output: i32[S], tokens the request had generated before, `newest` included; if that is a token of the prompt,
        less the tokens of the prompt behind it.
      sampling: parameters of each segment's request, arrays of leading size S.
      record: what eviction wants recorded of each segment; None if the cache cannot evict.
      store: how each segment is stored; None if the cache can compress none.
      select: what each segment's request reads once it decodes; None if all read everything.
    """

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    rope_lengths: jax.Array | np.ndarray
    generated: jax.Array | np.ndarray
    rows: jax.Array | np.ndarray
    starts: jax.Array | np.ndarray
    first: jax.Array | np.ndarray
    last: jax.Array | np.ndarray
    newest: jax.Array | np.ndarray
    num_output: jax.Array | np.ndarray
    sampling: RowSampling
    record: ChunkRecord | None = None
    store: StoreState | None = None
    select: RowSelection | None = None

    @property
    def segment(self) -> jax.Array:
        """i32[T], the segment of each token; S for padding."""
        index = jnp.arange(self.tokens.shape[0], dtype=jnp.int32)
        return jnp.searchsorted(jnp.asarray(self.starts), index, side="right").astype(jnp.int32) - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepOutput:
    """What the host reads of a step, one step late.

    Attributes:
      sample: tokens (and log-probabilities where asked for) of the step's lanes.
      ok: bool[], false if the pool was out of pages: what did not fit was not stored, and the sample means nothing.
      free_entries: table entries left, i32[]; of a `DeltaCache` those of each pool.
      prompt: log-probabilities of the chunk's own tokens (prefill steps that were asked for them), else None.
      usage: entries of every row after the step, R lanes; None if the cache cannot evict, where the host knows them.
    """

    sample: SampleOutput
    ok: jax.Array
    free_entries: jax.Array | Entries
    prompt: SampleOutput | None = None
    usage: RowUsage | None = None


def init_state(
    num_rows: int, vocab_size: int, record: RecordState | None = None, *, selects: bool = False, stores: bool = False
) -> DecodeState:
    """An idle state of `num_rows` rows, the null row included.

    Args:
      record: the idle state of eviction, if there is any.
      stores: rows can be stored compressed.
      selects: rows may select what they read.
    """

    def zeros() -> jax.Array:  # separate buffers: a donated pytree must not hold one array twice
        return jnp.zeros(num_rows, jnp.int32)

    idle = to_rows([SamplingParams(temperature=0.0)], (), [0])
    return DecodeState(
        token=zeros(),
        position=zeros(),
        num_output=zeros(),
        sampling=jax.tree.map(lambda x: jnp.repeat(jnp.asarray(x), num_rows, axis=0), idle),
        prompt_seen=jnp.zeros((num_rows, vocab_size), bool),
        output_count=jnp.zeros((num_rows, vocab_size), jnp.int32),
        record=record,
        store=idle_store(num_rows) if stores else None,
        select=jax.tree.map(jnp.asarray, no_selection(num_rows)) if selects else None,
    )


def start_rows(state: DecodeState, batch: PrefillBatch, *, plain: bool) -> DecodeState:
    """Takes a chunk's requests into the state: parameters, and the token counts that penalties need.

    Args:
      plain: leave the count tables alone (no request of the batch reads them).
    """
    rows = jnp.asarray(batch.rows)
    sampling = jax.tree.map(lambda old, new: old.at[rows].set(new), state.sampling, batch.sampling)
    state = replace(state, sampling=sampling)
    if state.record is not None and batch.record is not None:
        state = replace(state, record=start_record(state.record, batch.record, rows, jnp.asarray(batch.starts)))
    if state.store is not None and batch.store is not None:
        store = jax.tree.map(lambda old, new: old.at[rows].set(new), state.store, batch.store)
        state = replace(state, store=store)
    if state.select is not None and batch.select is not None:
        # Unused segments name the null row, and say that it reads everything.
        select = jax.tree.map(lambda old, new: old.at[rows].set(new), state.select, batch.select)
        state = replace(state, select=select)
    if plain:
        return state
    keep = ~jnp.asarray(batch.first)
    seen = state.prompt_seen.at[rows].set(state.prompt_seen[rows] & keep[:, None])
    count = state.output_count.at[rows].set(state.output_count[rows] * keep[:, None])
    row = jnp.append(rows, 0)[batch.segment]
    nowhere = state.prompt_seen.shape[0]
    generated = jnp.asarray(batch.generated)
    seen = seen.at[jnp.where(generated, nowhere, row), batch.tokens].set(True, mode="drop")
    count = count.at[jnp.where(generated, row, nowhere), batch.tokens].add(1, mode="drop")
    # The newest token of a replay is not part of the chunk (it is the next decode's input), but it was generated.
    replayed = (jnp.asarray(batch.newest) >= 0) & (jnp.asarray(batch.num_output) > 0)
    count = count.at[jnp.where(replayed, rows, nowhere), batch.newest].add(1, mode="drop")
    return replace(state, prompt_seen=seen, output_count=count)


def emit(
    state: DecodeState,
    rows: jax.Array,
    token: jax.Array,
    position: jax.Array,
    num_output: jax.Array,
    *,
    live: jax.Array,
    counted: jax.Array,
    plain: bool,
) -> DecodeState:
    """Makes `token` the newest of each live lane's row.

    Args:
      rows, token, position, num_output: i32[N].
      live: bool[N], lanes whose row is set.
      counted: bool[N], lanes whose token was sampled now, so that it enters `output_count`.
    """
    nowhere = state.token.shape[0]
    at = jnp.where(live, rows, nowhere)
    state = replace(
        state,
        token=state.token.at[at].set(token, mode="drop"),
        position=state.position.at[at].set(position, mode="drop"),
        num_output=state.num_output.at[at].set(num_output, mode="drop"),
    )
    if plain:
        return state
    at = jnp.where(live & counted, rows, nowhere)
    return replace(state, output_count=state.output_count.at[at, token].add(1, mode="drop"))
