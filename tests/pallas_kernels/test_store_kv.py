"""Storing K and V: every implementation against the reference, lowering for CUDA, and writing in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import GRANULARITIES, LAYER, MODES, make_address, normal, table_shape
from lowering import donated_arguments, kernel_aliases, lower_for_h200, triton_calls

from pallas_kernels import PageAddress, store_kv, store_kv_reference


def make_store(granularity, heads, dim, page, tokens, dtype, entries=12):
    """Pools with random contents and distinct targets; every third token is padding."""
    rng = np.random.default_rng(0)
    address = make_address(granularity, heads)
    layers, table_heads = table_shape(granularity, heads)
    pages = entries * address.entry_stride
    # Distinct (entry, slot) pairs over tokens and table heads.
    place = rng.permutation(np.arange(page, entries * page))[: tokens * table_heads].reshape(tokens, table_heads)
    place[::3] = rng.integers(0, page, place[::3].shape)  # entry 0
    place = np.broadcast_to(place, (layers, *place.shape))
    return (
        normal(1, pages, page, dim, dtype=dtype),
        normal(2, pages, page, dim, dtype=dtype),
        normal(3, tokens, heads, dim, dtype=dtype),
        normal(4, tokens, heads, dim, dtype=dtype),
        jnp.asarray(place // page, jnp.int32),
        jnp.asarray(place % page, jnp.int32),
    ), address


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("granularity", "heads", "dim", "page", "tokens", "dtype"),
    [
        ("shared", 2, 64, 4, 17, jnp.float32),
        ("per_layer", 3, 80, 8, 8, jnp.bfloat16),
        ("per_head", 2, 128, 1, 5, jnp.float16),
        ("per_head", 3, 96, 4, 1, jnp.float32),
        ("shared", 1, 64, 16, 9, jnp.bfloat16),
    ],
)
def test_writes_the_tokens_and_nothing_else(mode, granularity, heads, dim, page, tokens, dtype):
    arguments, address = make_store(granularity, heads, dim, page, tokens, dtype)
    got = store_kv(*arguments, address=address, **mode)
    for pool, expected in zip(got, store_kv_reference(*arguments, address=address), strict=True):
        np.testing.assert_array_equal(np.asarray(pool, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("mode", MODES)
def test_padding_alone_changes_nothing(mode):
    (k_pages, v_pages, k, v, entry, slot), address = make_store("per_head", 2, 64, 4, 6, jnp.float32)
    got = store_kv(k_pages, v_pages, k, v, entry * 0, slot, address=address, **mode)
    np.testing.assert_array_equal(got[0], k_pages)
    np.testing.assert_array_equal(got[1], v_pages)


def test_casts_to_the_dtype_of_the_pools():
    (k_pages, v_pages, k, v, entry, slot), address = make_store("shared", 2, 64, 4, 6, jnp.bfloat16)
    wide = store_kv(k_pages, v_pages, k.astype(jnp.float32), v.astype(jnp.float32), entry, slot, address=address)
    same = store_kv(k_pages, v_pages, k, v, entry, slot, address=address)
    assert wide[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide[0], same[0])


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("heads", "dim", "tokens"), [(8, 128, 8192), (6, 80, 1), (32, 256, 256)])
def test_lowers_for_cuda_in_place(implementation, granularity, heads, dim, tokens):
    layers, table_heads = table_shape(granularity, heads)
    shape = jax.ShapeDtypeStruct
    pool, new = shape((1 << 18, 32, dim), jnp.bfloat16), shape((tokens, heads, dim), jnp.bfloat16)
    where = shape((layers, tokens, table_heads), jnp.int32)
    store = functools.partial(store_kv, address=make_address(granularity, heads), implementation=implementation)
    text = lower_for_h200(store, pool, pool, new, new, where, where, donate_argnums=(0, 1))
    assert donated_arguments(text) == 2
    if implementation == "triton":
        assert (triton_calls(text), kernel_aliases(text)) == (1, 2)


def test_donated_pools_are_not_copied():
    arguments, address = make_store("shared", 2, 64, 32, 8, jnp.float32, entries=200)
    compiled = jax.jit(functools.partial(store_kv, address=address), donate_argnums=(0, 1)).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    pools = 2 * arguments[0].nbytes
    assert memory.alias_size_in_bytes >= pools
    assert memory.temp_size_in_bytes < pools / 50


def test_errors_name_the_argument():
    (k_pages, v_pages, k, v, entry, slot), address = make_store("shared", 2, 64, 4, 6, jnp.float32)
    with pytest.raises(ValueError, match="entry has shape"):
        store_kv(k_pages, v_pages, k, v, entry[:, :5], slot, address=address)
    with pytest.raises(ValueError, match="head axis of entry"):
        store_kv(
            k_pages, v_pages, k, v, jnp.zeros((1, 6, 3), jnp.int32), jnp.zeros((1, 6, 3), jnp.int32), address=address
        )
    with pytest.raises(TypeError, match="entry must be int32"):
        store_kv(k_pages, v_pages, k, v, entry.astype(jnp.uint32), slot, address=address)
    with pytest.raises(ValueError, match="table_layer"):
        store_kv(k_pages, v_pages, k, v, entry, slot, address=make_address("per_layer", 2))
    assert LAYER == 1  # the layer that the last line asks for


def test_layers_share_one_kernel():
    shape = jax.ShapeDtypeStruct
    pool, new, where = shape((64, 8, 64), jnp.bfloat16), shape((4, 2, 64), jnp.bfloat16), shape((1, 4, 1), jnp.int32)

    def store(k_pages, v_pages, k, v, entry, slot):
        for layer in range(3):
            address = PageAddress(0, 6, 2 * layer, 1)
            k_pages, v_pages = store_kv(k_pages, v_pages, k, v, entry, slot, address=address)
        return k_pages, v_pages

    assert triton_calls(lower_for_h200(store, pool, pool, new, new, where, where, donate_argnums=(0, 1))) == 1
