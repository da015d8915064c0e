"""Choosing the next token from logits, on the device: penalties, temperature, min-p, top-k, top-p, one draw per row.

Pure functions of arrays. Every row stands alone: its draw depends on its own seed and its own count of generated
tokens, never on its lane or on the other rows of the batch. B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.engine.requests.sampling_params import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS, SamplingParams

MAX_EOS_IDS = 16
MAX_STOP_IDS = MAX_STOP_TOKEN_IDS + MAX_EOS_IDS
NEVER = -jnp.inf  # logit of a token that cannot be drawn
NOT_FINITE = -1  # instead of a token, where logits are NaN or infinite


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """The sampling parameters of B requests, as arrays. Meanings are those of `SamplingParams`.

    Attributes:
      temperature: f32[B], 0 for greedy.
      top_k: i32[B], 0 for off.
      top_p: f32[B].
      min_p: f32[B].
      repetition, presence, frequency: f32[B], penalties.
      seed: u32[B].
      min_tokens: i32[B].
      stop_ids: i32[B, MAX_STOP_IDS], tokens that min_tokens holds back, -1 for none.
    """

    temperature: jax.Array | np.ndarray
    top_k: jax.Array | np.ndarray
    top_p: jax.Array | np.ndarray
    min_p: jax.Array | np.ndarray
    repetition: jax.Array | np.ndarray
    presence: jax.Array | np.ndarray
    frequency: jax.Array | np.ndarray
    seed: jax.Array | np.ndarray
    min_tokens: jax.Array | np.ndarray
    stop_ids: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleOutput:
    """The chosen tokens. All but `token` are None unless log-probabilities were asked for.

    Log-probabilities are those of the raw logits: what the model says, before penalties, temperature and filters.

    Attributes:
      token: i32[B]; NOT_FINITE where there is none.
      logprob: f32[B], of the chosen token.
      rank: i32[B], of the chosen token: 1 if no token is more likely.
      top_ids: i32[B, MAX_LOGPROBS], the likeliest tokens, likeliest first (-1 beyond the vocabulary).
      top_logprobs: f32[B, MAX_LOGPROBS].
    """

    token: jax.Array
    logprob: jax.Array | None = None
    rank: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def to_rows(params: Sequence[SamplingParams], eos_token_ids: Sequence[int], seeds: Sequence[int]) -> RowSampling:
    """The parameters of a batch as numpy arrays.

    Args:
      params: of each row.
      eos_token_ids: the model's end tokens, at most MAX_EOS_IDS.
      seeds: of each row, in [0, 2^32).
    """
    if len(eos_token_ids) > MAX_EOS_IDS:
        raise ValueError(f"eos_token_ids may have at most {MAX_EOS_IDS} ids, got {len(eos_token_ids)}.")
    stop_ids = np.full((len(params), MAX_STOP_IDS), -1, np.int32)
    for row, each in zip(stop_ids, params, strict=True):
        if each.min_tokens:
            held_back = each.stop_ids if each.ignore_eos else (*each.stop_ids, *eos_token_ids)
            row[: len(held_back)] = held_back

    def column(name: str, dtype: type = np.float32) -> np.ndarray:
        return np.array([getattr(each, name) for each in params], dtype)

    return RowSampling(
        temperature=column("temperature"),
        top_k=np.minimum([each.top_k for each in params], np.iinfo(np.int32).max).astype(np.int32),
        top_p=column("top_p"),
        min_p=column("min_p"),
        repetition=column("repetition_penalty"),
        presence=column("presence_penalty"),
        frequency=column("frequency_penalty"),
        seed=np.array(seeds, np.uint32),
        min_tokens=np.minimum([each.min_tokens for each in params], np.iinfo(np.int32).max).astype(np.int32),
        stop_ids=stop_ids,
    )


def greedy(logits: jax.Array) -> SampleOutput:
    """The most likely token of each row (the lowest id of equals). logits: f32[B, V]."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return SampleOutput(token=_where_finite(logits, best, best))


def _where_finite(logits: jax.Array, best: jax.Array, token: jax.Array) -> jax.Array:
    """`token` i32[B], or NOT_FINITE; `best` is each row's argmax, which finds a NaN before any number.

    Some logits of -inf are tokens that are not wanted; all of them are no choice.
    """
    largest = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0]
    return jnp.where(jnp.isfinite(largest), token, NOT_FINITE)


def sample(
    logits: jax.Array,
    rows: RowSampling,
    *,
    prompt_seen: jax.Array,
    output_count: jax.Array,
    num_output: jax.Array,
    want_logprobs: bool,
) -> SampleOutput:
    """Draws each row's next token.

    Args:
      logits: f32[B, V], raw.
      rows: the rows' parameters.
      prompt_seen: bool[B, V], tokens that occur in the prompt.
      output_count: i32[B, V], how often each token was generated.
      num_output: i32[B], tokens generated so far; it numbers the row's draws.
      want_logprobs: static; fill in the log-probabilities.
    """
    adjusted = penalise(logits, rows, prompt_seen=prompt_seen, output_count=output_count, num_output=num_output)
    best = jnp.argmax(adjusted, axis=-1).astype(jnp.int32)
    draws = jnp.asarray(rows.temperature) > 0
    token = jax.lax.cond(
        draws.any(),
        lambda: jnp.where(draws, _draw(support(adjusted, rows), rows.seed, num_output), best),
        lambda: best,
    )
    token = _where_finite(adjusted, best, token)
    return token_logprobs(logits, token) if want_logprobs else SampleOutput(token=token)


def penalise(
    logits: jax.Array, rows: RowSampling, *, prompt_seen: jax.Array, output_count: jax.Array, num_output: jax.Array
) -> jax.Array:
    """The logits after the minimum length and the penalties, f32[B, V]; arguments as in `sample`.

    Repetition as in Keskar et al., 2019 (CTRL), over prompt and answer; presence and frequency over the answer.
    """
    count = output_count.astype(jnp.float32)
    generated = output_count > 0
    repetition = _column(rows.repetition)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(prompt_seen | generated, repeated, logits)
    logits = logits - _column(rows.frequency) * count - _column(rows.presence) * generated
    held_back = num_output < rows.min_tokens
    stop_ids = jnp.where(held_back[:, None] & (rows.stop_ids >= 0), rows.stop_ids, logits.shape[-1])
    lane = jnp.arange(logits.shape[0])[:, None]
    return logits.at[lane, stop_ids].set(NEVER, mode="drop")


def support(logits: jax.Array, rows: RowSampling) -> jax.Array:
    """Logits after temperature, and NEVER where min-p, top-k or top-p rule a token out. f32[B, V], largest 0.

    Rows of temperature 0 come out as if it were 1: they do not draw.
    """
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    # With the maximum at 0 no temperature overflows, and min-p is a threshold: p / p_max = exp(scaled).
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / _column(temperature)
    scaled = jnp.where(scaled >= jnp.log(_column(rows.min_p)), scaled, NEVER)
    filters = (rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1))
    # Sorting the vocabulary costs more than all the rest, so it is skipped when no row needs it.
    return jax.lax.cond(filters.any(), lambda: _top_k_top_p(scaled, rows), lambda: scaled)


def _top_k_top_p(scaled: jax.Array, rows: RowSampling) -> jax.Array:
    vocabulary = scaled.shape[-1]
    descending = -jnp.sort(-scaled, axis=-1)
    place = jnp.arange(vocabulary)[None, :]
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocabulary), vocabulary)
    descending = jnp.where(place < top_k[:, None], descending, NEVER)
    probability = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    inside = (before < _column(rows.top_p)) | (_column(rows.top_p) >= 1)
    # The likeliest token always stays: a tiny top_p must not empty the support.
    inside = (inside & (descending > NEVER)) | (place == 0)
    kept = inside.sum(axis=-1, keepdims=True)
    # Back in vocabulary order: all above the smallest kept value, and of its equals the lowest ids.
    smallest = jnp.take_along_axis(descending, kept - 1, axis=-1)
    above = scaled > smallest
    equal = scaled == smallest
    keep = above | (equal & (jnp.cumsum(equal, axis=-1) <= kept - above.sum(axis=-1, keepdims=True)))
    return jnp.where(keep, scaled, NEVER)


def _draw(logits: jax.Array, seed: jax.Array | np.ndarray, num_output: jax.Array) -> jax.Array:
    """One draw a row from softmax(logits), i32[B]: the Gumbel-max trick, with noise indexed by token id."""

    def noise(seed, number):
        # The generator is named, so that no global setting changes what a seed means.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    return jnp.argmax(logits + jax.vmap(noise)(seed, num_output), axis=-1).astype(jnp.int32)


def token_logprobs(logits: jax.Array, token: jax.Array) -> SampleOutput:
    """Log-probabilities of given tokens and of their likeliest rivals. logits f32[B, V], token i32[B]."""
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    top, top_ids = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    absent = MAX_LOGPROBS - top.shape[-1]
    return SampleOutput(
        token=token,
        logprob=chosen[:, 0] - total,
        rank=1 + (logits > chosen).sum(axis=-1, dtype=jnp.int32),
        top_ids=jnp.pad(top_ids.astype(jnp.int32), ((0, 0), (0, absent)), constant_values=-1),
        top_logprobs=jnp.pad(top - total[:, None], ((0, 0), (0, absent)), constant_values=NEVER),
    )


def _column(values: jax.Array | np.ndarray) -> jax.Array:
    return jnp.asarray(values)[:, None]
