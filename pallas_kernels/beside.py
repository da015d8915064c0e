"""Work that nobody waits for yet: beside what is computed in the meantime.

XLA runs the kernels of a program one after the other, however little of the GPU each of them takes, unless its graphs
are to keep no order but that of their buffers (the engine's `compiler_options`). Even then, whatever it computes later
may be given memory of what is marked here, and has to wait for it. A mark keeps the memory apart.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from pallas_kernels.dispatch import targets_gpu

_Tree = TypeVar("_Tree")


def beside(function: Callable[[], _Tree]) -> _Tree:
    """What `function` returns, computed as soon as it can be and waited for where a result is used.

    Args:
      function: it may read any array, but none that is written in place before its results are used: XLA would give
        the writer a copy of the whole. It must compute every array it returns, and at least one.
    """
    if not targets_gpu():
        return function()
    leaves, tree = jax.tree.flatten(jax.jit(function)())
    # The mark is put on the operation that makes the first result, which is the call of the function.
    first = set_xla_metadata(leaves[0], _xla_stream_annotation="1", inlineable="false")
    return jax.tree.unflatten(tree, [first, *leaves[1:]])
