"""Prefix sums inside a step: of few numbers XLA's own take longer than what they are for."""

import jax
import jax.numpy as jnp

_BLOCK = 64
_MOST = 1 << 17


def exclusive_sums(values: jax.Array) -> jax.Array:
    """i32[..., n]: the sum of what comes before each element of i32[..., n].

    Up to _MOST numbers are compared each with those of its block, and every block with all others. These are two fused
    reductions, where XLA makes many small kernels of a cumulative sum, or one that other work makes slow.
    """
    size = values.shape[-1]
    if size > _MOST:
        return jnp.cumsum(values, axis=-1, dtype=jnp.int32) - values
    lanes, count = values.shape[:-1], -(-size // _BLOCK)
    padding = [(0, 0)] * len(lanes) + [(0, count * _BLOCK - size)]
    blocks = jnp.pad(values, padding).reshape(*lanes, count, _BLOCK)
    sums = _sums_before(blocks) + _sums_before(blocks.sum(axis=-1, dtype=jnp.int32))[..., None]
    return sums.reshape(*lanes, count * _BLOCK)[..., :size]


def _sums_before(values: jax.Array) -> jax.Array:
    place = jnp.arange(values.shape[-1])
    return jnp.where(place < place[:, None], values[..., None, :], 0).sum(axis=-1, dtype=jnp.int32)
