"""Where arrays live on a mesh of devices: sequences over all of it, the frozen model over its "model" axis.

`data=D,model=N`: every device computes its own sequences. With N > 1 the weights of the frozen model are cut N ways,
and a layer's are gathered when it is computed, so that a model too large for one device can be trained for. Parameters
being trained are whole everywhere; XLA sums their gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.errors import InvalidArgumentError

AXES: tuple[str, ...] = ("data", "model")


def parse_mesh(text: str | None, *, devices: int) -> dict[str, int]:
    """ "data=4,model=2" -> {"data": 4, "model": 2}; axes left out are 1, and None means all devices as data.

    Raises:
      InvalidArgumentError: an unknown axis, a bad size, or a product that is not the number of devices.
    """
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    if text is None:
        return {**sizes, "data": devices}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis.strip() not in AXES or not size.strip().isdigit() or int(size) < 1:
            raise InvalidArgumentError(f"mesh must look like data=4 or data=4,model=2, got {text!r}.")
        sizes[axis.strip()] = int(size)
    if math.prod(sizes.values()) != devices:
        raise InvalidArgumentError(
            f"mesh {text!r} needs {math.prod(sizes.values())} devices; this run has {devices} (on a CPU, set XLA_FLAGS="
            "--xla_force_host_platform_device_count=N)."
        )
    return sizes


@dataclass(frozen=True)
class Placement:
    """A mesh with axes "data" and "model", and the shardings used on it."""

    mesh: Mesh

    @classmethod
    def make(cls, text: str | None = None) -> Placement:
        """The mesh that `parse_mesh` reads, over all devices of all processes."""
        sizes = parse_mesh(text, devices=jax.device_count())
        return cls(jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES)))

    @property
    def whole(self) -> NamedSharding:
        """The same array on every device."""
        return NamedSharding(self.mesh, P())

    @property
    def rows(self) -> NamedSharding:
        """Cut along the first axis over all devices."""
        return NamedSharding(self.mesh, P(AXES))

    @property
    def micro_batches(self) -> NamedSharding:
        """[accumulation, batch, ...], cut along the second axis over all devices."""
        return NamedSharding(self.mesh, P(None, AXES))

    def frozen(self, shape: tuple[int, ...], *, stacked: bool) -> NamedSharding:
        """Of a weight of the frozen model: its first axis (a stack's layers apart) that "model" divides is cut."""
        size = self.mesh.shape["model"]
        for axis in range(int(stacked), len(shape)):
            if size > 1 and shape[axis] % size == 0:
                return NamedSharding(self.mesh, P(*(None,) * axis, "model"))
        return self.whole

    def gathered(self, tree: Any) -> Any:
        """The arrays of a tree, whole on every device; for use inside jit."""
        if self.mesh.shape["model"] == 1:
            return tree
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self.whole), tree)

    def by_rows(self, x: jax.Array) -> jax.Array:
        """x cut along its first axis over all devices; for use inside jit."""
        return x if self.mesh.size == 1 else jax.lax.with_sharding_constraint(x, self.rows)

    def put(self, array: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
        """An array that every process holds whole, put where `sharding` says."""
        if jax.process_count() == 1:
            return jax.device_put(array, sharding)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    def put_batch(self, local: np.ndarray) -> jax.Array:
        """Micro-batches [accumulation, batch of this process, ...] as one array over all processes."""
        return jax.make_array_from_process_local_data(self.micro_batches, local)
