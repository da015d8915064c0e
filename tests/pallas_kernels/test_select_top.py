"""The k largest of each row: kernels and XLA program against a stable sort, and the kernels' lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import MODES
from lowering import lower_for_h200, triton_calls

from pallas_kernels import select_top, select_top_reference, select_top_triton

ROWS, SIZE, K = 4, 300, 64
LONG = {"implementation": "triton", "interpret": True}


def expected(scores, first, last, count, k):
    """By numpy: the candidates by falling score, the lower slot first where scores are equal."""
    out = np.full((len(scores), k), -1, np.int32)
    for row, (start, stop, wanted) in enumerate(zip(first, last, count, strict=True)):
        candidates = np.arange(start, max(start, stop))
        best = candidates[np.argsort(-scores[row, candidates].astype(np.float64), kind="stable")]
        chosen = np.sort(best[: min(max(wanted, 0), k)])
        out[row, : len(chosen)] = chosen
    return out


def ints(*values):
    return np.asarray(values, np.int32)


@functools.lru_cache
def compiled(mode: tuple, k: int = K):
    return jax.jit(functools.partial(select_top, k=k, **dict(mode)))


def run(mode, scores, *ranges, k=K):
    return np.asarray(compiled(tuple(mode.items()), k)(scores, *ranges))


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.fixture(params=[1, 66])
def split_rows(request, monkeypatch):
    """Has rows of more than 128 slots cut into chunks: of 256, or of 128 where few chunks are 66."""
    monkeypatch.setattr(select_top_triton, "_FEW_CHUNKS", request.param)
    monkeypatch.setattr(select_top_triton, "_CHUNKS", (256, 128))
    monkeypatch.setattr(select_top_triton, "_BLOCK", 64)
    monkeypatch.setattr(select_top_triton, "_CHUNKS_PER_STEP", 2)
    monkeypatch.setattr(select_top_triton, "_SHORT", 128)
    jax.clear_caches()
    compiled.cache_clear()
    yield
    jax.clear_caches()
    compiled.cache_clear()


def cases():
    """Scores with ties, signs, both zeros and infinities; ranges empty, full and inside; counts 0, few, too many."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((ROWS, SIZE)).astype(np.float32)
    tied = rng.integers(-2, 3, (ROWS, SIZE)).astype(np.float32)
    tied[tied == 0] = rng.choice([0.0, -0.0], (tied == 0).sum())
    tiny = np.exp(-60 * rng.random((ROWS, SIZE))).astype(np.float32)
    extreme = rng.choice([np.inf, -np.inf, 3e38, -3e38, 1e-45, 0.0], (ROWS, SIZE)).astype(np.float32)
    ranges = [
        (ints(0, 4, 37, 290), ints(SIZE, 9, 299, SIZE), ints(K, 3, 20, 5)),
        (ints(0, 5, 7, 128), ints(SIZE, 5, 8, 256), ints(1, 4, 4, 64)),
        (ints(0, 0, 100, 0), ints(64, 65, 200, 1), ints(100, 64, 0, 1)),
    ]
    for scores in (normal, tied, tiny, extreme):
        for some in ranges:
            yield scores, some


def check_all(mode):
    for scores, ranges in cases():
        poisoned = scores.copy()
        slot = np.arange(SIZE)
        poisoned[(slot < ranges[0][:, None]) | (slot >= ranges[1][:, None])] = np.nan
        np.testing.assert_array_equal(run(mode, poisoned, *ranges), expected(scores, *ranges, K))


def test_takes_the_largest_and_of_equals_the_lower(mode):
    check_all(mode)


def test_long_rows_are_searched_by_chunks(split_rows):
    check_all(LONG)


def test_all_of_long_rows_are_taken_the_lowest_number_too(split_rows):
    scores = np.full((2, 256), -np.inf, np.float32)
    scores[1, ::3] = 1.0
    everything = ints(0, 0), ints(256, 256), ints(256, 256)
    np.testing.assert_array_equal(run(LONG, scores, *everything, k=256), expected(scores, *everything, 256))


def test_the_reference_agrees():
    for scores, ranges in cases():
        got = select_top_reference(jnp.asarray(scores), *ranges, k=K)
        np.testing.assert_array_equal(got, expected(scores, *ranges, K))


def test_probabilities_are_told_apart_like_all_scores(split_rows):
    rng = np.random.default_rng(3)
    spread = np.exp(-60 * rng.random((ROWS, SIZE))).astype(np.float32)
    close = (1 - 2.0**-24 * rng.integers(0, 90, (ROWS, SIZE))).astype(np.float32)
    extreme = rng.choice(np.float32([0.0, -0.0, 1.0, 1e-45, np.nextafter(np.float32(1), 0)]), (ROWS, SIZE))
    for scores in (spread, close, extreme):
        for _, ranges in list(cases())[:3]:
            got = select_top(scores, *ranges, k=K, probabilities=True, **LONG)
            np.testing.assert_array_equal(got, expected(scores, *ranges, K))


@pytest.mark.parametrize("probabilities", [False, True])
def test_scores_that_are_none_choose_no_more_and_no_less(split_rows, monkeypatch, probabilities):
    """The row of a request whose logits are not finite may not write into those of others."""
    bits = [0x7F800000, 0x7FC00000, 0x7FFFFFFF, 0xFFC00000, 0xFFFFFFFF, 0xFF800000, 0x40000001]
    scores = np.repeat(np.array(bits, np.uint32).view(np.float32)[:, None], SIZE, axis=1)
    scores[::2, ::5] = 0.25
    written, store = [], select_top_triton.plgpu.store

    def watched(ref, value, *, mask=None):
        if mask is not None:  # slots that are chosen, or -1
            jax.debug.callback(lambda value, mask: written.append((mask & (value >= 0)).sum()), value, mask)
        store(ref, value, mask=mask)

    monkeypatch.setattr(select_top_triton.plgpu, "store", watched)
    ranges = [np.full(len(bits), n, np.int32) for n in (3, 290, K)]
    got = np.asarray(select_top(scores, *ranges, k=K, probabilities=probabilities, **LONG))
    jax.effects_barrier()
    assert sum(written) == len(bits) * K
    assert ((got >= 3) & (got < 290)).all()
    assert (np.diff(got) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_rows(data):
    draw = data.draw
    values = draw(st.lists(st.sampled_from([-1.5, 0.0, 0.25, 0.5, 7.0]) | st.floats(0, 1, width=32), min_size=8))
    scores = np.resize(np.asarray(values, np.float32), (ROWS, SIZE))
    first = [draw(st.integers(0, SIZE)) for _ in range(ROWS)]
    last = [draw(st.integers(0, SIZE)) for _ in range(ROWS)]
    count = [draw(st.integers(0, 2 * K)) for _ in range(ROWS)]
    ranges = ints(*first), ints(*last), ints(*count)
    for mode in ({"implementation": "xla"}, LONG):
        np.testing.assert_array_equal(run(mode, scores, *ranges), expected(scores, *ranges, K))


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "size", "k"), [(8, 131072, 2048), (8, 32768, 2048), (64, 4096, 64), (3, 9000, 9000)])
def test_production_shapes_on_the_gpu(rows, size, k):
    rng = np.random.default_rng(1)
    scores = np.exp(rng.standard_normal((rows, size)) * 4 - 9).astype(np.float32)
    scores[:, ::7] = scores[:, :1]
    ranges = rng.integers(0, 64, rows), rng.integers(size // 2, size + 1, rows), rng.integers(k // 2, k + 1, rows)
    ranges = tuple(each.astype(np.int32) for each in ranges)
    got = run({"implementation": "triton"}, scores, *ranges, k=k)
    np.testing.assert_array_equal(got, expected(scores, *ranges, k))


@pytest.mark.parametrize(
    ("rows", "size", "k", "calls"), [(8, 131072, 2048, 8), (8, 32768, 4096, 8), (64, 4096, 64, 1), (2048, 1000, 7, 1)]
)
def test_lowers_for_cuda(rows, size, k, calls):
    shape = jax.ShapeDtypeStruct
    bounds = [shape((rows,), jnp.int32)] * 3
    text = lower_for_h200(functools.partial(select_top, k=k), shape((rows, size), jnp.float32), *bounds)
    assert triton_calls(text) == calls


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": jnp.zeros((2, 8), jnp.bfloat16)}, TypeError, "scores must be float32"),
        ({"scores": jnp.zeros(8)}, ValueError, "scores has shape"),
        ({"first": jnp.zeros(3, jnp.int32)}, ValueError, "first has shape"),
        ({"count": jnp.zeros(2)}, TypeError, "count must be int32"),
        ({"k": 0}, ValueError, "k must be from 1 to 8"),
        ({"k": 9}, ValueError, "k must be from 1 to 8"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    zero = jnp.zeros(2, jnp.int32)
    arguments = {"scores": jnp.zeros((2, 8)), "first": zero, "last": zero, "count": zero, "k": 4}
    with pytest.raises(error, match=message):
        select_top(**{**arguments, **change})
