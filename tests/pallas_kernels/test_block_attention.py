"""Attention mass inside blocks: the kernel and the XLA program against the reference, and the lowering for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, normal
from lowering import lower_for_h200, triton_calls

from pallas_kernels import BlockTile, block_attention_mass, block_attention_mass_reference

# Segments of 1, 0, 16, 37 and 128 tokens, then 8 tokens of padding.
STARTS = jnp.array([0, 1, 1, 17, 54, 182], jnp.int32)
TOKENS = 190


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("heads", "group", "dim", "block", "dtype"),
    [(2, 4, 64, 128, jnp.float32), (2, 7, 80, 16, jnp.bfloat16), (3, 1, 128, 64, jnp.float16)],
)
def test_sums_the_probabilities_inside_each_block(mode, heads, group, dim, block, dtype):
    # The default scale of 1.0 makes logits of size sqrt(dim): peaked, as Compactor has them.
    q = normal(1, TOKENS, heads * group, dim, dtype=dtype).at[182:].set(jnp.nan)
    k = normal(2, TOKENS, heads, dim, dtype=dtype).at[182:].set(jnp.nan)
    scale = 1.0 if dtype == jnp.float32 else dim**-0.5
    got = np.asarray(block_attention_mass(q, k, STARTS, block=block, scale=scale, tile=BlockTile(16, 4, 2), **mode))
    expected = block_attention_mass_reference(q, k, STARTS, block=block, scale=scale)
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    assert not got[182:].any()
    np.testing.assert_allclose(got[17:54].sum(axis=0), 37 * group, rtol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_default_tile_and_block(mode):
    q, k = (normal(i, 300, n, 64, dtype=jnp.bfloat16) for i, n in enumerate((8, 2)))
    starts = jnp.array([0, 290], jnp.int32)
    got = block_attention_mass(q, k, starts, **mode)
    np.testing.assert_allclose(got, block_attention_mass_reference(q, k, starts), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_every_default_tile_on_the_gpu(dtype, dim):
    q, k = (normal(i, 500, n, dim, dtype=dtype) for i, n in enumerate((14, 2)))
    starts = jnp.array([0, 30, 490], jnp.int32)
    scale = dim**-0.5
    got = [block_attention_mass(q, k, starts, scale=scale, implementation="triton") for _ in range(2)]
    tolerance = 1e-4 if dtype == jnp.float32 else 1e-2
    expected = block_attention_mass_reference(q, k, starts, scale=scale)
    np.testing.assert_allclose(got[0], expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(got[0], got[1])


@pytest.mark.parametrize("mode", [{"implementation": "xla"}, {"implementation": "triton", "interpret": True}])
@pytest.mark.parametrize(("tokens", "segments"), [(0, 1), (5, 0)])
def test_nothing_to_do(mode, tokens, segments):
    got = block_attention_mass(
        jnp.ones((tokens, 4, 64)), jnp.ones((tokens, 2, 64)), jnp.zeros(segments + 1, jnp.int32), **mode
    )
    assert got.shape == (tokens, 2)
    assert not np.asarray(got).any()


@pytest.mark.parametrize(
    ("tokens", "q_heads", "heads", "dim", "dtype"),
    [
        (8192, 32, 8, 128, jnp.bfloat16),
        (512, 14, 2, 64, jnp.float32),
        (512, 32, 32, 80, jnp.float16),
        (512, 8, 2, 256, jnp.bfloat16),
    ],
)
def test_lowers_for_cuda_at_production_shapes(tokens, q_heads, heads, dim, dtype):
    shape = jax.ShapeDtypeStruct
    text = lower_for_h200(
        functools.partial(block_attention_mass),
        shape((tokens, q_heads, dim), dtype),
        shape((tokens, heads, dim), dtype),
        shape((9,), jnp.int32),
    )
    assert triton_calls(text) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": 100}, ValueError, "block must be one of"),
        ({"q": jnp.zeros((3, 8, 64))}, ValueError, "q has shape"),
        ({"k": jnp.zeros((4, 2, 64), jnp.int8)}, TypeError, "k must be"),
        ({"starts": jnp.zeros(2)}, TypeError, "starts must be int32"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"q": jnp.zeros((4, 8, 64)), "k": jnp.zeros((4, 2, 64)), "starts": jnp.array([0, 4], jnp.int32)}
    with pytest.raises(error, match=message):
        block_attention_mass(**{**arguments, **change})
