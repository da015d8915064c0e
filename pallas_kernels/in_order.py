"""A barrier that lasts: whoever writes to an array in place comes after everything that has been read from it.

A kernel that writes to a pool in place and a computation that reads the pool as it was before have no order of their
own. Where XLA cannot tell that the reader comes first, it gives the writer a copy of the whole pool. Passing the pool
and what was read from it through one barrier makes the pool's next version depend on the reading.
`jax.lax.optimization_barrier` is gone before XLA:GPU decides about copies; a kernel that does nothing is not. On a CPU
the barrier stays if XLA is told to keep it (`sparsejax.engine.execution.compiled_steps`).
"""

from typing import TypeVar

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.tiles import WHOLE

_Tree = TypeVar("_Tree")


def in_order(arrays: _Tree, *, implementation: Implementation | None = None, interpret: bool | None = None) -> _Tree:
    """The arrays of a pytree as they are, in place; each of them is there when all have been computed.

    Args:
      arrays: the pools to be written next, and what was read from them. What was read must be taken from the result:
        XLA may compute its own copy of it again.
      implementation, interpret: see `dispatch.resolve`.

    Raises:
      ValueError: an empty array.
    """
    leaves, tree = jax.tree.flatten(arrays)
    if not all(leaf.size for leaf in leaves):
        raise ValueError("arrays must have an element each: there is nothing to wait for in an empty one")
    implementation, interpret = resolve(implementation, interpret)
    if implementation == "xla":
        return jax.lax.optimization_barrier(arrays)
    passed = pl.pallas_call(
        lambda *refs: None,
        grid=(1,),
        in_specs=[WHOLE] * len(leaves),
        out_specs=[WHOLE] * len(leaves),
        out_shape=[jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        input_output_aliases={index: index for index in range(len(leaves))},
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="in_order",
    )(*leaves)
    return jax.tree.unflatten(tree, passed)


def in_order_for_xla(
    arrays: _Tree, *, implementation: Implementation | None = None, interpret: bool | None = None
) -> _Tree:
    """`in_order` where XLA itself does the reading. Calls of kernels keep their order, and need none."""
    if resolve(implementation, interpret)[0] == "xla":
        return in_order(arrays, implementation="xla")
    return arrays
