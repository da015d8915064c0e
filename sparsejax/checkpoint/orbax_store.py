"""One parameter group = one small Orbax checkpoint, so that no more than a group is ever in host memory.

    FOLDER/params/embed, FOLDER/params/layers_0, ..., FOLDER/sparsejax_checkpoint.json

The manifest names every parameter with shape and dtype. Orbax's per-parameter layout (zarr3, no OCDBT) is used: its
default keeps a compressed copy of everything until the end of a save.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sparsejax.checkpoint.errors import CheckpointError, TensorMismatchError
from sparsejax.checkpoint.mapping import Group, parameter_groups, tree_of
from sparsejax.checkpoint.source import MANIFEST, read_json
from sparsejax.models import ModelConfig

FORMAT_VERSION = 1
_CHUNK_BYTES = 16 << 20  # unit of compression, and so of the scratch memory of a save


class _Uncopied(np.ndarray):
    """Orbax copies host arrays, in case they change during a background save; here the save is awaited."""

    def __deepcopy__(self, memo: Any) -> _Uncopied:
        return self


def save_group(folder: Path, group: Group, arrays: Mapping[tuple[str, ...], np.ndarray]) -> None:
    """Writes a group's arrays (by parameter path) below folder."""
    uncopied = {path: array.view(_Uncopied) for path, array in arrays.items()}
    save_args = {path: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES) for path in arrays}
    with _checkpointer() as checkpointer:
        checkpointer.save(
            _group_folder(folder, group),
            args=ocp.args.PyTreeSave(tree_of(uncopied), save_args=tree_of(save_args)),
        )


def restore_group(
    folder: Path, group: Group, dtypes: Mapping[tuple[str, ...], Any], sharding: jax.sharding.Sharding | None
) -> dict[tuple[str, ...], Any]:
    """Reads a group's arrays, by parameter path.

    Args:
      dtypes: type that each array is cast to.
      sharding: where to; None: NumPy arrays on the host.

    Raises:
      CheckpointError: files are absent or damaged.
    """
    item, arguments = {}, {}
    for parameter in group.parameters:
        path, dtype = parameter.path, dtypes[parameter.path]
        item[path] = jax.ShapeDtypeStruct(parameter.shape, dtype)
        if sharding is None:
            arguments[path] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        else:
            arguments[path] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=parameter.shape, dtype=dtype)
    where = _group_folder(folder, group)
    try:
        with _checkpointer() as checkpointer:
            tree = checkpointer.restore(
                where, args=ocp.args.PyTreeRestore(item=tree_of(item), restore_args=tree_of(arguments))
            )
    except jax.errors.JaxRuntimeError:
        raise  # the device's, which may be out of memory
    except Exception as error:  # whatever Orbax and TensorStore raise for a file that is absent or cut
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(f"{where} is absent or damaged: {reason:.300} Convert the model again.") from error
    return {path: _at(tree, path) for path in item}


def write_manifest(folder: Path, config: ModelConfig, dtypes: Mapping[tuple[str, ...], np.dtype]) -> None:
    """Writes the manifest; the folder counts as a checkpoint from then on."""
    parameters = {
        "/".join(parameter.path): {"shape": list(parameter.shape), "dtype": dtypes[parameter.path].name}
        for group in parameter_groups(config)
        for parameter in group.parameters
    }
    content = {"format": "sparsejax-orbax", "version": FORMAT_VERSION, "parameters": parameters}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path, config: ModelConfig) -> dict[tuple[str, ...], np.dtype]:
    """Stored dtype of every parameter.

    Raises:
      CheckpointError: the manifest is of another version, or damaged.
      TensorMismatchError: it does not list what the config asks for, or a group's folder is absent.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / MANIFEST} has format version {manifest.get('version')!r}; this release reads {FORMAT_VERSION}. "
            "Convert the model again."
        )
    stored = manifest.get("parameters")
    if not isinstance(stored, dict) or not all(
        isinstance(x, dict) and {"shape", "dtype"} <= x.keys() for x in stored.values()
    ):
        raise CheckpointError(f"{folder / MANIFEST} does not list the parameters. Convert the model again.")
    missing, misshaped, dtypes = [], [], {}
    for group in parameter_groups(config):
        present = _group_folder(folder, group).is_dir()
        for parameter in group.parameters:
            name = "/".join(parameter.path)
            entry = stored.get(name)
            if entry is None or not present:
                missing.append(name)
            elif tuple(entry["shape"]) != parameter.shape:
                misshaped.append(f"{name}: shape {entry['shape']}, expected {list(parameter.shape)}")
            else:
                dtypes[parameter.path] = np.dtype(entry["dtype"])
    known = {"/".join(parameter.path) for group in parameter_groups(config) for parameter in group.parameters}
    unexpected = [name for name in stored if name not in known]
    if missing or unexpected or misshaped:
        raise TensorMismatchError(str(folder), missing=missing, unexpected=unexpected, misshaped=misshaped)
    return dtypes


def _group_folder(folder: Path, group: Group) -> Path:
    return folder.absolute() / "params" / group.name


@contextmanager
def _checkpointer() -> Iterator[ocp.Checkpointer]:
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True))
    logger = logging.getLogger("absl")
    logger.addFilter(_without_merge_notice)
    try:
        yield checkpointer
    finally:
        logger.removeFilter(_without_merge_notice)
        checkpointer.close()


def _without_merge_notice(record: logging.LogRecord) -> bool:
    """Drops the notice that there is no OCDBT to merge, which Orbax gives for every save without OCDBT."""
    return "Skipping merge of OCDBT" not in record.msg


def _at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree
