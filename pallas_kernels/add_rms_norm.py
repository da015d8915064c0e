"""A residual add and the RMSNorm behind it, for the few tokens of a small decode step as one kernel.

XLA makes three of them for one token: the add, the mean square, the scaling. Each takes longer to start than to run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_float, check_shape
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.tiles import WHOLE, load_lasting, next_power_of_two

FEW_TOKENS = 8
"""Up to so many tokens the kernel is used on a GPU. XLA norms more of them in one kernel, too, and its add then also
sums up the parts of the product before."""

_NUM_WARPS = 8


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) over the last axis, times weight; the mean square is taken in float32 (arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * weight.astype(x.dtype)


def add_rms_norm(
    x: jax.Array,
    delta: jax.Array | None,
    weight: jax.Array,
    *,
    eps: float,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y = x + delta, and `rms_norm` of y. Differentiable.

    Args:
      x: [T, d].
      delta: [T, d] in x's dtype; None: nothing is added.
      weight: [d].
      eps: added to the mean square.
      implementation, interpret: see `dispatch.resolve`; None on a GPU is the kernel for FEW_TOKENS, and XLA for more.

    Returns:
      Two arrays [T, d] in x's dtype.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_shape("x", x, (None, None))
    check_float(x=x)
    check_shape("weight", weight, (x.shape[1],))
    if delta is not None:
        check_shape("delta", delta, tuple(x.shape))
        if delta.dtype != x.dtype:
            raise TypeError(f"delta must have the dtype of x, {x.dtype}, got {delta.dtype}")
    if implementation is None and not interpret and x.shape[0] > FEW_TOKENS:
        implementation = "xla"
    implementation, interpret = resolve(implementation, interpret)
    if implementation == "xla" or x.size == 0:
        return _add_rms_norm_xla(x, delta, weight, eps=eps)
    return _differentiable(eps, interpret, x, delta, weight)


def add_rms_norm_reference(x, delta, weight, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """The meaning of `add_rms_norm`, all in float32 but for the sum."""
    y = x if delta is None else x + delta
    wide = y.astype(jnp.float32)
    norm = wide / jnp.sqrt((wide**2).sum(-1, keepdims=True) / x.shape[1] + eps)
    return y, (norm * weight.astype(jnp.float32)).astype(x.dtype)


def _add_rms_norm_xla(x, delta, weight, *, eps):
    y = x if delta is None else x + delta
    return y, rms_norm(y, weight, eps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _differentiable(eps, interpret, x, delta, weight):
    return _add_rms_norm_triton(x, delta, weight, eps=eps, interpret=interpret)


@_differentiable.defjvp
def _derivative(eps, interpret, primals, tangents):
    del interpret
    return jax.jvp(functools.partial(_add_rms_norm_xla, eps=eps), primals, tangents)


def _kernel(*refs, eps):
    """One token."""
    *inputs, weight_ref, sum_ref, norm_ref = refs
    token, dim = pl.program_id(0), weight_ref.shape[0]
    column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
    real = column < dim
    at = (jnp.broadcast_to(token, column.shape), column)
    x, *delta = (plgpu.load(ref.at[at], mask=real, other=0.0) for ref in inputs)
    weight = load_lasting(weight_ref.at[column], mask=real, other=0.0)
    y = x
    if delta:
        y = (x.astype(jnp.float32) + delta[0].astype(jnp.float32)).astype(x.dtype)
    wide = y.astype(jnp.float32)
    scale = jax.lax.rsqrt((wide * wide).sum() / dim + eps)
    norm = (wide * scale).astype(x.dtype).astype(jnp.float32) * weight.astype(x.dtype).astype(jnp.float32)
    if delta:
        plgpu.store(sum_ref.at[at], y, mask=real)
    plgpu.store(norm_ref.at[at], norm.astype(x.dtype), mask=real)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))
def _add_rms_norm_triton(x, delta, weight, *, eps, interpret):
    inputs = [x, weight] if delta is None else [x, delta, weight]
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)

    def kernel(*refs):
        if delta is None:  # nothing to add: the sum is x, and no output
            refs = (*refs[:-1], None, refs[-1])
        _kernel(*refs, eps=eps)

    outputs = pl.pallas_call(
        kernel,
        grid=(x.shape[0],),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * (1 if delta is None else 2),
        out_shape=[shape] * (1 if delta is None else 2),
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="add_rms_norm",
    )(*inputs)
    return (x, outputs[0]) if delta is None else tuple(outputs)
