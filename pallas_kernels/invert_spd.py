"""Inverses of many small symmetric positive-definite matrices, one program a matrix."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_shape
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.tiles import WHOLE, index_grid, next_power_of_two

MAX_SIZE = 128
"""Largest matrix: a program holds all of it in registers."""


def invert_spd(
    matrices: jax.Array, *, implementation: Implementation | None = None, interpret: bool | None = None
) -> jax.Array:
    """Inverts each matrix, in float32.

    The kernel sweeps one pivot after the other (Beaton 1964; Goodnight 1979, "A Tutorial on the SWEEP Operator"), which
    needs no pivoting for positive-definite matrices and keeps them symmetric. The XLA program factorises (Cholesky).
    Libraries' batched factorisations take a launch a column or a call a matrix, and spend most of it waiting.

    Args:
      matrices: f32[N, n, n], symmetric positive definite, n at most 128.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      f32[N, n, n].

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_shape("matrices", matrices, (None, None, None))
    size = matrices.shape[1]
    check_shape("matrices", matrices, (None, size, size))
    if size > MAX_SIZE:
        raise ValueError(f"matrices must be at most {MAX_SIZE} x {MAX_SIZE}, got {size} x {size}")
    if matrices.dtype != jnp.float32:
        raise TypeError(f"matrices must be float32, got {matrices.dtype}")
    implementation, interpret = resolve(implementation, interpret)
    if 0 in matrices.shape:
        return matrices
    if implementation == "xla":
        return _invert_xla(matrices)
    return _invert_triton(matrices, interpret=interpret)


def invert_spd_reference(matrices: jax.Array) -> jax.Array:
    """The meaning of `invert_spd`."""
    return jnp.linalg.inv(matrices)


@jax.jit
def _invert_xla(matrices):
    factor = jnp.linalg.cholesky(matrices)
    identity = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype), matrices.shape)
    return jax.scipy.linalg.cho_solve((factor, True), identity)


def _invert_kernel(in_ref, out_ref, *, size):
    """Sweeps all pivots of matrix `program_id(0)`; what is left is minus the inverse."""
    item = pl.program_id(0)
    index = jnp.arange(next_power_of_two(size), dtype=jnp.int32)
    rows, columns = index_grid(index, index)
    inside = (rows < size) & (columns < size)
    place = in_ref.at[jnp.full_like(rows, item), rows, columns]
    matrix = plgpu.load(place, mask=inside, other=0.0)

    def sweep(pivot, matrix):
        in_row, in_column = rows == pivot, columns == pivot
        column = jnp.sum(jnp.where(in_column, matrix, 0.0), axis=1)
        row = jnp.sum(jnp.where(in_row, matrix, 0.0), axis=0)
        inverse = 1.0 / jnp.sum(jnp.where(index == pivot, column, 0.0))
        swept = matrix - (column * inverse)[:, None] * row[None, :]
        swept = jnp.where(in_row | in_column, matrix * inverse, swept)
        return jnp.where(in_row & in_column, -inverse, swept)

    swept = jax.lax.fori_loop(0, size, sweep, matrix)
    plgpu.store(out_ref.at[jnp.full_like(rows, item), rows, columns], -swept, mask=inside)


@functools.partial(jax.jit, static_argnames=("interpret",))
def _invert_triton(matrices, *, interpret):
    return pl.pallas_call(
        functools.partial(_invert_kernel, size=matrices.shape[1]),
        grid=(matrices.shape[0],),
        in_specs=[WHOLE],
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct(matrices.shape, matrices.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4 if matrices.shape[1] <= 64 else 16, num_stages=1),
        interpret=interpret,
        name="invert_spd",
    )(matrices)
