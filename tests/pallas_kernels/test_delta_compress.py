"""The search for references through the slot table, and the latents made with what it finds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, TOLERANCE, make_address, make_paged, normal
from lowering import lower_for_h200, triton_calls

from pallas_kernels import (
    SearchTile,
    delta_compress,
    delta_compress_reference,
    reference_mean,
    reference_mean_reference,
    reference_search,
    reference_search_reference,
)
from pallas_kernels.centers import center_count

SINKS, STEP, NEIGHBORS = 3, 4, 4
# First position and number of tokens of each segment; the last segment is empty.
SEGMENTS = ((0, 21), (137, 16), (2, 3), (100, 0))
STARTS = jnp.array([0, 21, 37, 40, 40], jnp.int32)
TOKENS = 43  # three of padding
ROWS = jnp.array([2, 3, 1, 4], jnp.int32)


def make(heads, dim, page, dtype):
    """(paged case, whose row rows[s] holds the centers up to the end of segment s; positions i32[TOKENS])."""
    counts = [0] * 4
    for row, (first, tokens) in zip(ROWS.tolist(), SEGMENTS, strict=True):
        counts[row - 1] = center_count(first + tokens, sinks=SINKS, step=STEP)
    case = make_paged(
        lengths=counts, granularity="shared", heads=heads, dim=dim, page=page, columns=-(-64 // page), dtype=dtype
    )
    positions = np.concatenate([np.arange(first, first + tokens) for first, tokens in SEGMENTS])
    return case, jnp.asarray(np.pad(positions, (0, TOKENS - positions.size)), jnp.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("heads", "dim", "page", "dtype", "metric", "keys_only"),
    [
        (2, 16, 8, jnp.float32, "l2", False),
        (1, 80, 4, jnp.bfloat16, "l2", False),
        (2, 64, 32, jnp.bfloat16, "dot", True),
        (3, 32, 16, jnp.float32, "cosine", False),
    ],
)
def test_finds_the_nearest_centers_before_each_token(mode, heads, dim, page, dtype, metric, keys_only):
    case, positions = make(heads, dim, page, dtype)
    x = normal(1, TOKENS, (1 if keys_only else 2) * heads * dim, dtype=jnp.float32)
    arguments = (x, case.k_pages, case.v_pages, case.page_table, ROWS, STARTS, positions)
    options = {
        "address": case.address, "num_kv_heads": heads, "neighbors": NEIGHBORS, "sinks": SINKS, "step": STEP,
        "metric": metric,
    }  # fmt: skip
    # Several blocks and parts of centers, several tiles of tokens.
    got = reference_search(*arguments, **options, tile=SearchTile(16, 16, 16, 4, 1), **mode)
    np.testing.assert_array_equal(got, reference_search_reference(*arguments, **options))


@pytest.mark.parametrize("mode", MODES)
def test_equal_centers_are_told_apart_by_their_order(mode):
    case, positions = make(2, 16, 8, jnp.float32)
    same = jnp.ones_like(case.k_pages)
    x = jnp.ones((TOKENS, 64))
    ids = reference_search(
        x, same, same, case.page_table, ROWS, STARTS, positions, address=case.address, num_kv_heads=2,
        neighbors=NEIGHBORS, sinks=SINKS, step=STEP, **mode,
    )  # fmt: skip
    assert np.asarray(ids[:5]).tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert np.asarray(ids[40:]).tolist() == [[0] * 4] * 3


def references(case):
    """Random ids i32[TOKENS, K] of centers that every segment's row holds."""
    held = np.asarray(case.lengths)[0, np.asarray(ROWS), 0]
    counts = np.repeat(held[:3], np.diff(np.asarray(STARTS))[:3])
    ids = np.random.default_rng(5).integers(0, counts[:, None], (counts.size, NEIGHBORS))
    return jnp.asarray(np.pad(ids, ((0, TOKENS - counts.size), (0, 0))), jnp.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("heads", "dim", "size", "page", "dtype"),
    [(2, 16, 32, 8, jnp.float32), (1, 80, 40, 4, jnp.bfloat16), (2, 64, 64, 32, jnp.bfloat16)],
)
def test_latents_are_projected_differences_from_the_mean(mode, heads, dim, size, page, dtype):
    case, _ = make(heads, dim, page, dtype)
    ids = references(case)
    where = (case.k_pages, case.v_pages, case.page_table, ROWS, STARTS, ids)
    options = {"address": case.address, "num_kv_heads": heads}
    tolerance = TOLERANCE[jnp.dtype(dtype)]
    real = int(STARTS[-1])
    mean = reference_mean(*where, **options, **mode)
    assert mean.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(mean, np.float32)[:real],
        reference_mean_reference(*where, **options)[:real],
        rtol=tolerance,
        atol=tolerance,
    )
    x = normal(1, TOKENS, 2 * heads * dim, dtype=dtype)
    down = normal(2, 2 * heads * dim, size, dtype=dtype) * (2 * heads * dim) ** -0.5
    z = delta_compress(x, *where, down, **options, **mode)
    assert z.dtype == jnp.float32
    expected = delta_compress_reference(x, *where, down, **options)
    np.testing.assert_allclose(z[:real], expected[:real], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("tokens", "segments", "heads", "dim", "size", "dtype", "metric", "keys_only"),
    [
        (8192, 1, 8, 128, 512, jnp.bfloat16, "l2", False),
        (1024, 8, 8, 128, 512, jnp.bfloat16, "dot", True),
        (2048, 1, 4, 128, 256, jnp.bfloat16, "cosine", False),
        (200, 3, 2, 80, 96, jnp.float32, "l2", False),
    ],
)
def test_lowers_for_cuda_at_production_shapes(tokens, segments, heads, dim, size, dtype, metric, keys_only):
    shape = jax.ShapeDtypeStruct
    pool = shape((440 * 2 * heads, 32, dim), dtype)
    features = 2 * heads * dim
    address = make_address("shared", heads)
    options = {"address": address, "num_kv_heads": heads}
    where = (
        pool,
        pool,
        shape((1, segments + 1, 1, 440), jnp.int32),
        shape((segments,), jnp.int32),
        shape((segments + 1,), jnp.int32),
    )
    search = functools.partial(reference_search, neighbors=4, sinks=16, step=10, metric=metric, **options)
    text = lower_for_h200(
        search, shape((tokens, features // (2 if keys_only else 1)), dtype), *where, shape((tokens,), jnp.int32)
    )
    assert triton_calls(text) == (1 if metric == "dot" else 2)
    x, ids = shape((tokens, features), dtype), shape((tokens, 4), jnp.int32)
    text = lower_for_h200(functools.partial(delta_compress, **options), x, *where, ids, shape((features, size), dtype))
    assert triton_calls(text) == 1
    assert triton_calls(lower_for_h200(functools.partial(reference_mean, **options), *where, ids)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "l1"}, "metric must be one of"),
        ({"x": jnp.zeros((TOKENS, 48))}, "x has 48 numbers"),
        ({"neighbors": 0}, "neighbors must be at least 1"),
        ({"starts": STARTS[1:]}, "starts has shape"),
    ],
)
def test_errors_name_the_argument(change, message):
    case, positions = make(2, 16, 8, jnp.float32)
    arguments = {
        "x": jnp.zeros((TOKENS, 64)), "k_pages": case.k_pages, "v_pages": case.v_pages, "page_table": case.page_table,
        "rows": ROWS, "starts": STARTS, "positions": positions, "address": case.address, "num_kv_heads": 2,
        "neighbors": 4, "sinks": SINKS, "step": STEP,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        reference_search(**{**arguments, **change})
