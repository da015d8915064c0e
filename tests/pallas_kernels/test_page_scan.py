"""The scan of pages: kernel and XLA program against plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES
from lowering import lower_for_h200, triton_calls

from pallas_kernels import PageScan, scan_pages
from pallas_kernels.page_scan import LAST

SCORES = np.float32([0, -0.0, 1, 2, -3, np.inf, -np.inf, np.nan])


def random_tables(page, columns, seed, tables=(2, 3)):
    """Tables over pages in random order, some of them shared; dead, unused and protected slots; ties among scores."""
    rng = np.random.default_rng(seed)
    pages = rng.integers(0, 40, (*tables, columns)).astype(np.int32)
    position = np.where(rng.random((40, page)) < 0.25, -1, rng.integers(0, 30, (40, page))).astype(np.int32)
    score = rng.choice(SCORES, (40, page))
    lengths = rng.integers(0, page * columns + 1, tables).astype(np.int32)
    lengths.flat[:2] = 0, page * columns
    first, last = rng.integers(0, 8, tables).astype(np.int32), rng.integers(-5, 31, tables).astype(np.int32)
    return position, score, pages, lengths, first, last


def scan_in_python(position, score, pages, lengths, first, last):
    """PageScan with slot -1 where nothing is evictable."""
    page_size, largest = position.shape[1], np.finfo(np.float32).max
    out = PageScan(*(np.zeros(pages.shape, t) for t in (np.int32, np.int32, np.float32, np.int32, np.int32)))
    for at in np.ndindex(*pages.shape):
        table, column = at[:-1], at[-1]
        used = [i for i in range(page_size) if column * page_size + i < lengths[table]]
        places, scores = position[pages[at]], score[pages[at]]
        out.live[at] = sum(places[i] >= 0 for i in used)
        out.dead[at] = min([i for i in used if places[i] < 0], default=page_size)
        ranked = [
            (-np.inf if np.isnan(scores[i]) else np.clip(scores[i], -largest, largest), places[i], i)
            for i in used
            if max(first[table], 0) <= places[i] < last[table]
        ]
        key, place, slot = min(ranked, default=(np.inf, LAST, None))
        out.key[at], out.position[at] = key, place
        out.slot[at] = -1 if slot is None else column * page_size + slot
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("page", "columns"), [(8, 5), (1, 20), (32, 3), (5, 4)])
@pytest.mark.parametrize("by_table", [False, True])
def test_finds_what_plain_python_finds(mode, page, columns, by_table):
    position, score, pages, *bounds = random_tables(page, columns, seed=page + by_table)
    expected = scan_in_python(position, score, pages, *bounds)
    if by_table:
        score = score[pages].reshape(*pages.shape[:-1], -1)
    scan = jax.jit(functools.partial(scan_pages, **mode))
    got = PageScan(*map(np.array, scan(position, score, pages, *bounds)))
    got.slot[np.isposinf(got.key)] = -1
    for name, one, other in zip(PageScan._fields, got, expected, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_scores_that_could_be_of_either_shape_are_those_of_the_pool(mode):
    pages, ones = jnp.array([[1], [2], [0]], jnp.int32), jnp.ones(3, jnp.int32)
    position = jnp.zeros((3, 4), jnp.int32)
    score = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    assert scan_pages(position, score, pages, ones, 0 * ones, ones, **mode).key.tolist() == [[4], [8], [0]]


def test_lowers_for_cuda_as_one_kernel():
    shape = jax.ShapeDtypeStruct
    tables = (32, 64, 8)
    pool, table = (1 << 20, 32), shape(tables, jnp.int32)
    arguments = (shape(pool, jnp.int32), shape(pool, jnp.float32), shape((*tables, 65), jnp.int32), table, table, table)
    assert triton_calls(lower_for_h200(scan_pages, *arguments)) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"score": np.zeros((40, 7), np.float32)}, ValueError, "score"),
        ({"score": np.zeros((40, 8), np.int32)}, TypeError, "float32"),
        ({"lengths": np.zeros((3, 2), np.int32)}, ValueError, "lengths"),
        ({"first": np.zeros((2, 3), np.float32)}, TypeError, "first"),
    ],
)
def test_arguments_are_checked(change, error, message):
    names = ("position_pages", "score", "pages", "lengths", "first", "last")
    arguments = dict(zip(names, random_tables(8, 5, seed=0), strict=True)) | change
    with pytest.raises(error, match=message):
        scan_pages(*map(jnp.asarray, arguments.values()))
