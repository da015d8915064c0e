"""Rotating q and k and storing k and v in one go: against the reference, against doing it apart, lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import GRANULARITIES, MODES, TOLERANCE, make_address, normal, table_shape
from lowering import donated_arguments, kernel_aliases, lower_for_h200, triton_calls

from pallas_kernels import rotate, rotate_and_store, rotate_and_store_reference, store_kv


def make_case(granularity, heads, group, dim, page, tokens, dtype, entries=12):
    """Random pools and heads, distinct targets; every third token is padding, and its heads are NaN."""
    rng = np.random.default_rng(0)
    address = make_address(granularity, heads)
    layers, table_heads = table_shape(granularity, heads)
    place = rng.permutation(np.arange(page, entries * page))[: tokens * table_heads].reshape(tokens, table_heads)
    place[::3] = rng.integers(0, page, place[::3].shape)  # entry 0
    place = np.broadcast_to(place, (layers, *place.shape))
    pages = entries * address.entry_stride
    angle = normal(5, tokens, dim // 2, dtype=jnp.float32)
    arguments = (
        normal(1, pages, page, dim, dtype=dtype),
        normal(2, pages, page, dim, dtype=dtype),
        normal(3, tokens, (group + 2) * heads, dim, dtype=dtype).at[::3].set(jnp.nan),
        jnp.cos(angle),
        jnp.sin(angle),
        jnp.asarray(place // page, jnp.int32),
        jnp.asarray(place % page, jnp.int32),
    )
    return arguments, {"num_kv_heads": heads, "address": address}


CASES = [
    ("shared", 2, 4, 64, 4, 17, jnp.float32),
    ("per_layer", 3, 1, 80, 8, 8, jnp.bfloat16),
    ("per_head", 2, 7, 128, 1, 5, jnp.float16),
    ("per_head", 3, 2, 96, 4, 1, jnp.float32),
    ("shared", 1, 7, 64, 16, 9, jnp.bfloat16),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_rotates_and_writes_the_tokens_and_nothing_else(mode, case):
    arguments, options = make_case(*case)
    got = rotate_and_store(*arguments, **options, **mode)
    tolerance = TOLERANCE[jnp.dtype(case[-1])]
    for one, expected in zip(got, rotate_and_store_reference(*arguments, **options), strict=True):
        assert one.dtype == case[-1]
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
        )
    np.testing.assert_array_equal(np.isnan(got[1]), False)  # nothing of the padding


@pytest.mark.parametrize("mode", MODES)
def test_equals_rotating_and_then_storing(mode):
    (k_pages, v_pages, qkv, cos, sin, *where), options = make_case("per_head", 2, 4, 64, 4, 7, jnp.bfloat16)
    q, k, v = jnp.split(qkv, [8, 10], axis=1)
    stored = store_kv(k_pages, v_pages, rotate(k, cos, sin), v, *where, address=options["address"], **mode)
    got = rotate_and_store(k_pages, v_pages, qkv, cos, sin, *where, **options, **mode)
    for one, apart in zip(got, (rotate(q, cos, sin), *stored), strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(apart, np.float32), rtol=1e-2, atol=1e-2
        )  # fmt: skip


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(("heads", "group", "dim", "tokens"), [(8, 4, 128, 256), (4, 7, 128, 1), (6, 1, 80, 32)])
def test_lowers_for_cuda_in_place(granularity, heads, group, dim, tokens):
    layers, table_heads = table_shape(granularity, heads)
    shape = jax.ShapeDtypeStruct
    pool, new = shape((1 << 18, 32, dim), jnp.bfloat16), shape((tokens, (group + 2) * heads, dim), jnp.bfloat16)
    angle, where = shape((tokens, dim // 2), jnp.float32), shape((layers, tokens, table_heads), jnp.int32)
    function = functools.partial(rotate_and_store, num_kv_heads=heads, address=make_address(granularity, heads))
    text = lower_for_h200(function, pool, pool, new, angle, angle, where, where, donate_argnums=(0, 1))
    assert (donated_arguments(text), triton_calls(text), kernel_aliases(text)) == (2, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "qkv has 8 heads"),
        ({"cos": jnp.zeros((6, 64))}, "cos has shape"),
        ({"entry": jnp.zeros((1, 5, 1), jnp.int32)}, "entry has shape"),
        ({"entry": jnp.zeros((1, 6, 3), jnp.int32), "slot": jnp.zeros((1, 6, 3), jnp.int32)}, "head axis of entry"),
    ],
)
def test_errors_name_the_argument(change, message):
    arguments, options = make_case("shared", 2, 2, 64, 4, 6, jnp.float32)
    names = ("k_pages", "v_pages", "qkv", "cos", "sin", "entry", "slot")
    with pytest.raises(ValueError, match=message):
        rotate_and_store(**{**dict(zip(names, arguments, strict=True)), **options, **change})
