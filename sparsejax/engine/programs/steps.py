"""The steps a serving loop is made of, as pure functions: prefill a packed chunk, decode one token a row, or both.

    cache, state, output = prefill_step(params, cache, state, batch, ...)
    cache, state, output = decode_step(params, cache, state, rows, ...)
    cache, state, output = mixed_step(params, cache, state, batch, rows, ...)

All bind the model to the cache: the model hands its q, k, v to an `attend` closure, which stores K/V through the slot
tables and runs the attention kernels over the same tables (`parts.py`). Cache and state are meant to be donated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from sparsejax.cache import DeltaCache, KVCache, SlotMapping, rotate_and_append, row_usage
from sparsejax.engine.programs.delta_parts import StoreOptions, delta_decode_part, delta_prefill_part
from sparsejax.engine.programs.parts import Carry, Part, decode_part, join, prefill_part
from sparsejax.engine.programs.placing import entries_left, place, store
from sparsejax.engine.programs.sampling import SampleOutput, greedy, sample, token_logprobs
from sparsejax.engine.programs.selection import Selecting
from sparsejax.engine.programs.state import DecodeState, PrefillBatch, StepOutput, emit, start_rows
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.models import AttendFromProjection, Decoder, ModelConfig

Cache = Any  # a KVCache, or a DeltaCache
PROMPT_LOGPROB_BLOCK = 64  # prompt positions whose logits exist at once: [64, V] rather than [T, V]


def serving_decoder(config: ModelConfig, dtype: Any, implementation: Implementation | None) -> Decoder:
    """The decoder of steps that run on one device and are not differentiated.

    implementation: of attention and the cache. Linear layers have no Triton kernel: asked for, it leaves them to XLA.
    """
    return Decoder(config, dtype, None if implementation is None else "xla")


@dataclass(frozen=True)
class StepOptions:
    """What is fixed when a step is compiled.

    Attributes:
      plain: every request of the batch decodes greedily with no penalty, minimum length or log-probability: the step
        then takes the argmax and keeps no token counts.
      logprobs: return the log-probabilities of the sampled tokens and of their rivals (not with plain).
      prompt_logprobs: return those of the chunk's prompt tokens too (steps with a chunk only, with logprobs).
      records: what a chunk records for eviction (`recording`); none for a decode step.
      watch: some decoding rows record attention, or have dead slots.
      store: what the step serves of a `DeltaCache`; None: the cache is none.
      select: how decoding rows select what they read; None: they read everything.
      implementation: "triton", "xla" or None, handed to the kernels.
    """

    plain: bool = True
    logprobs: bool = False
    prompt_logprobs: bool = False
    records: frozenset[str] = frozenset()
    watch: bool = False
    store: StoreOptions | None = None
    select: Selecting | None = None
    implementation: Implementation | None = None


def options_for(
    params: Sequence[SamplingParams],
    *,
    implementation: Implementation | None,
    prompt_logprobs: bool = False,
    records: frozenset[str] = frozenset(),
    watch: bool = False,
    store: StoreOptions | None = None,
    select: Selecting | None = None,
) -> StepOptions:
    """The cheapest step variant that serves every request of a batch.

    Args:
      prompt_logprobs: a request of the step's chunk wants log-probabilities of its prompt. (One that decodes by now may
        have wanted them.)
      records, watch, select, store: as in StepOptions.
    """
    logprobs = prompt_logprobs or any(p.logprobs is not None for p in params)
    return StepOptions(
        plain=not logprobs and all(_takes_argmax(p) for p in params),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        records=records,
        watch=watch,
        store=store,
        select=select,
        implementation=implementation,
    )


def _takes_argmax(params: SamplingParams) -> bool:
    return (
        params.temperature == 0
        and params.repetition_penalty == 1
        and params.presence_penalty == 0
        and params.frequency_penalty == 0
        and params.min_tokens == 0
    )


def prefill_step(
    params,
    cache: Cache,
    state: DecodeState,
    batch: PrefillBatch,
    *,
    decoder: Decoder,
    options: StepOptions,
) -> tuple[Cache, DecodeState, StepOutput]:
    """Computes a packed chunk of prompts: stores its K/V and samples a first token where a prompt ends.

    The output has a lane for each of the S segments; only those with `batch.last` and no `batch.newest` count.
    """
    cache, part = _prefill_part(params, cache, batch, decoder, options)
    state = start_rows(state, batch, plain=options.plain)
    return _run(params, cache, state, part, decoder=decoder, options=options, targets=batch.targets)


def decode_step(
    params,
    cache: Cache,
    state: DecodeState,
    rows: jax.Array,
    forced: jax.Array | None = None,
    *,
    decoder: Decoder,
    options: StepOptions,
) -> tuple[Cache, DecodeState, StepOutput]:
    """Feeds each row's newest token to the model and samples the next.

    Args:
      rows: i32[B], 0 for idle lanes.
      forced: i32[B], the token that follows, where it is known already (a replay), else -1; None: nowhere.
    """
    cache, part = _decode_part(params, cache, state, rows, forced, options)
    return _run(params, cache, state, part, decoder=decoder, options=options)


def mixed_step(
    params,
    cache: Cache,
    state: DecodeState,
    batch: PrefillBatch,
    rows: jax.Array,
    forced: jax.Array | None = None,
    *,
    decoder: Decoder,
    options: StepOptions,
) -> tuple[Cache, DecodeState, StepOutput]:
    """What `decode_step(rows)` and then `prefill_step(batch)` do, with one pass over the weights.

    Args:
      batch: must have a padding token for every row that decodes; if not, `ok` of the output is false.
      rows: i32[B], 0 for idle lanes; none of them is in the batch.
      forced: as in `decode_step`.

    Returns:
      The output has the S lanes of the chunk and then the B lanes of the rows.
    """
    cache, decode = _decode_part(params, cache, state, jnp.asarray(rows), forced, options)
    cache, prefill = _prefill_part(params, cache, batch, decoder, options)
    state = start_rows(state, batch, plain=options.plain)
    part = join(prefill, decode, jnp.asarray(batch.starts)[-1])
    return _run(params, cache, state, part, decoder=decoder, options=options, targets=batch.targets)


def _prefill_part(
    params, cache: Cache, batch: PrefillBatch, decoder: Decoder, options: StepOptions
) -> tuple[Cache, Part]:
    common = {"config": decoder.config, "implementation": options.implementation}
    if isinstance(cache, DeltaCache):
        assert options.store is not None, "a step over a DeltaCache says whom it serves"
        return delta_prefill_part(cache, batch, params=params, options=options.store, **common)
    return prefill_part(cache, batch, records=options.records, **common)


def _decode_part(
    params,
    cache: Cache,
    state: DecodeState,
    rows: jax.Array,
    forced: jax.Array | None,
    options: StepOptions,
) -> tuple[Cache, Part]:
    implementation = options.implementation
    if isinstance(cache, DeltaCache):
        assert options.store is not None, "a step over a DeltaCache says whom it serves"
        return delta_decode_part(
            cache, state, rows, forced, params=params, options=options.store, implementation=implementation
        )
    return decode_part(
        cache,
        state,
        rows,
        forced,
        watch=options.watch,
        select=options.select,
        implementation=implementation,
    )


def _run(
    params,
    cache: Cache,
    state: DecodeState,
    part: Part,
    *,
    decoder: Decoder,
    options: StepOptions,
    targets: jax.Array | np.ndarray | None = None,
) -> tuple[Cache, DecodeState, StepOutput]:
    """One run of the model: stores K/V, samples every lane, makes the samples the rows' newest tokens.

    Args:
      targets: i32[T], the token after each one; needed for the log-probabilities of prompts.
    """
    tokens, lanes, ends = part.tokens, part.lanes, part.ends
    cache, mapping = place(cache, tokens)

    def attend(layer, q, k, v, k_pre_rope, carry):
        # Storing first keeps the pool's one live version: reading the old pool after it would force a copy.
        cache = store(carry.cache, layer, mapping, k, v, k_pre_rope, implementation=options.implementation)
        return part.attend(layer, q, k, v, k_pre_rope, carry._replace(cache=cache), mapping)

    def attend_from_projection(layer, qkv, cos, sin, carry):
        assert isinstance(mapping, SlotMapping), "parts over other caches read what is new"
        q, cache = rotate_and_append(carry.cache, layer, mapping, qkv, cos, sin, implementation=options.implementation)
        return part.attend(layer, q, None, None, None, carry._replace(cache=cache), mapping)

    moments = state.record.moments if state.record is not None and "moments" in options.records else None
    hidden, carry = apply_decoder(
        decoder,
        params,
        tokens.tokens,
        tokens.positions,
        Carry(cache, moments),
        attend if part.reads_new_kv or decoder.config.qk_norm else AttendFromProjection(attend_from_projection),
        rope_lengths=tokens.rope_lengths,
        method="hidden_states",
    )
    cache, moments = carry.cache, carry.moments
    logits = apply_decoder(decoder, params, hidden if ends is None else hidden[ends], method="unembed")
    sampled = _sample(logits, state, lanes.rows, lanes.num_output, options)
    replayed = lanes.newest >= 0
    if moments is not None and state.record is not None:
        state = replace(state, record=replace(state.record, moments=moments))
    if options.watch and state.record is not None:  # each hole has been filled
        hole = state.record.hole.at[:, lanes.rows].set(-1)
        state = replace(state, record=replace(state.record, hole=hole))
    state = emit(
        state,
        lanes.rows,
        token=jnp.where(replayed, lanes.newest, sampled.token),
        position=(tokens.positions if ends is None else tokens.positions[ends]) + 1,
        num_output=jnp.where(replayed, lanes.num_output, lanes.num_output + 1),
        live=lanes.live,
        counted=lanes.counted,
        plain=options.plain,
    )
    prompt = None
    if options.prompt_logprobs and targets is not None:
        prompt = _prompt_logprobs(decoder, params, hidden, jnp.asarray(targets))
    output = StepOutput(
        sample=sampled,
        ok=part.ok,
        free_entries=entries_left(cache),
        prompt=prompt,
        usage=row_usage(cache) if state.record is not None and isinstance(cache, KVCache) else None,
    )
    return cache, state, output


def apply_decoder(decoder: Decoder, params, *args, method: str, **kwargs) -> Any:
    """One of the decoder's methods on its parameters."""
    return decoder.apply({"params": params}, *args, method=method, **kwargs)


def _sample(
    logits: jax.Array, state: DecodeState, rows: jax.Array, num_output: jax.Array, options: StepOptions
) -> SampleOutput:
    if options.plain:
        return greedy(logits)
    return sample(
        logits,
        jax.tree.map(lambda x: x[rows], state.sampling),
        prompt_seen=state.prompt_seen[rows],
        output_count=state.output_count[rows],
        num_output=num_output,
        want_logprobs=options.logprobs,
    )


def _prompt_logprobs(decoder: Decoder, params, hidden: jax.Array, targets: jax.Array) -> SampleOutput:
    """Log-probability of each position's following token, [T] lanes, a block of logits at a time."""
    num_tokens = hidden.shape[0]
    block = min(PROMPT_LOGPROB_BLOCK, num_tokens)
    blocks = -(-num_tokens // block)
    padding = blocks * block - num_tokens
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(blocks, block, -1)
    targets = jnp.pad(targets, (0, padding)).reshape(blocks, block)

    def one(args):
        return token_logprobs(apply_decoder(decoder, params, args[0], method="unembed"), args[1])

    out = jax.lax.map(one, (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], out)
