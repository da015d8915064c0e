"""Linear layers over packed tokens. Those of a gated MLP and of residual adds have a kernel for Hopper, which does what
follows the product before it stores it.

A kernel can neither be differentiated nor partitioned over devices: `implementation="xla"` can.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_float, check_shape
from pallas_kernels.dispatch import Implementation, hopper_refusal, multiprocessors, resolve
from pallas_kernels.linear_mosaic import COLUMNS, DEPTH, TOKENS, LinearTile, best_tile, linear_mosaic

GATED_TOKENS = 128
"""From so many tokens on the gate is left to the kernel, where it can run."""
ADDED_TOKENS = 1024
"""Likewise a residual add. XLA's products of fewer tokens are as fast, and its norm adds while it reads."""


def matmul_precision(dtype) -> jax.lax.Precision | None:
    """Of XLA's products in a dtype: on a GPU float32 would otherwise be rounded to TF32 (10 bits)."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [T, d] times weight [d, n], plus bias [n], in x's dtype; by XLA."""
    y = jax.lax.dot_general(x, weight.astype(x.dtype), (((1,), (0,)), ((), ())), precision=matmul_precision(x.dtype))
    return y if bias is None else y + bias[None].astype(x.dtype)


def gated_linear(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: Implementation | None = None,
    tile: LinearTile | None = None,
) -> jax.Array:
    """silu(x @ gate) * (x @ up), the first half of an MLP (SwiGLU, arXiv:2002.05202).

    Args:
      x: [T, d].
      weight: [d, 2F], the columns of gate and then those of up.
      bias: [2F], or None.
      implementation: "mosaic", "xla", or None: the kernel for GATED_TOKENS or more, where it can run and serve the call
        and has tiles for half of the multiprocessors, else XLA. The kernel rounds once, XLA the products as well.
      tile: of the kernel; None: the best by `best_tile`.

    Returns:
      [T, F] in x's dtype.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or a call that is none for the kernel asked for.
      RuntimeError: the kernel is asked for where it cannot run.
    """
    _check(x, weight, bias)
    if weight.shape[1] % 2:
        raise ValueError(f"weight must have two halves of columns, got {weight.shape[1]}")
    if _chosen(implementation, x, weight, bias, gated=True, least=GATED_TOKENS) == "xla":
        gate, up = jnp.split(linear(x, weight, bias), 2, axis=-1)
        return jax.nn.silu(gate) * up
    return _mosaic(x, weight, None, gated=True, tile=tile)


def add_linear(
    total: jax.Array,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    implementation: Implementation | None = None,
    tile: LinearTile | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """total + x @ weight (+ bias), in two summands: by XLA the second is still to be added, by the kernel it is None.

    Args:
      total: [T, n].
      x: [T, d].
      weight: [d, n].
      bias: [n], or None.
      implementation: as for `gated_linear`, but from ADDED_TOKENS on.
      tile: of the kernel; None: the best by `best_tile`.

    Returns:
      ([T, n] in x's dtype, likewise or None), for `add_rms_norm`.

    Raises: as `gated_linear`.
    """
    _check(x, weight, bias)
    check_shape("total", total, (x.shape[0], weight.shape[1]))
    if total.dtype != x.dtype:
        raise TypeError(f"total must have the dtype of x, {x.dtype}, got {total.dtype}")
    if _chosen(implementation, x, weight, bias, gated=False, least=ADDED_TOKENS) == "xla":
        return total, linear(x, weight, bias)
    return _mosaic(x, weight, total, gated=False, tile=tile), None


def gated_linear_reference(x, weight, bias=None) -> jax.Array:
    """The meaning of `gated_linear`, all in float32."""
    gate, up = jnp.split(_linear_reference(x, weight, bias), 2, axis=1)
    return (gate / (1 + jnp.exp(-gate)) * up).astype(x.dtype)


def add_linear_reference(total, x, weight, bias=None) -> jax.Array:
    """The sum of what `add_linear` returns, all in float32."""
    return (total.astype(jnp.float32) + _linear_reference(x, weight, bias)).astype(x.dtype)


def _linear_reference(x, weight, bias):
    y = jnp.einsum("td,dn->tn", x.astype(jnp.float32), weight.astype(jnp.float32), precision="highest")
    return y if bias is None else y + bias.astype(jnp.float32)


def _check(x, weight, bias):
    check_shape("x", x, (None, None))
    check_shape("weight", weight, (x.shape[1], None))
    check_float(x=x, weight=weight)
    if bias is not None:
        check_shape("bias", bias, (weight.shape[1],))
        check_float(bias=bias)


def _refusal(x, weight, bias) -> str | None:
    """Why the kernel cannot serve a call; None if it can."""
    if bias is not None:
        return "it adds no bias"
    if x.dtype not in (jnp.bfloat16, jnp.float16) or weight.dtype != x.dtype:
        return f"it multiplies bfloat16 or float16 of one kind, not {x.dtype} and {weight.dtype}"
    if min(x.shape) < DEPTH or x.shape[0] % TOKENS or x.shape[1] % DEPTH:
        return f"x must be [a multiple of {TOKENS}, a multiple of {DEPTH}] for it, not {x.shape}"
    if weight.shape[1] < COLUMNS or weight.shape[1] % COLUMNS:
        return f"weight must have a multiple of {COLUMNS} columns for it, not {weight.shape[1]}"
    return None


def _chosen(implementation, x, weight, bias, *, gated, least) -> Implementation:
    """The implementation that runs."""
    refusal = _refusal(x, weight, bias)
    if implementation is None:
        if x.shape[0] < least or refusal is not None or hopper_refusal() is not None:
            return "xla"
        programs = multiprocessors()
        tile = best_tile(x.shape[0], weight.shape[1], gated=gated, programs=programs)
        tiles = x.shape[0] // TOKENS * (weight.shape[1] // tile.columns)
        return "mosaic" if 2 * tiles >= programs else "xla"  # XLA may share an inner dimension out, too
    if implementation == "triton":
        raise ValueError("implementation must be 'mosaic', 'xla' or None: products have no Triton kernel")
    return resolve(implementation, None, mosaic_refusal=refusal)[0]


def _mosaic(x, weight, total, *, gated, tile):
    programs = multiprocessors()
    tile = tile or best_tile(x.shape[0], weight.shape[1], gated=gated, programs=programs)
    if weight.shape[1] % tile.columns:
        raise ValueError(f"tile.columns must divide the {weight.shape[1]} columns of weight, got {tile.columns}")
    return linear_mosaic(x, weight, total, gated=gated, tile=tile, programs=programs)
