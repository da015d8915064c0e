"""The frozen model as training wants it: its layers stacked along one axis, so that a scan compiles one layer only."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.checkpoint import load_model
from sparsejax.models import ModelConfig, abstract_params
from sparsejax.models.decoder import INIT_SCALE
from train.compressor.placement import Placement


def load_frozen(source: str | Path, placement: Placement, dtype: Any, *, progress: bool) -> Any:
    """The frozen parameters of a checkpoint, as `stack_layers` makes them, on the mesh.

    On one device the weights go straight there. On several, a process holds them in host memory once and gives every
    device its part.
    """
    single = placement.mesh.size == 1
    sharding = None if single else jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    config, params = load_model(source, dtype=dtype, sharding=sharding, progress=progress)
    return stack_layers(config, params, placement)


def stack_layers(config: ModelConfig, params: dict[str, Any], placement: Placement) -> dict[str, Any]:
    """{"layers": every leaf of a layer as [L, ...], and embed, final_norm, lm_head as they are}, on the mesh.

    The given tree is emptied on the way, so that no weight is held twice for longer than its own kind takes.
    """
    layers = [params.pop(f"layers_{index}") for index in range(config.num_layers)]
    flat, tree = zip(*(jax.tree.flatten(layer) for layer in layers), strict=True)
    del layers
    stacked = []
    kinds = [list(leaves) for leaves in zip(*flat, strict=True)]
    del flat
    while kinds:
        leaves = kinds.pop(0)
        if placement.mesh.size == 1:
            stacked.append(jnp.stack(leaves))
        else:
            whole = np.stack([np.asarray(leaf) for leaf in leaves])
            stacked.append(placement.put(whole, placement.frozen(whole.shape, stacked=True)))
    rest = {
        name: placement.put(leaf, placement.frozen(leaf.shape, stacked=False)) for name, leaf in sorted(params.items())
    }
    params.clear()
    return {**rest, "layers": jax.tree.unflatten(tree[0], stacked)}


def random_frozen(config: ModelConfig, placement: Placement, dtype: Any) -> dict[str, Any]:
    """Frozen parameters drawn at random, where they belong: for measuring speed without a checkpoint."""
    abstract = abstract_params(config, dtype)
    layers = [abstract.pop(f"layers_{index}") for index in range(config.num_layers)]
    stack = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((len(layers), *leaf.shape), leaf.dtype), layers[0])
    shapes = {**abstract, "layers": stack}
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)

    def draw(index: int, path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = placement.frozen(leaf.shape, stacked=path[0].key == "layers")
        if path[-1].key.endswith("norm"):
            return jnp.ones(leaf.shape, leaf.dtype, device=sharding)
        return _normal(jax.random.fold_in(jax.random.key(0), index), leaf.shape, leaf.dtype, sharding)

    return jax.tree.unflatten(tree, [draw(index, path, leaf) for index, (path, leaf) in enumerate(leaves)])


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, sharding: Any) -> jax.Array:
    @partial(jax.jit, out_shardings=sharding)
    def draw(key: jax.Array) -> jax.Array:
        # In the target's own type: a float32 copy of the largest stack would not fit beside the others.
        return jnp.asarray(INIT_SCALE, dtype) * jax.random.normal(key, shape, dtype)

    return draw(key)


def stack_compressor(params: dict[str, Any]) -> Any:
    """{"layers_0": tree, ...} -> one tree with leaves [L, ...]."""
    layers = [params[f"layers_{index}"] for index in range(len(params))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack_compressor(stacked: Any) -> dict[str, Any]:
    """Undoes `stack_compressor`, on the host."""
    host = jax.tree.map(np.asarray, stacked)
    count = jax.tree.leaves(host)[0].shape[0]
    return {f"layers_{index}": jax.tree.map(lambda leaf, i=index: leaf[i], host) for index in range(count)}
