"""Random paged caches for the kernels' tests: permuted entries, ragged lengths, NaN wherever nothing may be read."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import EMPTY_LSE, PageAddress

try:
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # jax 0.10 does not export it
except ImportError:
    InterpretGPUParams = getattr(plgpu, "InterpretGPUParams", None)

LAYERS, LAYER = 2, 1
GRANULARITIES = ("shared", "per_layer", "per_head")

# How an operation is run: its keyword arguments.
MODES = [
    pytest.param({"implementation": "xla"}, id="xla"),
    pytest.param({"implementation": "triton", "interpret": True}, id="interpreted"),
    pytest.param({"implementation": "triton"}, id="native", marks=pytest.mark.gpu),
]

# Largest error of an output of size about 1.
TOLERANCE = {jnp.dtype(jnp.float32): 3e-5, jnp.dtype(jnp.float16): 4e-3, jnp.dtype(jnp.bfloat16): 3e-2}


class PagedCase(NamedTuple):
    """One layer's view of a paged cache. `lengths` are those of the layer, [rows - 1, H] without the null row."""

    k_pages: jax.Array
    v_pages: jax.Array
    page_table: jax.Array
    lengths: jax.Array
    address: PageAddress


def table_shape(granularity: str, heads: int) -> tuple[int, int]:
    """(Lt, Ht)."""
    return (1 if granularity == "shared" else LAYERS), (heads if granularity == "per_head" else 1)


def make_address(granularity: str, heads: int) -> PageAddress:
    """The arithmetic of layer LAYER."""
    return {
        "shared": PageAddress(0, LAYERS * heads, LAYER * heads, 1),
        "per_layer": PageAddress(LAYER, heads, 0, 1),
        "per_head": PageAddress(LAYER, 1, 0, 0),
    }[granularity]


def make_paged(
    *,
    lengths,
    granularity: str,
    heads: int,
    dim: int,
    page: int,
    columns: int,
    dtype,
    seed: int = 0,
    poison: bool = True,
) -> PagedCase:
    """A cache whose row i + 1 holds `lengths[i]` slots, rotated by a place per head where heads have their own tables.

    Everything that is not held is NaN with `poison`: other slots, pages and layers.
    """
    rng = np.random.default_rng(seed)
    layers, table_heads = table_shape(granularity, heads)
    address = make_address(granularity, heads)
    rows = len(lengths) + 1
    length = np.zeros((layers, rows, table_heads), np.int32)
    for h in range(table_heads):
        length[:, 1:, h] = np.roll(lengths, h)
    used = -(-length // page)
    entries = int(used.sum()) + 3
    order = rng.permutation(np.arange(1, entries))
    table = np.zeros((layers, rows, table_heads, columns), np.int32)
    taken = 0
    for at in np.ndindex(*length.shape):
        table[at][: used[at]] = order[taken : taken + used[at]]
        taken += int(used[at])
    pool = np.full((2, entries * address.entry_stride, page, dim), np.nan if poison else 0.0, np.float32)
    for r in range(rows):
        for h in range(heads):
            th = h if table_heads > 1 else 0
            slot = np.arange(length[address.table_layer, r, th])
            where = address.page(table[address.table_layer, r, th, slot // page], h)
            pool[:, where, slot % page] = rng.standard_normal((2, slot.size, dim))
    return PagedCase(
        jnp.asarray(pool[0], dtype), jnp.asarray(pool[1], dtype), jnp.asarray(table), jnp.asarray(length), address
    )


def normal(seed: int, *shape: int, dtype) -> jax.Array:
    """Standard normal values."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_same_attention(got, expected, dtype) -> None:
    """Compares (out, lse) with the float32 reference at the tolerance of `dtype`; what is empty must be so exactly."""
    (out, lse), (expected_out, expected_lse) = (
        tuple(np.asarray(x, np.float32) for x in pair) for pair in (got, expected)
    )
    assert got[0].dtype == dtype
    assert got[1].dtype == jnp.float32
    empty = expected_lse == np.float32(EMPTY_LSE)
    np.testing.assert_array_equal(lse == np.float32(EMPTY_LSE), empty)
    np.testing.assert_array_equal(out[empty], 0.0)
    tolerance = TOLERANCE[jnp.dtype(dtype)]
    np.testing.assert_allclose(out, expected_out, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse[~empty], expected_lse[~empty], rtol=tolerance, atol=tolerance)
