"""gather_slots against what was written into a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import cache as kv
from sparsejax.methods import gather_slots
from sparsejax.models.rope import RopeConfig, apply_rope, rope_cos_sin

LAYERS, HEADS, DIM, PAGE = 2, 2, 8, 4


def key(layer, head, position):
    """What the tests write as the key of a token."""
    return np.sin(1.0 + np.arange(DIM) + 10 * layer + 100 * head + 1000 * position).astype(np.float32)


LENGTHS = {1: 5, 2: 13}


@functools.cache
def filled():
    """A cache whose rows 1 and 2 hold 5 and 13 tokens, in text order."""
    layout = kv.CacheLayout(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=64,
        max_rows=3,
        max_slots=16,
        page_size=PAGE,
        granularity="per_head",
        dtype=jnp.float32,
        with_score=True,
        with_position=True,
    )
    rows = np.repeat(list(LENGTHS), list(LENGTHS.values())).astype(np.int32)
    position = np.concatenate([np.arange(length) for length in LENGTHS.values()]).astype(np.int32)
    back = np.concatenate([np.arange(length, 0, -1) for length in LENGTHS.values()]).astype(np.int32)
    keys = np.array([[[key(layer, h, t) for h in range(HEADS)] for t in position] for layer in range(LAYERS)])

    @jax.jit
    def fill(keys):
        cache, ok = kv.allocate(kv.init_cache(layout), jnp.array(list(LENGTHS)), jnp.array(list(LENGTHS.values())))
        mapping = kv.slot_mapping(cache, jnp.asarray(rows), jnp.asarray(back))
        for layer in range(LAYERS):
            cache = kv.append(cache, layer, mapping, keys[layer], -keys[layer])
        return kv.stamp(cache, mapping, jnp.asarray(position)), ok

    cache, ok = fill(keys)
    assert ok
    return cache


def gathered(cache, rows, text_length, **options):
    count = len(rows)
    numbers = {name: jnp.zeros(count, jnp.int32) for name in ("sink_tokens", "recent_tokens", "window_tokens")}
    settings = {
        "max_slots": 14,
        "text_length": jnp.asarray(text_length, jnp.int32),
        "recorded": jnp.zeros(count, jnp.int32),
        "seed": jnp.zeros(count, jnp.uint32),
        "num_query_heads": 4,
        **numbers,
    }
    return gather_slots(cache, jnp.asarray(rows, jnp.int32), **(settings | options))


def test_a_view_shows_what_the_cache_holds_after_an_eviction():
    keep = np.random.default_rng(0).random((LAYERS, 1, HEADS, 16)) < 0.5
    cache, ok = jax.jit(kv.compact)(filled(), jnp.array([2]), jnp.asarray(keep))
    assert ok
    rows, text_length = [2, 0, 1], [13, 0, 5]
    slots = gathered(cache, rows, text_length, sink_tokens=jnp.array([2, 2, 2]), recent_tokens=jnp.array([3, 3, 0]))
    assert slots.live.shape == (LAYERS, 3, HEADS, 16)
    assert slots.group_size == 2
    assert slots.page_size == PAGE
    for layer in range(LAYERS):
        view = slots.layer(layer)
        k, v = np.asarray(view.k), np.asarray(view.v)
        for lane, head in np.ndindex(3, HEADS):
            live, position = np.asarray(view.live[lane, head]), np.asarray(view.position[lane, head])
            expected = set(range(text_length[lane]))
            if rows[lane] == 2:
                expected &= set(np.flatnonzero(keep[layer, 0, head]).tolist())
            assert sorted(position[live]) == sorted(expected)
            for slot in np.flatnonzero(live):
                np.testing.assert_array_equal(k[lane, head, slot], key(layer, head, position[slot]))
                np.testing.assert_array_equal(v[lane, head, slot], -k[lane, head, slot])
                edge = position[slot] < 2 or (rows[lane] == 2 and position[slot] >= 10)
                assert bool(view.protected[lane, head, slot]) == edge
            assert np.all(position[~live] == -1)
            assert not np.any(k[lane, head, ~live])
            assert not np.any(np.asarray(view.protected[lane, head])[~live])


def test_slots_without_a_position_are_dead():
    cache = filled()
    page = int(cache.table.pages[0, 1, 1, 0])
    assert cache.pool.position is not None
    assert cache.pool.score is not None
    pool = dataclasses.replace(
        cache.pool, position=cache.pool.position.at[page, 2].set(-1), score=cache.pool.score.at[page, 2].set(7.0)
    )
    slots = gathered(dataclasses.replace(cache, pool=pool), [1], [5])
    live = np.asarray(slots.live)
    assert live.sum() == LAYERS * HEADS * 5 - 1
    assert not live[0, 0, 1, 2]
    assert slots.score[0, 0, 1, 2] == 0


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_rotation_and_its_scale_are_undone(kind):
    config = RopeConfig(kind=kind, factor=4.0, original_max_position_embeddings=8)
    cache = filled()

    def rope(position):
        cos, sin = rope_cos_sin(config, DIM, position.reshape(-1))
        return cos.reshape(*position.shape, -1), sin.reshape(*position.shape, -1)

    view = gathered(cache, [2], [13], rope=rope).layer(1)
    before = np.asarray(view.k_before_rope())[0, 0, :13]
    cos, sin = rope_cos_sin(config, DIM, jnp.arange(13, dtype=jnp.int32))
    again = apply_rope(jnp.asarray(before)[:, None], cos, sin)[:, 0]
    np.testing.assert_allclose(again, [key(1, 0, t) for t in range(13)], atol=1e-5)
    assert np.abs(before - np.asarray(view.k)[0, 0, :13]).max() > 0.1


def test_what_was_not_given_is_an_error():
    slots = gathered(filled(), [1], [5])
    with pytest.raises(ValueError, match="RoPE angles were not given"):
        slots.layer(0).k_before_rope()
    with pytest.raises(ValueError, match="output projection was not given"):
        slots.layer(0).output_kernel()
    with_kernel = gathered(filled(), [1], [5], output_kernel=lambda layer: jnp.full((4, DIM, 3), layer))
    assert with_kernel.layer(1).output_kernel()[0, 0, 0] == 1
    with pytest.raises(ValueError, match="must set unrolls_layers"):
        with_kernel.layer(jnp.int32(1)).output_kernel()


def test_a_cache_without_scores_is_refused():
    layout = kv.CacheLayout(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4, max_rows=1, max_slots=8)
    with pytest.raises(ValueError, match='must have granularity "per_head", scores and positions'):
        gathered(kv.init_cache(layout), [1], [5])
