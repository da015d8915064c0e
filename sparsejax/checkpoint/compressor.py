"""Compressor checkpoints: the published layout (safetensors) and our own (Orbax), both with a `config.json`.

Published tensors are named, for layer i, `model.layers.{i}.self_attn.compress_down.*` and `.compress_up.*` (with
split_kv `k_compress_down`, ... `v_compress_up`), weights [out, in]:

    linear      weight, bias
    mlp_gelu    0.weight, 0.bias, 2.weight, 2.bias
    mlp_swiglu  w12.weight, w12.bias (gate half first), w3.weight, w3.bias

`config.json` is the base model's with the compressor's fields laid over it, so a folder says what it was made for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.checkpoint.convert import new_folder
from sparsejax.checkpoint.errors import CheckpointError, TensorMismatchError
from sparsejax.checkpoint.mapping import Group, Parameter, Source, fuse, split, tree_of
from sparsejax.checkpoint.orbax_store import restore_group, save_group
from sparsejax.checkpoint.safetensors_files import SafetensorsReader, SafetensorsWriter
from sparsejax.checkpoint.source import find_folder, read_json
from sparsejax.compressor.config import PUBLISHED_NAMES, CompressorConfig
from sparsejax.errors import SparsejaxError
from sparsejax.models import ModelConfig

Layout = Literal["huggingface", "orbax"]

MANIFEST = "sparsejax_compressor.json"  # written last, so an Orbax folder that has it is complete
_FORMAT_VERSION = 1
_SHARD_BYTES = 4 << 30

_PREFIX = "model.layers.{}.self_attn."
_NAME = re.compile(
    r"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?((?:[kv]_)?compress_(?:down|up))\.((?:0|2|w12|w3)\.)?(weight|bias)"
)

# Published name of every linear layer of a projection, by ours.
_LAYERS: dict[str, dict[str, str]] = {
    "linear": {"out": ""},
    "mlp_gelu": {"hidden": "0.", "out": "2."},
    "mlp_swiglu": {"gate_up": "w12.", "out": "w3."},
}


def read_compressor_config(source: str | Path, *, references: str | None = None) -> CompressorConfig:
    """Configuration of a compressor checkpoint, before any of its arrays is read.

    In the published layout, sizes, types and biases are those of the tensors; `config.json` gives the rest, and what it
    says of them must agree.

    Args:
      source: folder or Hugging Face id.
      references: "cluster" or "e2e" where a published config leaves it open; None: as `CompressorConfig.from_hf`.

    Raises:
      CheckpointError: nothing there, or it holds no compressor.
      TensorMismatchError: tensors of one compressor that do not fit each other or config.json.
      CompressorConfigError: an option that is not allowed.
    """
    folder = find_folder(source, kind="compressor")
    try:
        return _read_config(folder, references)
    except SparsejaxError:
        raise
    except (KeyError, IndexError, TypeError, ValueError) as error:  # what is there is of another kind than it must be
        raise CheckpointError(
            f"The compressor in {folder} is damaged: {type(error).__name__}: {error}, in its config or tensors."
        ) from error


def _read_config(folder: Path, references: str | None) -> CompressorConfig:
    raw = read_json(folder / "config.json")
    if (folder / MANIFEST).is_file():
        manifest = read_json(folder / MANIFEST)
        if manifest.get("version") != _FORMAT_VERSION:
            raise CheckpointError(
                f"{folder / MANIFEST} has format version {manifest.get('version')!r}; this release reads "
                f"{_FORMAT_VERSION}."
            )
        sizes = {"num_layers": manifest["num_layers"], "kv_dim": manifest["kv_dim"]}
        return CompressorConfig.from_hf(raw, **sizes, references=references)
    return _published_config(folder, raw, _published_tensors(SafetensorsReader(folder)), references)


def load_compressor(
    source: str | Path,
    *,
    model: ModelConfig | None = None,
    dtype: Any = jnp.float32,
    references: str | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> tuple[CompressorConfig, dict[str, Any]]:
    """Loads a compressor from a folder or Hugging Face id, in either layout.

    Args:
      model: the base model that it is to be used with, checked before any array is read; None: no check.
      dtype: of all parameters; float32, the type of a master copy, by default.
      references: see `read_compressor_config`.
      sharding: where the parameters go; None: JAX's default device.

    Returns:
      (config, params), params as `sparsejax.compressor.Compressor` wants them for each layer.

    Raises:
      CompressorMismatchError: the compressor is for another model.
      CheckpointError, TensorMismatchError, CompressorConfigError: as `read_compressor_config`.
    """
    config = read_compressor_config(source, references=references)
    folder = find_folder(source, kind="compressor")
    if model is not None:
        config.require_model(model, where=f"The compressor in {folder}")
    groups = compressor_groups(config)
    if (folder / MANIFEST).is_file():
        dtypes = {parameter.path: jnp.dtype(dtype) for group in groups for parameter in group.parameters}
        leaves = {path: leaf for group in groups for path, leaf in restore_group(folder, group, dtypes, None).items()}
        wrong = [
            f"{'.'.join(p.path)}: shape {list(leaves[p.path].shape)}, expected {list(p.shape)}"
            for group in groups
            for p in group.parameters
            if leaves[p.path].shape != p.shape
        ]
        if wrong:
            raise TensorMismatchError(str(folder), missing=(), unexpected=(), misshaped=wrong)
    else:
        reader = SafetensorsReader(folder)
        stored = {canonical: name for name, (canonical, _) in _published_tensors(reader).items()}

        def blocks(name: str) -> Iterator[np.ndarray]:
            return reader.blocks(stored[name])

        leaves = {p.path: fuse(p, blocks, jnp.dtype(dtype)) for group in groups for p in group.parameters}
    place = sharding or jnp.zeros(()).sharding
    return config, tree_of({path: jax.device_put(leaf, place) for path, leaf in leaves.items()})


def save_compressor(
    out: str | Path,
    config: CompressorConfig,
    params: Mapping[str, Any],
    *,
    model: ModelConfig,
    layout: Layout = "huggingface",
    dtype: Any = None,
) -> Path:
    """Writes a compressor; the folder appears only when it is complete.

    Args:
      out: folder to make; it may exist if it is empty.
      params: as `load_compressor` gives them.
      model: the base model; its config.json is the base of the compressor's.
      layout: "huggingface" (the published one) or "orbax".
      dtype: to cast to; None: each parameter keeps its own.

    Returns:
      The path of the folder.

    Raises:
      CompressorMismatchError: config is for another model.
      OutputExistsError: out holds something.
    """
    config.require_model(model)
    if layout not in ("huggingface", "orbax"):
        raise CheckpointError(f'layout must be "huggingface" or "orbax", got {layout!r}.')
    groups = compressor_groups(config)
    leaves = {p.path: np.asarray(_at(params, p.path)) for group in groups for p in group.parameters}
    if dtype is not None:
        leaves = {path: leaf.astype(jnp.dtype(dtype)) for path, leaf in leaves.items()}
    with new_folder(Path(out)) as folder:
        raw = {**model.to_hf(), **config.to_hf()}
        raw["dtype"] = next(iter(leaves.values())).dtype.name
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        if layout == "orbax":
            for group in groups:
                save_group(folder, group, {p.path: np.ascontiguousarray(leaves[p.path]) for p in group.parameters})
            manifest = {"version": _FORMAT_VERSION, "num_layers": config.num_layers, "kv_dim": config.kv_dim}
            (folder / MANIFEST).write_text(json.dumps(manifest) + "\n", encoding="utf-8")
        else:
            writer = SafetensorsWriter(folder, _SHARD_BYTES)
            for group in groups:
                writer.reserve(sum(leaves[p.path].nbytes for p in group.parameters))
                for parameter in group.parameters:
                    writer.add(split(parameter, leaves[parameter.path]))
            writer.close()
    return Path(out)


def compressor_groups(config: CompressorConfig) -> list[Group]:
    """All parameters of a compressor, a group a layer, with the published tensors that they are made of."""
    return [Group(f"layers_{index}", tuple(_layer(config, index))) for index in range(config.num_layers)]


def _layer(config: CompressorConfig, index: int) -> Iterator[Parameter]:
    halves = ("k_", "v_") if config.split_kv else ("",)
    sizes = {
        "down": (config.input_size, config.kv_compressed_size),
        "up": (config.kv_compressed_size, config.input_size),
    }
    for half in halves:
        for direction, (inputs, outputs) in sizes.items():
            kind = config.down_type if direction == "down" else config.up_type
            hidden = config.down_intermediate_size if direction == "down" else config.up_intermediate_size
            shapes = {"hidden": (hidden, inputs), "gate_up": (2 * hidden, inputs), "out": (outputs, hidden or inputs)}
            for ours, theirs in _LAYERS[kind].items():
                name = f"{_PREFIX.format(index)}{half}compress_{direction}.{theirs}"
                path = (f"layers_{index}", f"{half}{direction}", ours)
                yield Parameter((*path, "kernel"), (Source(f"{name}weight", shapes[ours]),), transpose=True)
                if config.bias:
                    yield Parameter((*path, "bias"), (Source(f"{name}bias", shapes[ours][:1]),))


def _published_tensors(reader: SafetensorsReader) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(canonical name, shape) of every compressor tensor by its stored name; wrappers may have prefixed names."""
    found = {}
    for name, info in reader.tensors.items():
        match = _NAME.fullmatch(name)
        if match:
            layer, module, inner, leaf = match.groups()
            found[name] = (f"{_PREFIX.format(int(layer))}{module}.{inner or ''}{leaf}", info.shape)
    if not found:
        raise CheckpointError(
            f"{reader.folder} holds no compressor: none of its {len(reader.tensors)} tensors is named like "
            f"{_PREFIX.format(0)}compress_down.weight."
        )
    return found


def _published_config(
    folder: Path, raw: Mapping[str, Any], found: Mapping[str, tuple[str, tuple[int, ...]]], references: str | None
) -> CompressorConfig:
    shapes = dict(found.values())
    layers = 1 + max(int(name.split(".")[2]) for name in shapes)
    split_kv = any(".k_compress_down." in name for name in shapes)
    half = "k_" if split_kv else ""
    first = f"{_PREFIX.format(0)}{half}compress_"
    kinds, hidden = {}, {}
    for direction in ("down", "up"):
        kinds[direction], hidden[direction] = _kind(folder, shapes, f"{first}{direction}.")
    inner = {"linear": "", "mlp_gelu": "0.", "mlp_swiglu": "w12."}[kinds["down"]]
    inputs = shapes[f"{first}down.{inner}weight"][1]
    last = _LAYERS[kinds["down"]]["out"]
    latent = shapes[f"{first}down.{last}weight"][0]
    by_tensors: dict[str, Any] = {
        "split_kv": split_kv,
        "compressor_linear_bias": f"{first}up.{_LAYERS[kinds['up']]['out']}bias" in shapes,
    }
    if not any(raw.get(name) for name in PUBLISHED_NAMES["kv_compressed_size"]):
        by_tensors["kv_compressed_size"] = latent
    kv_dim = inputs * (2 if split_kv else 1)
    stated = CompressorConfig.from_hf({**raw, **by_tensors}, num_layers=layers, kv_dim=kv_dim, references=references)
    config = replace(
        stated,
        down_type=kinds["down"],
        up_type=kinds["up"],
        down_intermediate_size=hidden["down"],
        up_intermediate_size=hidden["up"],
    )
    wrong = _contradictions(raw, stated, config, latent)
    expected = {s.name: s.shape for group in compressor_groups(config) for p in group.parameters for s in p.sources}
    wrong += [
        f"{name}: shape {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape and latent == config.kv_compressed_size
    ]
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected]
    if wrong or missing or unexpected:
        raise TensorMismatchError(str(folder), missing=missing, unexpected=unexpected, misshaped=wrong)
    return config


def _kind(folder: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> tuple[str, int]:
    """(type, intermediate size or 0) of the projection whose tensors begin with prefix."""
    for kind, inner in (("mlp_swiglu", "w3."), ("mlp_gelu", "2."), ("linear", "")):
        if f"{prefix}{inner}weight" in shapes:
            return kind, 0 if kind == "linear" else shapes[f"{prefix}{inner}weight"][1]
    raise TensorMismatchError(str(folder), missing=[f"{prefix}weight"], unexpected=(), misshaped=())


def _contradictions(
    raw: Mapping[str, Any], stated: CompressorConfig, config: CompressorConfig, latent: int
) -> list[str]:
    """What config.json says explicitly and the tensors deny."""
    wrong = []
    if stated.kv_compressed_size != latent:
        wrong.append(f"kv_compressed_size: {stated.kv_compressed_size} in config.json, {latent} in the tensors")
    for direction in ("down", "up"):
        said, found = getattr(stated, f"{direction}_type"), getattr(config, f"{direction}_type")
        if raw.get(f"compressor_{direction}_type", "auto") != "auto" and said != found:
            wrong.append(f"compressor_{direction}_type: {said} in config.json, {found} in the tensors")
    return wrong


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
