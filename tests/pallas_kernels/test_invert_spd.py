"""Inverses of small positive-definite matrices: every implementation, conditioning, lowering, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES
from lowering import lower_for_h200, triton_calls

from pallas_kernels.invert_spd import invert_spd, invert_spd_reference


def gram_matrices(count, size, samples, ridge=5e-3, seed=0):
    x = np.random.default_rng(seed).standard_normal((count, samples, size))
    return np.einsum("bsi,bsj->bij", x, x) + ridge * np.eye(size)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("count", "size", "samples"), [(3, 48, 200), (2, 5, 40), (1, 1, 3), (2, 64, 100)])
def test_inverts(mode, count, size, samples):
    matrices = gram_matrices(count, size, samples)
    got = np.asarray(invert_spd(jnp.asarray(matrices, jnp.float32), **mode), np.float64)
    expected = np.linalg.inv(matrices)
    np.testing.assert_allclose(got, expected, atol=2e-4 * np.abs(expected).max())
    np.testing.assert_allclose(got @ matrices, np.broadcast_to(np.eye(size), got.shape), atol=2e-3)


@pytest.mark.parametrize("mode", MODES)
def test_fewer_samples_than_columns_leave_the_ridge(mode):
    # Rank 4 of 16: the inverse is 1 / ridge in the directions that no sample has.
    matrices = gram_matrices(2, 16, 4, ridge=0.5)
    got = invert_spd(jnp.asarray(matrices, jnp.float32), **mode)
    np.testing.assert_allclose(got, np.linalg.inv(matrices), atol=1e-4)


def test_reference_agrees():
    matrices = jnp.asarray(gram_matrices(2, 12, 60), jnp.float32)
    np.testing.assert_allclose(invert_spd(matrices, implementation="xla"), invert_spd_reference(matrices), atol=1e-5)


def test_no_matrices():
    assert invert_spd(jnp.zeros((0, 4, 4))).shape == (0, 4, 4)


@pytest.mark.parametrize("size", [48, 64, 100])
def test_lowers_for_cuda_as_one_kernel(size):
    matrices = jax.ShapeDtypeStruct((512, size, size), jnp.float32)
    assert triton_calls(lower_for_h200(invert_spd, matrices)) == 1


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="matrices has shape"):
        invert_spd(jnp.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match="at most 128"):
        invert_spd(jnp.zeros((1, 129, 129)))
    with pytest.raises(TypeError, match="float32"):
        invert_spd(jnp.zeros((1, 4, 4), jnp.bfloat16))
