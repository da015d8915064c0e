"""Prefill attention: the kernel and the XLA program against the reference, and the kernel's lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, assert_same_attention, make_address, make_paged, normal, table_shape
from lowering import lower_for_h200, triton_calls

from pallas_kernels import PrefillTile, decode_attention, prefill_attention, prefill_attention_reference

BLOCK = 16
TILE = PrefillTile(BLOCK, BLOCK, num_warps=2, num_stages=2)
HISTORY = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 64)
# Segments of 1, block, 0, block + 1, 20 and 3 tokens, then 5 tokens of padding.
ROWS = jnp.array([2, 6, 3, 1, 5, 4], jnp.int32)
STARTS = jnp.array([0, 1, 17, 17, 34, 54, 57], jnp.int32)
TOKENS = 62

reference = jax.jit(prefill_attention_reference, static_argnames=("address", "scale"))


def inputs(tokens, q_heads, heads, dim, dtype):
    return (
        normal(1, tokens, q_heads, dim, dtype=dtype),
        normal(2, tokens, heads, dim, dtype=dtype),
        normal(3, tokens, heads, dim, dtype=dtype),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("granularity", "heads", "group", "dim", "page", "dtype"),
    [
        ("shared", 2, 4, 64, 4, jnp.float32),
        ("per_layer", 2, 7, 80, 8, jnp.bfloat16),
        ("per_head", 2, 1, 128, 1, jnp.float32),
        ("per_head", 3, 2, 96, 32, jnp.float16),
    ],
)
def test_attends_to_history_and_causally_to_the_segment(mode, granularity, heads, group, dim, page, dtype):
    case = make_paged(
        lengths=HISTORY, granularity=granularity, heads=heads, dim=dim, page=page, columns=64 // page, dtype=dtype
    )
    q, k, v = inputs(TOKENS, heads * group, heads, dim, dtype)
    arguments = (q, k, v, *case[:4], ROWS, STARTS)
    got = prefill_attention(*arguments, address=case.address, scale=dim**-0.5, return_lse=True, tile=TILE, **mode)
    expected = reference(*arguments, address=case.address, scale=dim**-0.5)
    assert_same_attention(got, expected, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_padding_may_be_anything_and_yields_nothing(mode):
    case = make_paged(lengths=HISTORY, granularity="shared", heads=2, dim=64, page=8, columns=8, dtype=jnp.float32)
    q, k, v = (x.at[40:].set(jnp.nan) for x in inputs(TOKENS, 4, 2, 64, jnp.float32))
    starts = jnp.array([0, 30, 30, 40, 40], jnp.int32)
    rows = jnp.array([3, 0, 5, 0], jnp.int32)
    arguments = (q, k, v, *case[:4], rows, starts)
    call = functools.partial(prefill_attention, address=case.address, scale=0.125, return_lse=True, tile=TILE, **mode)
    expected = reference(*arguments, address=case.address, scale=0.125)
    assert_same_attention(call(*arguments), expected, jnp.float32)
    nothing = call(*arguments[:-1], jnp.zeros(5, jnp.int32))
    assert not np.asarray(nothing[0]).any()


@pytest.mark.parametrize("mode", MODES)
def test_default_tiles(mode):
    tokens = 150 if mode.get("interpret") else 700
    case = make_paged(
        lengths=(300, 37), granularity="per_head", heads=2, dim=128, page=32, columns=10, dtype=jnp.bfloat16
    )
    q, k, v = inputs(tokens, 4, 2, 128, jnp.bfloat16)
    rows, starts = jnp.array([2, 1], jnp.int32), jnp.array([0, 20, tokens - 1], jnp.int32)
    arguments = (q, k, v, *case[:4], rows, starts)
    got = prefill_attention(*arguments, address=case.address, scale=128**-0.5, return_lse=True, **mode)
    expected = reference(*arguments, address=case.address, scale=128**-0.5)
    assert_same_attention(got, expected, jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_default_tile_on_the_gpu(dtype, dim):
    case = make_paged(lengths=(300, 37), granularity="shared", heads=2, dim=dim, page=32, columns=10, dtype=dtype)
    q, k, v = inputs(400, 14, 2, dim, dtype)
    arguments = (q, k, v, *case[:4], jnp.array([2, 1], jnp.int32), jnp.array([0, 20, 390], jnp.int32))
    got = prefill_attention(*arguments, address=case.address, scale=dim**-0.5, return_lse=True, implementation="triton")
    assert_same_attention(got, reference(*arguments, address=case.address, scale=dim**-0.5), dtype)


@pytest.mark.parametrize("mode", [{"implementation": "xla"}, {"implementation": "triton", "interpret": True}])
@pytest.mark.parametrize(("tokens", "segments"), [(0, 1), (5, 0)])
def test_nothing_to_do(mode, tokens, segments):
    case = make_paged(lengths=(3,), granularity="shared", heads=2, dim=64, page=4, columns=2, dtype=jnp.float32)
    rows, starts = jnp.ones(segments, jnp.int32), jnp.zeros(segments + 1, jnp.int32)
    out, lse = prefill_attention(
        *inputs(tokens, 4, 2, 64, jnp.float32), *case[:4], rows, starts, address=case.address, scale=1.0,
        return_lse=True, **mode,
    )  # fmt: skip
    assert (out.shape, lse.shape) == ((tokens, 4, 64), (tokens, 4))
    assert not np.asarray(out).any()


def test_one_token_equals_decode_with_that_token_in_the_pool():
    case = make_paged(lengths=(21,), granularity="shared", heads=2, dim=64, page=8, columns=4, dtype=jnp.float32)
    q = normal(1, 1, 8, 64, dtype=jnp.float32)
    page = case.address.page(case.page_table[0, 1, 0, 20 // 8], jnp.arange(2))
    k, v = case.k_pages[page, 20 % 8][None], case.v_pages[page, 20 % 8][None]
    row = jnp.array([1], jnp.int32)
    whole = decode_attention(q, *case[:4], row, address=case.address, num_kv_heads=2, scale=0.125)
    split = prefill_attention(
        q, k, v, *case[:3], case.lengths - 1, row, jnp.array([0, 1], jnp.int32), address=case.address, scale=0.125
    )
    np.testing.assert_allclose(split, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "tokens", "segments", "q_heads", "heads", "dim", "dtype"),
    [
        ("per_head", 8192, 32, 32, 8, 128, jnp.bfloat16),
        ("shared", 2048, 8, 28, 4, 128, jnp.float16),
        ("per_layer", 16, 4, 14, 2, 64, jnp.float32),
        ("per_head", 512, 8, 32, 32, 80, jnp.bfloat16),
        ("shared", 512, 8, 8, 2, 256, jnp.bfloat16),
    ],
)
def test_lowers_for_cuda_at_production_shapes(granularity, tokens, segments, q_heads, heads, dim, dtype):
    layers, table_heads = table_shape(granularity, heads)
    shape = jax.ShapeDtypeStruct
    pool = shape((1 << 18, 32, dim), dtype)
    new = shape((tokens, heads, dim), dtype)
    text = lower_for_h200(
        functools.partial(
            prefill_attention, address=make_address(granularity, heads), scale=1.0, implementation="triton"
        ),
        shape((tokens, q_heads, dim), dtype),
        new,
        new,
        pool,
        pool,
        shape((layers, 65, table_heads, 4096), jnp.int32),
        shape((layers, 65, table_heads), jnp.int32),
        shape((segments,), jnp.int32),
        shape((segments + 1,), jnp.int32),
    )
    assert triton_calls(text) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"starts": jnp.zeros(2, jnp.int32)}, "starts has shape"),
        ({"k": jnp.zeros((3, 2, 64))}, "k has shape"),
        ({"history": jnp.zeros((1, 2, 2), jnp.int32)}, "history has shape"),
    ],
)
def test_errors_name_the_argument(change, message):
    case = make_paged(lengths=(3, 5), granularity="shared", heads=2, dim=64, page=4, columns=2, dtype=jnp.float32)
    q, k, v = inputs(4, 4, 2, 64, jnp.float32)
    arguments = {"q": q, "k": k, "v": v, "k_pages": case.k_pages, "v_pages": case.v_pages}
    arguments |= {"page_table": case.page_table, "history": case.lengths, "address": case.address}
    arguments |= {"rows": jnp.array([1, 2], jnp.int32), "starts": jnp.array([0, 2, 4], jnp.int32)}
    with pytest.raises(ValueError, match=message):
        prefill_attention(**{**arguments, **change}, scale=1.0)
