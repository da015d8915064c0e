"""The decoder gives transformers' logits, in one pass and through the paged cache token by token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_reference import CASES, VOCAB, make_model, our_params, reference_logits

from pallas_kernels import decode_attention, prefill_attention
from sparsejax.cache import CacheLayout, allocate, append, init_cache, slot_mapping
from sparsejax.models import Decoder, dense_causal_attend

PROMPT, CHUNK, STEPS = 40, 24, 6  # the prompt goes in as chunks of 24 and 16
TOLERANCE = 1e-4
GRANULARITIES = ("shared", "per_layer", "per_head")


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    model = make_model(name)
    config, params = our_params(model)
    tokens = np.random.default_rng(1).integers(0, VOCAB, PROMPT + STEPS).astype(np.int32)
    prompt, following = np.split(tokens, [PROMPT])
    expected, expected_steps = reference_logits(model, prompt, following)

    decoder = Decoder(config, jnp.float32)
    np.testing.assert_allclose(_dense(decoder, params, prompt), expected, atol=TOLERANCE, rtol=0)

    granularity = GRANULARITIES[list(CASES).index(name) % len(GRANULARITIES)]
    logits, steps = _paged(decoder, params, prompt, following, granularity)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(steps, expected_steps, atol=TOLERANCE, rtol=0)


# Every case is its own program that runs a few times, so compiling is nearly all of the time.
_OPTIONS = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
_jit = partial(jax.jit, static_argnums=0, compiler_options=_OPTIONS)


@_jit
def _dense(decoder, params, tokens):
    lengths = jnp.full(len(tokens), len(tokens))
    logits, _ = _apply(decoder, params, tokens, jnp.arange(len(tokens)), None, dense_causal_attend(1), lengths)
    return logits


def _paged(decoder, params, prompt, following, granularity):
    """Logits of the prompt, chunk by chunk, and of each following token, through a cache with pages of 4 tokens."""
    config = decoder.config
    layout = CacheLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_pages=20 * config.num_layers * config.num_kv_heads,
        max_rows=2,
        max_slots=48,
        page_size=4,
        granularity=granularity,
        dtype=jnp.float32,
    )
    cache, logits, steps = init_cache(layout), [], []
    for start in range(0, len(prompt), CHUNK):
        count = min(CHUNK, len(prompt) - start)
        chunk = np.pad(prompt[start : start + count], (0, CHUNK - count))
        out, cache = _prefill(decoder, params, cache, chunk, start, count, len(prompt))
        logits.append(out[:count])
    for index, token in enumerate(following):
        out, cache = _decode(decoder, params, cache, token, len(prompt) + index)
        steps.append(out)
    return np.concatenate(logits), np.stack(steps)


@partial(_jit, donate_argnums=2)
def _prefill(decoder, params, cache, tokens, start, count, length):
    index = jnp.arange(CHUNK)
    rows, starts = jnp.array([2, 0]), jnp.stack([0, count, count])
    history = cache.table.length
    cache, _ = allocate(cache, rows, jnp.stack([count, 0]))
    mapping = slot_mapping(cache, jnp.where(index < count, 2, 0), count - index)

    def attend(layer, q, k, v, k_pre_rope, cache):
        cache = append(cache, layer, mapping, k, v)
        return prefill_attention(
            q, k, v, cache.pool.k, cache.pool.v, cache.table.pages, history, rows, starts,
            address=cache.layout.address(layer), scale=q.shape[-1] ** -0.5,
        ), cache  # fmt: skip

    return _apply(decoder, params, tokens, start + index, cache, attend, jnp.full(CHUNK, length))


@partial(_jit, donate_argnums=2)
def _decode(decoder, params, cache, token, position):
    rows = jnp.array([2, 0])  # the second lane is idle
    cache, _ = allocate(cache, rows, jnp.array([1, 0]))
    mapping = slot_mapping(cache, rows, jnp.array([1, 1]))

    def attend(layer, q, k, v, k_pre_rope, cache):
        cache = append(cache, layer, mapping, k, v)
        return decode_attention(
            q, cache.pool.k, cache.pool.v, cache.table.pages, cache.table.length, rows,
            address=cache.layout.address(layer), num_kv_heads=k.shape[1], scale=q.shape[-1] ** -0.5,
        ), cache  # fmt: skip

    logits, cache = _apply(decoder, params, jnp.stack([token, 0]), jnp.stack([position, 0]), cache, attend, None)
    return logits[0], cache


def _apply(decoder, params, tokens, positions, cache, attend, rope_lengths):
    return decoder.apply({"params": params}, tokens, positions, cache, attend, rope_lengths=rope_lengths)
