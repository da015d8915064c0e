"""Latents in 4 bits, and their pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PageAddress, dequantise, init_latents, quantise, store_latents
from pallas_kernels.centers import center_count, center_positions, latent_count, latent_ordinals


def test_quantisation_errs_by_half_a_level_at_most():
    z = np.random.default_rng(0).standard_normal((5, 7, 96)).astype(np.float32)
    z[0, 0, 32:64] = 0.0
    z[1, 1, :32] = 0.0
    z[1, 1, 3] = -1e-3  # one number in a group of zeros
    codes, scale = quantise(jnp.asarray(z))
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (jnp.uint16, (5, 7, 24), jnp.bfloat16, (5, 7, 3))
    back = np.asarray(dequantise(codes, scale))
    np.testing.assert_array_equal(back[0, 0, 32:64], 0.0)
    np.testing.assert_allclose(back[1, 1, :32], z[1, 1, :32], rtol=1 / 128, atol=0)
    wide = np.repeat(np.asarray(scale, np.float32), 32, axis=-1)
    # The largest number of a group may lie above 7 levels by the rounding of the scale.
    assert np.all(np.abs(back - z) <= wide * (0.5 + 7 / 256) + 1e-7)


def test_numbers_that_are_levels_come_back_exactly():
    levels = np.random.default_rng(1).integers(-7, 8, (3, 64)).astype(np.float32)
    levels[:, ::32] = 7
    scales = np.repeat(np.array([[0.5, 2.0]] * 3, np.float32), 32, axis=1)
    np.testing.assert_array_equal(dequantise(*quantise(jnp.asarray(levels * scales))), levels * scales)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int4"])
def test_stores_where_the_table_says_and_drops_padding(dtype):
    layers, layer, size, page = 3, 2, 32, 4
    pool = init_latents(5 * layers, page, size=size, neighbors=2, max_centers=100, dtype=dtype)
    assert pool.size == size
    assert pool.reference.dtype == jnp.uint16
    z = jnp.asarray(np.random.default_rng(2).standard_normal((4, size)), jnp.float32)
    reference = jnp.asarray([[1, 2], [3, 4], [5, 6], [7, 8]], jnp.int32)
    entry, slot = jnp.array([2, 0, 4, 0], jnp.int32), jnp.array([3, 1, 0, 1], jnp.int32)
    address = PageAddress(0, layers, layer, 1)
    stored = jax.jit(store_latents, donate_argnums=0, static_argnames="address")(
        pool, z, reference, entry, slot, address=address
    )
    values, scale, ids = stored
    for token, at in ((0, (2 * layers + layer, 3)), (2, (4 * layers + layer, 0))):
        if scale is None:
            np.testing.assert_array_equal(values[at], z[token].astype(values.dtype))
        else:
            np.testing.assert_array_equal(values[at], quantise(z)[0][token])
            np.testing.assert_array_equal(scale[at], quantise(z)[1][token])
        np.testing.assert_array_equal(ids[at], reference[token])
    assert int((np.asarray(ids) != 0).sum()) == 4
    assert init_latents(1, 1, size=32, neighbors=1, max_centers=70_000).reference.dtype == jnp.int32


@pytest.mark.parametrize(
    ("options", "message"), [({"size": 40, "dtype": "int4"}, "multiple, got 40"), ({"dtype": "int8"}, "got 'int8'")]
)
def test_errors_name_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        init_latents(**{"num_pages": 2, "page_size": 4, "size": 32, "neighbors": 4, "max_centers": 9, **options})


@pytest.mark.parametrize(("sinks", "step"), [(0, 1), (0, 3), (4, 1), (4, 5), (16, 10)])
def test_latents_are_numbered_in_the_order_of_positions(sinks, step):
    every = np.arange(60)
    others = np.setdiff1d(every, center_positions(60, sinks=sinks, step=step))
    np.testing.assert_array_equal(latent_ordinals(others, sinks=sinks, step=step), np.arange(others.size))
    for n in (0, 1, 3, sinks, sinks + 1, 37, 60):
        assert latent_count(n, sinks=sinks, step=step) == (others < n).sum()
    counts = center_count(every, sinks=sinks, step=step)
    np.testing.assert_array_equal(counts, [center_count(int(n), sinks=sinks, step=step) for n in every])
