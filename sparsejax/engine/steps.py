"""The two steps a serving loop is made of, as pure functions: prefill a packed chunk, decode one token a row.

    cache, state, output = prefill_step(params, cache, state, batch, ...)
    cache, state, output = decode_step(params, cache, state, rows, ...)

Both bind the model to the cache: the model hands its q, k, v to an `attend` closure, which stores K/V through the slot
tables and runs the attention kernel over the same tables. Cache and state are meant to be donated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation, decode_attention, prefill_attention
from sparsejax.cache import KVCache, SlotMapping, allocate, append, free_entries, slot_mapping
from sparsejax.engine.sampling import SampleOutput, greedy, sample, token_logprobs
from sparsejax.engine.sampling_params import SamplingParams
from sparsejax.engine.state import DecodeState, PrefillBatch, StepOutput, emit, start_rows
from sparsejax.models import Attend, Decoder

PROMPT_LOGPROB_BLOCK = 64  # prompt positions whose logits exist at once: [64, V] rather than [T, V]


@dataclass(frozen=True)
class StepOptions:
    """What is fixed when a step is compiled.

    Attributes:
      plain: every request of the batch decodes greedily with no penalty, minimum length or log-probability: the step
        then takes the argmax and keeps no token counts.
      logprobs: return the log-probabilities of the sampled tokens and of their rivals (not with plain).
      prompt_logprobs: return those of the chunk's prompt tokens too (prefill only, with logprobs).
      implementation: "triton", "xla" or None, handed to the kernels.
    """

    plain: bool = True
    logprobs: bool = False
    prompt_logprobs: bool = False
    implementation: Implementation | None = None


def options_for(
    params: Sequence[SamplingParams], *, implementation: Implementation | None, prefill: bool = False
) -> StepOptions:
    """The cheapest step variant that serves every request of a batch."""
    prompt_logprobs = prefill and any(p.prompt_logprobs is not None for p in params)
    logprobs = prompt_logprobs or any(p.logprobs is not None for p in params)
    return StepOptions(
        plain=not logprobs and all(_takes_argmax(p) for p in params),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
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
    params, cache: KVCache, state: DecodeState, batch: PrefillBatch, *, decoder: Decoder, options: StepOptions
) -> tuple[KVCache, DecodeState, StepOutput]:
    """Computes a packed chunk of prompts: stores its K/V and samples a first token where a prompt ends.

    The output has a lane for each of the S segments; only those with `batch.last` and no `batch.newest` count.
    """
    num_tokens = batch.tokens.shape[0]
    starts = jnp.asarray(batch.starts)
    rows = jnp.asarray(batch.rows)
    index = jnp.arange(num_tokens, dtype=jnp.int32)
    segment = jnp.searchsorted(starts, index, side="right").astype(jnp.int32) - 1  # S for padding
    token_rows = jnp.append(rows, 0)[segment]
    history = cache.table.length
    cache, ok = allocate(cache, rows, starts[1:] - starts[:-1], max_count=num_tokens)
    # A refused allocation leaves the lengths as they were: `back` would then point at live tokens.
    token_rows = jnp.where(ok, token_rows, 0)
    mapping = slot_mapping(cache, token_rows, jnp.append(starts, num_tokens)[segment + 1] - index)
    attend = _prefill_attend(mapping, history, rows, starts, options)
    hidden, cache = _apply(
        decoder,
        params,
        batch.tokens,
        batch.positions,
        cache,
        attend,
        rope_lengths=batch.rope_lengths,
        method="hidden_states",
    )
    ends = jnp.maximum(starts[1:] - 1, 0)
    logits = _apply(decoder, params, hidden[ends], method="unembed")
    state = start_rows(state, batch, segment, plain=options.plain)
    sampled = _sample(logits, state, rows, jnp.asarray(batch.num_output), options)
    replayed = jnp.asarray(batch.newest) >= 0
    state = emit(
        state,
        rows,
        token=jnp.where(replayed, batch.newest, sampled.token),
        position=jnp.asarray(batch.positions)[ends] + 1,
        num_output=jnp.where(replayed, batch.num_output, batch.num_output + 1),
        live=jnp.asarray(batch.last) & (rows > 0) & ok,
        counted=~replayed,
        plain=options.plain,
    )
    prompt = _prompt_logprobs(decoder, params, hidden, jnp.asarray(batch.targets)) if options.prompt_logprobs else None
    return cache, state, StepOutput(sample=sampled, ok=ok, free_entries=free_entries(cache), prompt=prompt)


def decode_step(
    params, cache: KVCache, state: DecodeState, rows: jax.Array, *, decoder: Decoder, options: StepOptions
) -> tuple[KVCache, DecodeState, StepOutput]:
    """Feeds each row's newest token to the model and samples the next. rows: i32[B], 0 for idle lanes."""
    live = rows > 0
    cache, ok = allocate(cache, rows, live.astype(jnp.int32), max_count=1)
    mapping = slot_mapping(cache, jnp.where(ok, rows, 0), jnp.ones_like(rows))
    position = state.position[rows]
    attend = _decode_attend(cache, mapping, rows, options)
    hidden, cache = _apply(decoder, params, state.token[rows], position, cache, attend, method="hidden_states")
    logits = _apply(decoder, params, hidden, method="unembed")
    num_output = state.num_output[rows]
    sampled = _sample(logits, state, rows, num_output, options)
    state = emit(
        state,
        rows,
        sampled.token,
        position + 1,
        num_output + 1,
        live=live & ok,
        counted=live,
        plain=options.plain,
    )
    return cache, state, StepOutput(sample=sampled, ok=ok, free_entries=free_entries(cache))


def _apply(decoder: Decoder, params, *args, method: str, **kwargs) -> Any:
    """One of the decoder's methods on its parameters."""
    return decoder.apply({"params": params}, *args, method=method, **kwargs)


def _prefill_attend(
    mapping: SlotMapping, history: jax.Array, rows: jax.Array, starts: jax.Array, options: StepOptions
) -> Attend:
    def attend(layer, q, k, v, k_pre_rope, cache):
        del k_pre_rope
        # Storing first keeps the pool's one live version: reading the old pool after it would force a copy.
        cache = append(cache, layer, mapping, k, v, implementation=options.implementation)
        out = prefill_attention(
            q,
            k,
            v,
            cache.pool.k,
            cache.pool.v,
            cache.table.pages,
            history,
            rows,
            starts,
            address=cache.layout.address(layer),
            scale=q.shape[-1] ** -0.5,
            implementation=options.implementation,
        )
        return out, cache

    return attend


def _decode_attend(cache: KVCache, mapping: SlotMapping, rows: jax.Array, options: StepOptions) -> Attend:
    def attend(layer, q, k, v, k_pre_rope, cache):
        del k_pre_rope
        cache = append(cache, layer, mapping, k, v, implementation=options.implementation)
        out = decode_attention(
            q,
            cache.pool.k,
            cache.pool.v,
            cache.table.pages,
            cache.table.length,
            rows,
            address=cache.layout.address(layer),
            num_kv_heads=cache.layout.num_kv_heads,
            scale=q.shape[-1] ** -0.5,
            implementation=options.implementation,
        )
        return out, cache

    return attend


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
        return token_logprobs(_apply(decoder, params, args[0], method="unembed"), args[1])

    out = jax.lax.map(one, (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], out)
