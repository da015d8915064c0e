"""Bounds of the keys of pages: kernels and XLA programs against the references, and their lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, make_address, make_paged, normal, table_shape
from lowering import donated_arguments, kernel_aliases, lower_for_h200, triton_calls

from pallas_kernels import (
    page_upper_bounds,
    page_upper_bounds_reference,
    update_page_bounds,
    update_page_bounds_reference,
)

LENGTHS = (0, 1, 15, 96, 70)
COLUMNS = 96
ROWS = jnp.array([3, 0, 5, 1, 2, 4], jnp.int32)
CASES = [
    ("shared", 2, 4, 64, 8, jnp.float32),
    ("per_head", 2, 7, 80, 4, jnp.bfloat16),
    ("per_layer", 3, 1, 64, 1, jnp.float16),
]


def held_pages(case, page):
    """Every (entry, count) of the layer's rows, in an order of its own for each head: i32[N, Ht] twice."""
    table = np.asarray(case.page_table[case.address.table_layer])  # [R, Ht, M]
    length = np.asarray(case.lengths[case.address.table_layer])  # [R, Ht]
    count = np.clip(length[..., None] - page * np.arange(table.shape[2]), 0, page)
    entry, count = (x.swapaxes(1, 2).reshape(-1, table.shape[1]).astype(np.int32) for x in (table, count))
    return jnp.asarray(np.where(count > 0, entry, 0)), jnp.asarray(count)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("granularity", "heads", "group", "dim", "page", "dtype"), CASES)
def test_bounds_of_what_pages_hold(mode, granularity, heads, group, dim, page, dtype):
    case = make_paged(
        lengths=LENGTHS, granularity=granularity, heads=heads, dim=dim, page=page, columns=COLUMNS // page, dtype=dtype
    )
    options = {"address": case.address, "num_kv_heads": heads}
    entry, count = held_pages(case, page)
    before = normal(3, case.k_pages.shape[0], 2, dim, dtype=dtype)
    expected = np.asarray(update_page_bounds_reference(before, case.k_pages, entry, count, **options))
    bounds = update_page_bounds(before, case.k_pages, entry, count, **options, **mode)
    assert bounds.dtype == dtype
    np.testing.assert_array_equal(np.asarray(bounds, np.float32), expected.astype(np.float32))

    q = normal(1, len(ROWS), heads * group, dim, dtype=dtype)
    got = page_upper_bounds(q, bounds, case.page_table, case.lengths, ROWS, **options, page_size=page, **mode)
    most = page_upper_bounds_reference(q, bounds, case.page_table, ROWS, **options)
    assert got.shape == most.shape == (len(ROWS), heads, COLUMNS // page)
    length = np.broadcast_to(case.lengths[case.address.table_layer][ROWS], got.shape[:2])
    held = page * np.arange(got.shape[2]) < length[..., None]
    np.testing.assert_allclose(np.asarray(got)[held], np.asarray(most)[held], rtol=1e-5, atol=1e-4)
    # No key has a larger logit.
    table = np.broadcast_to(case.page_table[case.address.table_layer][ROWS], got.shape)
    k = np.asarray(case.k_pages, np.float32)[case.address.page(table, np.arange(heads)[:, None])]
    logits = np.einsum("bhgd,bhmpd->bhmp", np.asarray(q, np.float32).reshape(len(ROWS), heads, group, dim)[:, :, :1], k)
    slot = page * np.arange(got.shape[2])[:, None] + np.arange(page)
    logits = np.where(slot < length[..., None, None], logits, -np.inf).max(axis=3)
    assert (logits <= np.asarray(got) + 1e-3)[held].all()


@pytest.mark.parametrize(
    ("granularity", "batch", "dtype"), [("shared", 8, jnp.bfloat16), ("per_head", 64, jnp.float32)]
)
def test_lowers_for_cuda(granularity, batch, dtype):
    heads, dim, page, columns = 8, 128, 32, 4096
    layers, table_heads = table_shape(granularity, heads)
    shape = jax.ShapeDtypeStruct
    bounds, entry = shape((1 << 18, 2, dim), dtype), shape((2048, table_heads), jnp.int32)
    options = {"address": make_address(granularity, heads), "num_kv_heads": heads}
    text = lower_for_h200(
        functools.partial(update_page_bounds, **options), bounds, shape((1 << 18, page, dim), dtype), entry, entry,
        donate_argnums=0,
    )  # fmt: skip
    assert (triton_calls(text), kernel_aliases(text), donated_arguments(text)) == (1, 1, 1)
    table, lengths = (layers, batch + 1, table_heads, columns), (layers, batch + 1, table_heads)
    text = lower_for_h200(
        functools.partial(page_upper_bounds, page_size=page, **options), shape((batch, 32, dim), dtype), bounds,
        shape(table, jnp.int32), shape(lengths, jnp.int32), shape((batch,), jnp.int32),
    )  # fmt: skip
    assert triton_calls(text) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bounds": jnp.zeros((17, 3, 64))}, ValueError, "bounds has shape"),
        ({"bounds": jnp.zeros((17, 2, 64), jnp.bfloat16)}, TypeError, "bounds must be float32"),
        ({"count": jnp.zeros((2, 1), jnp.int32)}, ValueError, "count has shape"),
        ({"entry": jnp.zeros((3, 1))}, TypeError, "entry must be int32"),
        ({"k_pages": jnp.zeros((17, 3, 64))}, ValueError, "page size .* must be a power of two, got 3"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    zero = jnp.zeros((3, 1), jnp.int32)
    arguments = {"bounds": jnp.zeros((17, 2, 64)), "k_pages": jnp.zeros((17, 4, 64)), "entry": zero, "count": zero}
    with pytest.raises(error, match=message):
        update_page_bounds(**{**arguments, **change}, address=make_address("shared", 2), num_kv_heads=2)
