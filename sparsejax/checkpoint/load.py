"""Brings a checkpoint's parameters onto the device, a group at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.checkpoint.errors import CheckpointError
from sparsejax.checkpoint.mapping import EMBEDDING, Group, Parameter, parameter_groups, tree_of
from sparsejax.checkpoint.orbax_store import read_manifest, restore_group
from sparsejax.checkpoint.progress import group_bytes, progress_bar
from sparsejax.checkpoint.safetensors_files import SafetensorsReader
from sparsejax.checkpoint.source import Checkpoint, load_config, read_json, resolve
from sparsejax.models import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")

ReadGroup = Callable[[Group], dict[tuple[str, ...], jax.Array]]  # a group's parameters by path, on the device


def load_model(
    source: str | Path, *, dtype: Any = None, sharding: jax.sharding.Sharding | None = None, progress: bool = False
) -> tuple[ModelConfig, dict[str, Any]]:
    """Loads a model from a Hugging Face folder or id, or from a folder that `convert_from_hf` wrote.

    One group of tensors (a layer or a large table) is in host memory at a time; on the device, the parameters and the
    sources of one of them.

    Args:
      dtype: of all parameters, float32, bfloat16 or float16; None: the one the checkpoint was stored in
        (`stored_dtype`).
      sharding: where the parameters go; None: JAX's default device.
      progress: show a progress bar in bytes.

    Returns:
      (config, params), params as `sparsejax.models.Decoder` wants them.

    Raises:
      CheckpointError: nothing there, offline and not cached, broken files, tensors that do not fit (all listed), or a
        dtype that parameters cannot have.
      UnsupportedModelError: the config asks for what no decoder here computes.
    """
    checkpoint = resolve(source)
    config = load_config(checkpoint)
    dtype = stored_dtype(checkpoint) if dtype is None else require_dtype(dtype)
    sharding = sharding or jnp.zeros(()).sharding
    groups = parameter_groups(config)
    open_reader = _orbax_reader if checkpoint.kind == "orbax" else _safetensors_reader
    read_group = open_reader(checkpoint.folder, config, dtype, sharding)
    dtypes = {parameter.path: dtype for group in groups for parameter in group.parameters}
    leaves: dict[tuple[str, ...], jax.Array] = {}
    with progress_bar("Loading", groups, dtypes, shown=progress) as bar:
        for group in groups:
            # Dispatch runs ahead of the copies; unbounded, it would hold the whole model on the host.
            leaves |= jax.block_until_ready(read_group(group))
            gc.collect(0)  # JAX lets go of the NumPy arrays it was given when Python collects, and not before
            bar.update(group_bytes(group, dtypes))
    return config, tree_of(leaves)


def require_dtype(dtype: Any) -> np.dtype:
    """The dtype that a name or a type means, one that parameters can have.

    Raises:
      CheckpointError: it is none of them.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES or not found.isnative:
        raise CheckpointError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}.")
    return found


def stored_dtype(checkpoint: Checkpoint) -> np.dtype:
    """The type that config.json declares, or else that of the embedding table."""
    raw = read_json(checkpoint.folder / "config.json")
    declared = raw.get("dtype") or raw.get("torch_dtype")
    if declared in DTYPES:
        return jnp.dtype(declared)
    config = load_config(checkpoint)
    if checkpoint.kind == "orbax":
        return read_manifest(checkpoint.folder, config)[("embed",)]
    reader = SafetensorsReader(checkpoint.folder)
    reader.check(config)
    return reader.dtype(EMBEDDING)


def _orbax_reader(folder: Path, config: ModelConfig, dtype: np.dtype, sharding: jax.sharding.Sharding) -> ReadGroup:
    dtypes = dict.fromkeys(read_manifest(folder, config), dtype)
    return lambda group: restore_group(folder, group, dtypes, sharding)


def _safetensors_reader(
    folder: Path, config: ModelConfig, dtype: np.dtype, sharding: jax.sharding.Sharding
) -> ReadGroup:
    reader = SafetensorsReader(folder)
    reader.check(config)

    def read(parameter: Parameter) -> jax.Array:
        # Fused and transposed on the device, which is many times faster at it than the host.
        sources = [jax.device_put(reader.read(source.name), sharding) for source in parameter.sources]
        return _fuse(sources, transpose=parameter.transpose, dtype=dtype)

    return lambda group: {parameter.path: read(parameter) for parameter in group.parameters}


@partial(jax.jit, static_argnames=("transpose", "dtype"))
def _fuse(sources: list[jax.Array], *, transpose: bool, dtype: np.dtype) -> jax.Array:
    out = jnp.concatenate(sources) if len(sources) > 1 else sources[0]
    return (out.T if transpose else out).astype(dtype)
