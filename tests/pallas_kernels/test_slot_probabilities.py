"""What an observation layer sees: kernels and XLA program against the reference, and the kernels' lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, assert_same_attention, make_address, make_paged, normal, table_shape
from lowering import lower_for_h200, triton_calls

from pallas_kernels import (
    DecodeTile,
    SpanLimits,
    decode_attention_reference,
    decode_work_list,
    kept_logits,
    merge_items,
    slot_probabilities,
    slot_probabilities_reference,
    slot_probabilities_triton,
)

BLOCK = 16
TILE = DecodeTile(BLOCK, num_warps=2, num_stages=3)
LIMITS = SpanLimits(wave=4, min_span=2 * BLOCK, wave_span=2 * BLOCK, max_span=2 * BLOCK, multiple=BLOCK)
LENGTHS = (90, 1, BLOCK - 1, BLOCK + 1, 96)
MAX_SLOTS = 96
ROWS = jnp.array([3, 0, 5, 1, 2, 4], jnp.int32)
FIRST = jnp.array([2, 0, 3, 40, 0, 17], jnp.int32)
LAST = jnp.array([14, 0, 90, 85, 0, 17], jnp.int32)  # some candidates; no row; many; inside; none; none

attention = jax.jit(decode_attention_reference, static_argnames=("address", "num_kv_heads", "scale"))
reference = jax.jit(slot_probabilities_reference, static_argnames=("address", "num_kv_heads", "scale"))


def paged(granularity="shared", heads=2, dim=64, page=8, dtype=jnp.float32):
    # One length for all heads: candidates must be held by each of them.
    lengths = LENGTHS if granularity != "per_head" else (96,) * len(LENGTHS)
    return make_paged(
        lengths=lengths, granularity=granularity, heads=heads, dim=dim, page=page, columns=MAX_SLOTS // page,
        dtype=dtype,
    )  # fmt: skip


def run(case, q, heads, mode):
    work = decode_work_list(case.lengths, ROWS, num_kv_heads=heads, max_slots=MAX_SLOTS, limits=LIMITS)
    return slot_probabilities(
        q, *case[:4], ROWS, FIRST, LAST, address=case.address, num_kv_heads=heads, scale=q.shape[2] ** -0.5, work=work,
        tile=TILE, **mode,
    )  # fmt: skip


def candidates():
    slot = np.arange(MAX_SLOTS)
    return (slot >= np.asarray(FIRST)[:, None]) & (slot < np.asarray(LAST)[:, None])


def check(case, q, heads, group, mode, dtype):
    options = {"address": case.address, "num_kv_heads": heads, "scale": q.shape[2] ** -0.5}
    out, got = run(case, q, heads, mode)
    expected = np.asarray(reference(q, case.k_pages, case.page_table, ROWS, FIRST, LAST, **options))
    assert got.shape == (len(ROWS), MAX_SLOTS)
    assert got.dtype == jnp.float32
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    live = candidates()
    np.testing.assert_allclose(np.asarray(got)[live], expected[live], rtol=tolerance, atol=tolerance)
    # Every head spreads 1 over the candidates, so the largest of G * H heads add up to between 1 and G * H.
    sums = np.where(live, np.asarray(got), 0).sum(1)[live.any(1)]
    assert (sums > 1 - 10 * tolerance).all()
    assert (sums < heads * group + 10 * tolerance).all()
    attended = attention(q, *case[:4], ROWS, **options)
    assert_same_attention((out, attended[1]), attended, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("granularity", "heads", "group", "dim", "page", "dtype"),
    [
        ("shared", 2, 4, 64, 8, jnp.float32),
        ("shared", 1, 1, 64, 32, jnp.float16),
        ("per_head", 2, 7, 80, 4, jnp.bfloat16),
    ],
)
def test_normalised_over_the_candidates_and_the_largest_over_all_heads(
    mode, granularity, heads, group, dim, page, dtype
):
    case = paged(granularity, heads, dim, page, dtype)
    check(case, 3 * normal(1, len(ROWS), heads * group, dim, dtype=dtype), heads, group, mode, dtype)


def test_heads_merged_by_the_programs_that_end_them(monkeypatch):
    monkeypatch.setattr(merge_items, "_MANY_HEADS", 1)
    jax.clear_caches()
    q = 3 * normal(1, len(ROWS), 14, 80, dtype=jnp.bfloat16)
    check(paged("per_head", 2, 80, 4, jnp.bfloat16), q, 2, 7, {"implementation": "triton", "interpret": True}, q.dtype)
    jax.clear_caches()


def test_logits_that_have_no_place_are_computed_again(monkeypatch):
    monkeypatch.setattr(kept_logits, "_MOST_BYTES", 3 * kept_logits.ALIGNMENT * 4 * 4)
    monkeypatch.setattr(slot_probabilities_triton, "_MAX_BLOCK", 32)
    jax.clear_caches()
    case = paged(page=4)
    q = 3 * normal(1, len(ROWS), 8, 64, dtype=jnp.float32)
    check(case, q, 2, 4, {"implementation": "triton", "interpret": True}, jnp.float32)
    jax.clear_caches()


def test_sinks_far_above_the_candidates_do_not_drown_them():
    case = paged()
    q = normal(1, len(ROWS), 8, 64, dtype=jnp.float32)
    # Row 5 holds 96 slots; its sinks 0 .. 2 become 300 nats heavier than the rest.
    page = case.address.page(case.page_table[0, 5, 0, 0], jnp.arange(2))
    sink = 300 * 8 * q[2].reshape(2, 4, 64).mean(1) / jnp.square(q[2].reshape(2, 4, 64).mean(1)).sum(-1, keepdims=True)
    k_pages = case.k_pages.at[page, 0].set(sink)
    check(case._replace(k_pages=k_pages), q, 2, 4, {"implementation": "triton", "interpret": True}, jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("dim", "group"), [(64, 7), (128, 4), (128, 1), (256, 8)])
def test_default_tiles_on_the_gpu(dtype, dim, group):
    heads = 2
    case = make_paged(
        lengths=(0, 30000, 65, 1), granularity="shared", heads=heads, dim=dim, page=32, columns=1024, dtype=dtype
    )
    rows, first = jnp.array([2, 1, 4, 3], jnp.int32), jnp.array([8, 0, 0, 8], jnp.int32)
    last = jnp.array([29900, 0, 1, 20], jnp.int32)
    q = 3 * normal(1, len(rows), heads * group, dim, dtype=dtype)
    options = {"address": case.address, "num_kv_heads": heads, "scale": dim**-0.5}
    expected = np.asarray(reference(q, case.k_pages, case.page_table, rows, first, last, **options))
    results = [slot_probabilities(q, *case[:4], rows, first, last, implementation="triton", **options) for _ in "ab"]
    attended = attention(q, *case[:4], rows, **options)
    assert_same_attention((results[0][0], attended[1]), attended, dtype)
    slot = np.arange(expected.shape[1])
    live = (slot >= np.asarray(first)[:, None]) & (slot < np.asarray(last)[:, None])
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(np.asarray(results[0][1])[live], expected[live], rtol=tolerance, atol=1e-6)
    for _, got in results[1:]:
        np.testing.assert_array_equal(np.asarray(got)[live], np.asarray(results[0][1])[live])


@pytest.mark.parametrize(
    ("granularity", "batch", "q_heads", "heads", "dim", "dtype"),
    [
        ("shared", 8, 32, 8, 128, jnp.bfloat16),
        ("per_head", 256, 28, 4, 128, jnp.float16),
        ("shared", 8, 14, 2, 64, jnp.float32),
    ],
)
def test_lowers_for_cuda(granularity, batch, q_heads, heads, dim, dtype):
    layers, table_heads = table_shape(granularity, heads)
    shape, rows = jax.ShapeDtypeStruct, batch + 1
    pool, lanes = shape((1 << 18, 32, dim), dtype), shape((batch,), jnp.int32)
    text = lower_for_h200(
        functools.partial(
            slot_probabilities, address=make_address(granularity, heads), num_kv_heads=heads, scale=1.0
        ),
        shape((batch, q_heads, dim), dtype), pool, pool, shape((layers, rows, table_heads, 4096), jnp.int32),
        shape((layers, rows, table_heads), jnp.int32), lanes, lanes, lanes,
    )  # fmt: skip
    assert triton_calls(text) == (5 if batch == 8 else 3)  # few heads are merged, and summed in parts, by more kernels


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"first": jnp.zeros(3, jnp.int32)}, ValueError, "first has shape"),
        ({"last": jnp.zeros(2)}, TypeError, "last must be int32"),
        ({"q": jnp.zeros((2, 8, 32))}, ValueError, "q has shape"),
        ({"q": jnp.zeros((2, 8, 64), jnp.int32)}, TypeError, "q must be bfloat16, float16 or float32"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    pool, two = jnp.zeros((17, 4, 64)), jnp.array([1, 2], jnp.int32)
    arguments = {
        "q": jnp.zeros((2, 8, 64)),
        "k_pages": pool,
        "v_pages": pool,
        "page_table": jnp.zeros((2, 3, 2, 2), jnp.int32),
        "lengths": jnp.zeros((2, 3, 2), jnp.int32),
        "rows": two,
        "first": two,
        "last": two,
    }
    with pytest.raises(error, match=message):
        slot_probabilities(**{**arguments, **change}, address=make_address("per_head", 2), num_kv_heads=2, scale=1.0)
