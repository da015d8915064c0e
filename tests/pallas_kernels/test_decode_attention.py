"""Decode attention: the kernel and the XLA program against the reference, and the kernel's lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    LAYER,
    MODES,
    assert_same_attention,
    make_address,
    make_paged,
    normal,
    table_shape,
)
from lowering import lower_for_h200, triton_calls

from pallas_kernels import (
    EMPTY_LSE,
    DecodeTile,
    SpanLimits,
    decode_attention,
    decode_attention_reference,
    decode_work_list,
    merge_items,
)

BLOCK = 16
TILE = DecodeTile(BLOCK, num_warps=2, num_stages=3)
# Spans of two blocks, so that the longer heads are merged from several.
LIMITS = SpanLimits(wave=4, min_span=2 * BLOCK, wave_span=2 * BLOCK, max_span=2 * BLOCK, multiple=BLOCK)
LENGTHS = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 96)
MAX_SLOTS = 96
ROWS = jnp.array([3, 0, 6, 1, 2, 5, 4], jnp.int32)


run_reference = jax.jit(decode_attention_reference, static_argnames=("address", "num_kv_heads", "scale"))


def attend(case, q, heads, mode, indices=None, rows=ROWS):
    """decode_attention with small tiles and spans -> (out, lse)."""
    scale = q.shape[2] ** -0.5
    work = decode_work_list(
        case.lengths,
        rows,
        num_kv_heads=heads,
        max_slots=MAX_SLOTS,
        num_indices=None if indices is None else indices.shape[2],
        limits=LIMITS,
    )
    return decode_attention(
        q, *case[:4], rows, address=case.address, num_kv_heads=heads, indices=indices, scale=scale, return_lse=True,
        work=work, tile=TILE, **mode,
    )  # fmt: skip


def reference(case, q, heads, indices=None, rows=ROWS):
    return run_reference(
        q, *case[:4], rows, address=case.address, num_kv_heads=heads, indices=indices, scale=q.shape[2] ** -0.5
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("granularity", "heads", "group", "dim", "page", "dtype"),
    [
        ("shared", 2, 4, 64, 4, jnp.float32),
        ("shared", 3, 1, 96, 32, jnp.float16),
        ("per_layer", 2, 7, 80, 8, jnp.bfloat16),
        ("per_head", 2, 4, 128, 1, jnp.float32),
        ("per_head", 2, 7, 64, 16, jnp.bfloat16),
        ("per_head", 1, 20, 256, 8, jnp.float32),
    ],
)
def test_attends_to_exactly_the_held_slots(mode, granularity, heads, group, dim, page, dtype):
    case = make_paged(
        lengths=LENGTHS,
        granularity=granularity,
        heads=heads,
        dim=dim,
        page=page,
        columns=MAX_SLOTS // page,
        dtype=dtype,
    )
    q = normal(1, len(ROWS), heads * group, dim, dtype=dtype)
    assert_same_attention(attend(case, q, heads, mode), reference(case, q, heads), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("granularity", "per_head"), [("shared", False), ("shared", True), ("per_head", True)])
def test_reads_only_the_listed_slots(mode, granularity, per_head):
    heads, group, dim, page, count = 2, 4, 64, 4, 40
    case = make_paged(
        lengths=LENGTHS,
        granularity=granularity,
        heads=heads,
        dim=dim,
        page=page,
        columns=MAX_SLOTS // page,
        dtype=jnp.float32,
    )
    rng = np.random.default_rng(2)
    indices = np.stack(
        [rng.permutation(MAX_SLOTS + 20)[:count] - 10 for _ in range(len(ROWS) * (heads if per_head else 1))]
    ).reshape(len(ROWS), -1, count)
    indices[2] = -1  # a long head that reads nothing after all
    indices = jnp.asarray(indices, jnp.int32)
    q = normal(1, len(ROWS), heads * group, dim, dtype=jnp.float32)
    got = attend(case, q, heads, mode, indices)
    assert (np.asarray(got[1][2]) == np.float32(EMPTY_LSE)).all()
    assert_same_attention(got, reference(case, q, heads, indices), jnp.float32)


@pytest.mark.parametrize("mode", MODES)
def test_listing_every_slot_equals_reading_all(mode):
    case = make_paged(lengths=LENGTHS, granularity="per_head", heads=2, dim=64, page=8, columns=12, dtype=jnp.float32)
    q = normal(1, len(ROWS), 8, 64, dtype=jnp.float32)
    order = np.random.default_rng(3).permutation(MAX_SLOTS)
    indices = jnp.broadcast_to(jnp.asarray(order, jnp.int32), (len(ROWS), 1, MAX_SLOTS))
    assert_same_attention(attend(case, q, 2, mode, indices), attend(case, q, 2, mode), jnp.float32)


@pytest.mark.parametrize(
    ("limits", "granularity", "group", "dim", "same"),
    [
        ({"_MANY_HEADS": 1}, "per_head", 7, 64, True),  # by the last program of a head
        ({"_MANY_HEADS": 1, "_TILE_AT_THE_END": 512}, "shared", 3, 80, False),  # which reads them one by one
        ({"_TILE": 128}, "shared", 3, 80, True),  # by a kernel, some elements by each program
    ],
)
def test_items_are_merged_alike_in_any_way(monkeypatch, limits, granularity, group, dim, same):
    """same: bit for bit, as the items are added up in as many steps."""
    case = make_paged(
        lengths=LENGTHS, granularity=granularity, heads=2, dim=dim, page=8, columns=MAX_SLOTS // 8, dtype=jnp.float32
    )
    q = normal(1, len(ROWS), 2 * group, dim, dtype=jnp.float32)
    mode = {"implementation": "triton", "interpret": True}
    usual = attend(case, q, 2, mode)
    for limit, value in limits.items():
        monkeypatch.setattr(merge_items, limit, value)
    jax.clear_caches()
    other = attend(case, q, 2, mode)
    jax.clear_caches()
    tolerance = {} if same else {"rtol": 1e-5, "atol": 1e-6}
    compare = np.testing.assert_array_equal if same else np.testing.assert_allclose
    jax.tree.map(functools.partial(compare, **tolerance), other, usual)
    assert_same_attention(other, reference(case, q, 2), jnp.float32)


@pytest.mark.parametrize("mode", MODES)
def test_default_tiles_and_work_list(mode):
    lengths = (0, 700, 3, 257) if mode.get("interpret") else (0, 5000, 33, 2049)
    heads, dim, page = 2, 128, 32
    case = make_paged(
        lengths=lengths,
        granularity="per_head",
        heads=heads,
        dim=dim,
        page=page,
        columns=-(-max(lengths) // page),
        dtype=jnp.bfloat16,
    )
    rows = jnp.array([2, 1, 4, 0, 3], jnp.int32)
    q = normal(1, len(rows), heads * 4, dim, dtype=jnp.bfloat16)
    call = functools.partial(
        decode_attention, address=case.address, num_kv_heads=heads, scale=dim**-0.5, return_lse=True, **mode
    )
    assert_same_attention(call(q, *case[:4], rows), reference(case, q, heads, rows=rows), jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 7, 8])
def test_every_default_tile_on_the_gpu(dtype, dim, group):
    heads, page, lengths = 2, 32, (0, 3000, 65, 1)
    case = make_paged(lengths=lengths, granularity="per_head", heads=heads, dim=dim, page=page, columns=94, dtype=dtype)
    rows = jnp.array([2, 1, 4, 3], jnp.int32)
    q = normal(1, len(rows), heads * group, dim, dtype=dtype)
    got = decode_attention(
        q,
        *case[:4],
        rows,
        address=case.address,
        num_kv_heads=heads,
        scale=dim**-0.5,
        return_lse=True,
        implementation="triton",
    )
    assert_same_attention(got, reference(case, q, heads, rows=rows), dtype)


def test_the_reference_is_softmax_attention():
    case = make_paged(lengths=(37,), granularity="shared", heads=2, dim=64, page=8, columns=8, dtype=jnp.float32)
    q = normal(1, 1, 8, 64, dtype=jnp.float32)
    slot = jnp.arange(37)
    page = case.page_table[0, 1, 0, slot // 8]
    k, v = (
        jnp.stack([pool[case.address.page(page, h), slot % 8] for h in range(2)], axis=1)[None]
        for pool in (case.k_pages, case.v_pages)
    )
    out, _ = reference(case, q, 2, rows=jnp.array([1], jnp.int32))
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(q[:, None], k, v)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("granularity", "batch", "q_heads", "heads", "dim", "columns", "num_indices", "dtype"),
    [
        ("per_head", 64, 32, 8, 128, 4096, None, jnp.bfloat16),
        ("shared", 1, 28, 4, 128, 4096, 2048, jnp.bfloat16),
        ("per_layer", 256, 32, 32, 80, 64, None, jnp.float16),
        ("per_head", 8, 14, 2, 64, 1024, None, jnp.float32),
        ("shared", 8, 8, 2, 256, 1024, None, jnp.bfloat16),
    ],
)
def test_lowers_for_cuda_at_production_shapes(granularity, batch, q_heads, heads, dim, columns, num_indices, dtype):
    layers, table_heads = table_shape(granularity, heads)
    shape = jax.ShapeDtypeStruct
    pool = shape((1 << 18, 32, dim), dtype)
    rows = batch + 1
    function = functools.partial(
        decode_attention, address=make_address(granularity, heads), num_kv_heads=heads, scale=1.0, return_lse=True
    )
    indices = None if num_indices is None else shape((batch, heads, num_indices), jnp.int32)
    text = lower_for_h200(
        lambda q, k, v, table, lengths, rows, indices: function(q, k, v, table, lengths, rows, indices=indices),
        shape((batch, q_heads, dim), dtype),
        pool,
        pool,
        shape((layers, rows, table_heads, columns), jnp.int32),
        shape((layers, rows, table_heads), jnp.int32),
        shape((batch,), jnp.int32),
        indices,
    )
    assert triton_calls(text) == (1 if batch * heads >= 256 else 2)  # few heads are merged by a second kernel


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"q": jnp.zeros((2, 8, 32))}, "q has shape"),
        ({"rows": jnp.zeros(3, jnp.int32)}, "rows has shape"),
        ({"indices": jnp.zeros((2, 3, 4), jnp.int32)}, "indices"),
        ({"lengths": jnp.zeros((2, 3, 1), jnp.int32)}, "lengths has shape"),
        ({"address": make_address("per_head", 2)}, "address"),
        ({"indices": jnp.zeros((2, 2, 0), jnp.int32)}, "indices"),
        ({"page_table": jnp.zeros((1, 3, 1, 0), jnp.int32)}, "page_table has no columns"),
        ({"scale": 0.0}, "scale must be positive"),
    ],
)
def test_errors_name_the_argument(change, message):
    case = make_paged(lengths=(3, 5), granularity="shared", heads=2, dim=64, page=4, columns=2, dtype=jnp.float32)
    arguments = {**case._asdict(), "q": jnp.zeros((2, 8, 64)), "rows": jnp.array([1, 2], jnp.int32), "num_kv_heads": 2}
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**arguments, "scale": 1.0, **change})


@pytest.mark.parametrize("mode", [{"implementation": "xla"}, {"implementation": "triton", "interpret": True}])
def test_an_empty_batch_gives_an_empty_result(mode):
    case = make_paged(lengths=(3,), granularity="shared", heads=2, dim=64, page=4, columns=2, dtype=jnp.float32)
    q, rows = jnp.zeros((0, 8, 64), jnp.bfloat16), jnp.zeros(0, jnp.int32)
    out, lse = decode_attention(
        q, *case[:4], rows, address=case.address, num_kv_heads=2, scale=1.0, return_lse=True, **mode
    )
    assert (out.shape, out.dtype, lse.shape) == (q.shape, q.dtype, (0, 8))


def test_the_layer_of_the_cases_is_not_the_first():
    assert LAYER > 0  # otherwise no test would notice a wrong layer offset
