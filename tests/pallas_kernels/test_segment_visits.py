"""Visits of segments by tiles: every token of a segment is computed once, in its tile, by its segment."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.segment_visits import segment_visits

BLOCK = 8


@pytest.mark.parametrize(
    "starts",
    [(0, 40), (0, 8, 16), (0, 3, 3, 5, 29, 40), (0, 0), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (5, 7, 7, 38), (0, 0, 0, 33)],
)
def test_each_token_belongs_to_one_visit_of_its_tile(starts):
    tokens = 40
    rows = np.arange(len(starts) - 1) + 3
    bounds, *fields = segment_visits(jnp.asarray(rows, jnp.int32), jnp.asarray(starts, jnp.int32), tokens, BLOCK)
    bounds = np.asarray(bounds)
    assert bounds.shape == (tokens // BLOCK + 1,)
    assert bounds[0] == 0
    found = {}
    for tile in range(tokens // BLOCK):
        for visit in range(bounds[tile], bounds[tile + 1]):
            row, first, last, key_first = (int(x[visit]) for x in fields)
            assert tile * BLOCK <= first < last <= (tile + 1) * BLOCK
            for token in range(first, last):
                assert token not in found
                found[token] = (row, key_first)
    expected = {
        token: (row, start)
        for row, start, end in zip(rows, starts[:-1], starts[1:], strict=True)
        for token in range(start, end)
    }
    assert found == expected
