"""Converts between Hugging Face folders and Orbax folders, group by group, all or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sparsejax.checkpoint.errors import CheckpointError, OutputExistsError
from sparsejax.checkpoint.load import require_dtype
from sparsejax.checkpoint.mapping import Parameter, fuse, parameter_groups, split
from sparsejax.checkpoint.orbax_store import read_manifest, restore_group, save_group, write_manifest
from sparsejax.checkpoint.progress import group_bytes, progress_bar
from sparsejax.checkpoint.safetensors_files import SafetensorsReader, SafetensorsWriter
from sparsejax.checkpoint.source import INDEX, MANIFEST, load_config, read_json, resolve
from sparsejax.folders import check_can_make

# Config and tokenizer, as their writers name them.
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")


def convert_from_hf(source: str | Path, out: str | Path, *, dtype: str | None = None, progress: bool = True) -> Path:
    """Writes a Hugging Face checkpoint as an Orbax folder, with config and tokenizer files beside the parameters.

    Tensors are read in blocks, fused and written one group (a layer or a large table) at a time; host memory holds one
    group and some scratch. Everything is written to a sibling folder that is renamed at the end, so a
    conversion that was killed leaves no `out`; what it left beside it is removed by the next one.

    Args:
      source: folder or Hugging Face id.
      out: folder to make; it may exist if it is empty.
      dtype: "float32", "bfloat16" or "float16" to cast to; None: each tensor keeps its own, and converting back gives
        the same bits.
      progress: show a progress bar in bytes.

    Returns:
      The path of the folder.

    Raises:
      OutputExistsError: `out` is a file or a folder that is not empty.
      CheckpointError: the source cannot be read, or its tensors do not fit its config (all listed).
    """
    target = None if dtype is None else require_dtype(dtype)
    checkpoint = resolve(source)
    if checkpoint.kind != "huggingface":
        raise CheckpointError(f"{checkpoint.folder} is an Orbax checkpoint already.")
    config = load_config(checkpoint)
    reader = SafetensorsReader(checkpoint.folder)
    reader.check(config)

    def dtype_of(parameter: Parameter) -> np.dtype:
        if target is not None:
            return target
        return jnp.result_type(*(reader.dtype(source.name) for source in parameter.sources))

    groups = parameter_groups(config)
    dtypes = {parameter.path: dtype_of(parameter) for group in groups for parameter in group.parameters}
    with new_folder(Path(out)) as folder, progress_bar("Converting", groups, dtypes, shown=progress) as bar:
        for group in groups:
            arrays = {p.path: fuse(p, reader.blocks, dtypes[p.path]) for p in group.parameters}
            save_group(folder, group, arrays)
            del arrays  # before the next group is read
            bar.update(group_bytes(group, dtypes))
        _copy_side_files(checkpoint.folder, folder, target)
        write_manifest(folder, config, dtypes)
    return Path(out)


def convert_to_hf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 1 << 30,
    progress: bool = True,
) -> Path:
    """Writes an Orbax folder as a Hugging Face one: safetensors (with an index if several), config, tokenizer.

    Undoes `convert_from_hf` bit for bit when neither changes the dtype. Atomic in the same way.

    Args:
      source: folder that `convert_from_hf` wrote.
      out: folder to make; it may exist if it is empty.
      dtype: as in `convert_from_hf`.
      max_shard_bytes: size at which a new weight file is begun (one group is never divided).
      progress: show a progress bar in bytes.

    Returns:
      The path of the folder.

    Raises:
      OutputExistsError, CheckpointError: as `convert_from_hf`.
    """
    target = None if dtype is None else require_dtype(dtype)
    checkpoint = resolve(source)
    if checkpoint.kind != "orbax":
        raise CheckpointError(f"{checkpoint.folder} is a Hugging Face checkpoint already.")
    config = load_config(checkpoint)
    groups = parameter_groups(config)
    dtypes = {path: target or stored for path, stored in read_manifest(checkpoint.folder, config).items()}
    with new_folder(Path(out)) as folder, progress_bar("Converting", groups, dtypes, shown=progress) as bar:
        writer = SafetensorsWriter(folder, max_shard_bytes)
        for group in groups:
            size = group_bytes(group, dtypes)
            writer.reserve(size)
            arrays = restore_group(checkpoint.folder, group, dtypes, None)
            for parameter in group.parameters:
                writer.add(split(parameter, arrays.pop(parameter.path)))
            bar.update(size)
        writer.close()
        _copy_side_files(checkpoint.folder, folder, target)
    return Path(out)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling of `out` that becomes `out` if the block succeeds and is removed if it raises.

    Raises:
      OutputExistsError: `out` is a file or a folder that is not empty.
      InvalidArgumentError: it cannot be made.
    """
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} exists already and is not an empty folder; remove it or choose another name.")
    check_can_make(out.parent if out.exists() else out)  # it is made beside, and takes the place of an empty one
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _copy_side_files(source: Path, out: Path, dtype: np.dtype | None) -> None:
    for pattern in _SIDE_FILES:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in (INDEX, MANIFEST):
                shutil.copyfile(file, out / file.name)
    if dtype is not None:
        config = read_json(out / "config.json")
        config.pop("torch_dtype", None)  # the name that transformers 4 used
        config["dtype"] = dtype.name
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
