"""What a step tells the host, as one array: copying each by itself would cost the host tens of microseconds apiece."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Output = TypeVar("Output")


@partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["structure", "leaves"])
@dataclass(frozen=True)
class Readback(Generic[Output]):
    """A tree of arrays in one.

    Attributes:
      words: i32[n], the leaves one after the other, 32 bits an element.
      structure: of the tree.
      leaves: (shape, name of the dtype) of each.
    """

    words: jax.Array
    structure: Any
    leaves: tuple[tuple[tuple[int, ...], str], ...]

    @classmethod
    def of(cls, output: Output) -> Readback[Output]:
        """Of a tree of arrays of bool or of 32 bits, inside a jitted function.

        Raises:
          TypeError: an array of another type.
        """
        leaves, structure = jax.tree.flatten(output)
        words = jnp.concatenate([jnp.zeros(0, jnp.int32), *map(_words, leaves)])
        return cls(words, structure, tuple((leaf.shape, leaf.dtype.name) for leaf in leaves))

    def get(self) -> Output:
        """The tree with NumPy leaves; waits for the device."""
        words, found, start = np.asarray(self.words), [], 0
        for shape, name in self.leaves:
            some = words[start : start + math.prod(shape)].reshape(shape)
            found.append(some != 0 if name == "bool" else some.view(name))
            start += some.size
        return jax.tree.unflatten(self.structure, found)


def _words(leaf: jax.Array) -> jax.Array:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.int32)
    if leaf.dtype.itemsize != 4:
        raise TypeError(f"what the host reads must be bool or of 32 bits, got {leaf.dtype}")
    return jax.lax.bitcast_convert_type(leaf, jnp.int32).ravel()
