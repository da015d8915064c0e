"""Recorded attention: the kernel and the XLA program against the reference, and the kernel's lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, make_address, make_paged, normal, table_shape
from lowering import donated_arguments, kernel_aliases, lower_for_h200, triton_calls

from pallas_kernels import (
    RecordTile,
    SpanLimits,
    decode_attention,
    prefill_attention_reference,
    record_attention,
    record_attention_reference,
)

BLOCK = 16
TILE = RecordTile(few=(64, BLOCK), many=(BLOCK, 2 * BLOCK), num_warps=2, num_stages=2)
LIMITS = SpanLimits(wave=4, min_span=2 * BLOCK, wave_span=2 * BLOCK, max_span=2 * BLOCK, multiple=BLOCK)
# Slots of rows 1 .. 6 with the chunk's; segments of 1, 16, 0, 17, 20 and 3 tokens, then 5 tokens of padding.
LENGTHS = (20, 17, 17, 30, 64, 19)
COLUMNS_SLOTS = 64
ROWS = jnp.array([2, 6, 3, 1, 5, 4], jnp.int32)
STARTS = jnp.array([0, 1, 17, 17, 34, 54, 57], jnp.int32)
FIRST = jnp.array([0, 14, 17, 10, 30, 57], jnp.int32)
POWER = jnp.array([1, 2, 1, 1, 2, 1], jnp.int32)
TOKENS = 62

reference = jax.jit(record_attention_reference, static_argnames=("address", "num_kv_heads", "scale", "own", "reduce"))
prefill_reference = jax.jit(prefill_attention_reference, static_argnames=("address", "scale"))


def history_of(lengths, own):
    """Slots held before the chunk when `lengths` are held after it."""
    if not own:
        return lengths
    taken = jnp.zeros(lengths.shape[1], jnp.int32).at[ROWS].add(jnp.diff(STARTS))
    return jnp.maximum(lengths - taken[:, None], 0)


def log_sum_exps(q, case, history, heads, own, scale):
    """f32[T, Hq] of the attention that is recorded, by prefill attention over K as both K and V."""
    tokens, page_size = q.shape[0], case.k_pages.shape[1]
    if own:
        keys, table, held = (np.asarray(x) for x in (case.k_pages.astype(jnp.float32), case.page_table, history))
        new = np.zeros((tokens, heads, q.shape[2]), np.float32)
        for s, row in enumerate(ROWS.tolist()):
            count = int(STARTS[s + 1] - STARTS[s])
            for h in range(heads):
                th = h if history.shape[2] > 1 else 0
                slot = held[case.address.table_layer, row, th] + np.arange(count)
                page = case.address.page(table[case.address.table_layer, row, th, slot // page_size], h)
                new[STARTS[s] : STARTS[s + 1], h] = keys[page, slot % page_size]
        new = jnp.asarray(new, q.dtype)
        arguments = (q, new, new, case.k_pages, case.k_pages, case.page_table, history, ROWS, STARTS)
        return prefill_reference(*arguments, address=case.address, scale=scale)[1]
    return 1.0 + normal(9, tokens, q.shape[1], dtype=jnp.float32) ** 2 + jnp.log(COLUMNS_SLOTS)


def paged(granularity, heads, dim, page, dtype):
    return make_paged(
        lengths=LENGTHS if granularity != "per_head" else (64,) * 6,
        granularity=granularity,
        heads=heads,
        dim=dim,
        page=page,
        columns=COLUMNS_SLOTS // page,
        dtype=dtype,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("granularity", "heads", "group", "dim", "page", "dtype", "own", "reduce"),
    [
        ("shared", 2, 4, 64, 4, jnp.float32, True, "sum"),
        ("per_head", 2, 7, 80, 8, jnp.bfloat16, True, "sum"),
        ("per_head", 2, 1, 64, 16, jnp.float32, True, "max"),
        ("per_layer", 1, 4, 128, 32, jnp.float16, False, "sum"),
        ("per_head", 3, 2, 64, 1, jnp.float32, False, "max"),
    ],
)
def test_adds_what_the_recorded_queries_attended_to(mode, granularity, heads, group, dim, page, dtype, own, reduce):
    case = paged(granularity, heads, dim, page, dtype)
    history = history_of(case.lengths, own)
    if granularity == "per_head":  # ragged: fewer slots for some heads, and none for one
        history = history.at[:, 5, 0].set(0).at[:, 6, 1:].add(-9)
    q = normal(1, TOKENS, heads * group, dim, dtype=dtype).at[57:].set(jnp.nan)
    lse = log_sum_exps(q, case, history, heads, own, dim**-0.5)
    score = jnp.abs(normal(2, *case.k_pages.shape[:2], dtype=jnp.float32)) * 0.1
    arguments = (score, q, lse, case.k_pages, case.page_table, history, ROWS, STARTS, FIRST, POWER)
    options = {"address": case.address, "num_kv_heads": heads, "scale": dim**-0.5, "own": own, "reduce": reduce}
    expected = np.asarray(reference(*arguments, **options))
    got = np.asarray(record_attention(*arguments, tile=TILE, limits=LIMITS, **options, **mode))
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    untouched = expected == np.asarray(score)
    assert 0 < untouched.sum() < untouched.size
    np.testing.assert_array_equal(got[untouched], np.asarray(score)[untouched])


@pytest.mark.parametrize("mode", MODES)
def test_the_mass_of_a_query_head_is_one_and_chunks_add_up(mode):
    case = make_paged(lengths=(50,), granularity="per_head", heads=2, dim=64, page=8, columns=8, dtype=jnp.float32)
    rows, score = jnp.array([1], jnp.int32), jnp.zeros(case.k_pages.shape[:2])
    q = normal(1, 30, 8, 64, dtype=jnp.float32)
    lse = jnp.stack([
        decode_attention(
            q[t : t + 1], *case[:3], jnp.full_like(case.lengths, 20 + t + 1), rows, address=case.address,
            num_kv_heads=2, scale=0.125, return_lse=True,
        )[1][0]
        for t in range(30)
    ])  # fmt: skip

    def record(score, low, high, first):
        return record_attention(
            score, q[low:high], lse[low:high], case.k_pages, case.page_table, jnp.full_like(case.lengths, 20 + low),
            rows, jnp.array([0, high - low], jnp.int32), jnp.array([first - low], jnp.int32), jnp.ones(1, jnp.int32),
            address=case.address, num_kv_heads=2, scale=0.125, **mode,
        )  # fmt: skip

    whole = record(score, 0, 30, 7)
    np.testing.assert_allclose(whole.sum(), 23 * 8, rtol=1e-5)
    parts = record(record(score, 0, 13, 7), 13, 30, 7)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_segments_that_record_nothing_are_untouched(mode, reduce):
    case = paged("per_head", 2, 64, 8, jnp.float32)
    score = -jnp.ones(case.k_pages.shape[:2])
    q, lse = normal(1, TOKENS, 4, 64, dtype=jnp.float32), jnp.zeros((TOKENS, 4))
    history = history_of(case.lengths, True)
    for first, power in ((STARTS[1:], POWER), (FIRST, jnp.zeros_like(POWER))):
        got = record_attention(
            score, q, lse, case.k_pages, case.page_table, history, ROWS, STARTS, first, power, address=case.address,
            num_kv_heads=2, scale=1.0, reduce=reduce, **mode,
        )  # fmt: skip
        np.testing.assert_array_equal(got, score)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("dim", "group"), [(64, 7), (80, 1), (128, 4), (256, 8)])
@pytest.mark.parametrize("window", [16, 400])
def test_default_tiles_on_the_gpu(dtype, dim, group, window):
    heads, chunk = 2, 400
    case = make_paged(
        lengths=(3000, 500), granularity="per_head", heads=heads, dim=dim, page=32, columns=110, dtype=dtype
    )
    case = case._replace(lengths=case.lengths.at[:, 1:].set(jnp.array([[2600, 90], [100, 3]])))
    q = normal(1, chunk, heads * group, dim, dtype=dtype)
    lse = 5.0 + normal(2, chunk, heads * group, dtype=jnp.float32)
    rows, starts = jnp.array([2, 1], jnp.int32), jnp.array([0, 40, 390], jnp.int32)
    first, power = jnp.maximum(starts[1:] - window, 0), jnp.array([1, 2], jnp.int32)
    score = jnp.zeros(case.k_pages.shape[:2])
    arguments = (score, q, lse, jnp.nan_to_num(case.k_pages), case.page_table, case.lengths, rows, starts, first, power)
    options = {"address": case.address, "num_kv_heads": heads, "scale": dim**-0.5}
    expected = np.asarray(reference(*arguments, **options))
    results = [record_attention(*arguments, implementation="triton", **options) for _ in range(2)]
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(results[0], expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize(
    ("granularity", "tokens", "segments", "q_heads", "heads", "dim", "dtype", "own", "reduce"),
    [
        ("per_head", 8192, 32, 32, 8, 128, jnp.bfloat16, True, "sum"),
        ("per_head", 512, 8, 28, 4, 128, jnp.float16, False, "sum"),
        ("shared", 16, 4, 14, 2, 64, jnp.float32, True, "max"),
        ("per_layer", 512, 8, 32, 32, 80, jnp.bfloat16, False, "max"),
        ("per_head", 512, 8, 8, 2, 256, jnp.bfloat16, True, "sum"),
    ],
)
def test_lowers_for_cuda_in_place(granularity, tokens, segments, q_heads, heads, dim, dtype, own, reduce):
    layers, table_heads = table_shape(granularity, heads)
    shape = jax.ShapeDtypeStruct
    pool = shape((1 << 18, 32, dim), dtype)
    text = lower_for_h200(
        functools.partial(
            record_attention, address=make_address(granularity, heads), num_kv_heads=heads, scale=1.0, own=own,
            reduce=reduce,
        ),
        shape(pool.shape[:2], jnp.float32),
        shape((tokens, q_heads, dim), dtype),
        shape((tokens, q_heads), jnp.float32),
        pool,
        shape((layers, 65, table_heads, 4096), jnp.int32),
        shape((layers, 65, table_heads), jnp.int32),
        shape((segments,), jnp.int32),
        shape((segments + 1,), jnp.int32),
        shape((segments,), jnp.int32),
        shape((segments,), jnp.int32),
        donate_argnums=0,
    )  # fmt: skip
    assert (triton_calls(text), kernel_aliases(text), donated_arguments(text)) == (1, 1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lse": jnp.zeros((4, 2))}, ValueError, "lse has shape"),
        ({"first": jnp.zeros(2, jnp.int32)}, ValueError, "first has shape"),
        ({"power": jnp.ones(1)}, TypeError, "power must be int32"),
        ({"score": jnp.zeros((9, 4), jnp.float16)}, TypeError, "score must be float32"),
        ({"reduce": "mean"}, ValueError, "reduce must be one of"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {
        "score": jnp.zeros((9, 4)),
        "q": jnp.zeros((4, 4, 64)),
        "lse": jnp.zeros((4, 4)),
        "k_pages": jnp.zeros((9, 4, 64)),
        "page_table": jnp.zeros((2, 3, 2, 2), jnp.int32),
        "history": jnp.zeros((2, 3, 2), jnp.int32),
        "rows": jnp.ones(1, jnp.int32),
        "starts": jnp.array([0, 4], jnp.int32),
        "first": jnp.zeros(1, jnp.int32),
        "power": jnp.ones(1, jnp.int32),
    }
    with pytest.raises(error, match=message):
        record_attention(**{**arguments, **change}, address=make_address("per_head", 2), num_kv_heads=2, scale=1.0)
