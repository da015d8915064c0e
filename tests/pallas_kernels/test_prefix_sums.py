"""Prefix sums against NumPy."""

import jax
import numpy as np
import pytest

from pallas_kernels.prefix_sums import exclusive_sums


@pytest.mark.parametrize("shape", [(1,), (64,), (65,), (2, 3, 300), (0,), (0, 5), ((1 << 17) + 1,)])
def test_sums_what_comes_before(shape):
    values = np.random.default_rng(0).integers(0, 9, shape).astype(np.int32)
    got = jax.jit(exclusive_sums)(values)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, np.cumsum(values, axis=-1) - values)
