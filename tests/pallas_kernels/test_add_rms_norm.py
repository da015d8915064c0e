"""Residual add and RMSNorm: kernel and XLA program against the reference, gradients, lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, TOLERANCE, normal
from lowering import lower_for_h200, triton_calls

from pallas_kernels import add_rms_norm, add_rms_norm_reference
from pallas_kernels.add_rms_norm import FEW_TOKENS

EPS = 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("tokens", "dim", "dtype"), [(1, 128, jnp.bfloat16), (5, 96, jnp.float32)])
def test_equals_the_reference(mode, added, tokens, dim, dtype):
    x, weight = normal(0, tokens, dim, dtype=dtype), normal(1, dim, dtype=dtype)
    delta = normal(2, tokens, dim, dtype=dtype) if added else None
    got = add_rms_norm(x, delta, weight, eps=EPS, **mode)
    tolerance = TOLERANCE[jnp.dtype(dtype)]
    for one, expected in zip(got, add_rms_norm_reference(x, delta, weight, eps=EPS), strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
        )


def test_the_kernel_has_the_gradient_of_the_xla_program():
    x, delta, weight = normal(0, 2, 64, dtype=jnp.float32), normal(1, 2, 64, dtype=jnp.float32), jnp.ones(64)

    def loss(mode, *args):
        y, norm = add_rms_norm(*args, eps=EPS, **mode)
        return (y**2).sum() + (norm**3).sum()

    modes = [{"implementation": "triton", "interpret": True}, {"implementation": "xla"}]
    kernel, xla = (jax.grad(functools.partial(loss, mode), argnums=(0, 1, 2))(x, delta, weight) for mode in modes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), kernel, xla)


@pytest.mark.parametrize("dim", [4096, 3584])
@pytest.mark.parametrize(("tokens", "kernels"), [(1, 1), (FEW_TOKENS, 1), (FEW_TOKENS + 1, 0)])
def test_few_tokens_lower_to_the_kernel(dim, tokens, kernels):
    x, weight = jax.ShapeDtypeStruct((tokens, dim), jnp.bfloat16), jax.ShapeDtypeStruct((dim,), jnp.bfloat16)
    text = lower_for_h200(functools.partial(add_rms_norm, eps=EPS), x, x, weight)
    assert triton_calls(text) == kernels


def test_errors_name_the_argument():
    x = jnp.zeros((2, 8))
    with pytest.raises(ValueError, match="weight has shape"):
        add_rms_norm(x, None, jnp.zeros(4), eps=EPS)
    with pytest.raises(ValueError, match="delta has shape"):
        add_rms_norm(x, x[:1], jnp.zeros(8), eps=EPS)
    with pytest.raises(TypeError, match="dtype of x"):
        add_rms_norm(x, x.astype(jnp.bfloat16), jnp.zeros(8), eps=EPS)
