"""Kernels whose lowering takes long, lowered once for all programs that hold them.

JAX lowers a kernel anew for every program. For a large Mosaic GPU kernel that is most of the time that tracing and
lowering a step takes, and steps that differ in everything else hold the same kernel. `jax.export` keeps what a function
was lowered to, and calling that copies it into the program. It is then the same to the byte in all of them, where else
it tells from where it was called; so the compiler behind it, which looks for kernels that it has compiled, finds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jax import export

MOST_KERNELS = 64


def lowered_once(function: Callable, *arrays: jax.Array, **static: Hashable) -> Any:
    """What `function(*arrays, **static)` is in a program for CUDA; neither to be differentiated nor mapped over.

    To be called inside a jitted function, which has its layers share one copy.
    """
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
    kernel = _lowered(function, shapes, tuple(sorted(static.items())), jax.sharding.get_abstract_mesh())
    return kernel.call(*arrays)


@functools.lru_cache(maxsize=MOST_KERNELS)
def _lowered(function: Callable, shapes: tuple, static: tuple, device: Hashable) -> export.Exported:
    """device: the mesh that may say for which GPU is lowered; it is in force already."""
    del device
    return export.export(jax.jit(functools.partial(function, **dict(static))), platforms=("cuda",))(*shapes)
