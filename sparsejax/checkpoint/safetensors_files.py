"""Reads and writes Hugging Face safetensors folders piece by piece, without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sparsejax.checkpoint.errors import CheckpointError, TensorMismatchError
from sparsejax.checkpoint.mapping import EMBEDDING, LM_HEAD, expected_tensors, is_harmless
from sparsejax.checkpoint.source import INDEX, SINGLE_FILE, read_json
from sparsejax.models import ModelConfig

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_BLOCK_BYTES = 8 << 20  # rows read at once: small enough for the transposed copy to stay in the CPU's cache


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is; dtype is safetensors' name of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsReader:
    """The tensors of a Hugging Face folder: one model.safetensors, or shards with an index.

    Only headers are read until a tensor is asked for. Files are opened anew for each read: pages of an open memory map
    count as the process's memory, and a shard can be larger than all else.
    """

    def __init__(self, folder: Path):
        """Reads the headers.

        Raises:
          CheckpointError: no safetensors, or a shard that is absent or broken.
        """
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        for file in _shard_files(folder):
            with _open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                    piece = shard.get_slice(name)
                    self.tensors[name] = TensorInfo(file, tuple(piece.get_shape()), piece.get_dtype())

    def check(self, config: ModelConfig) -> None:
        """Raises TensorMismatchError unless the tensors are exactly those of the config (harmless extras aside).

        Of a tied model that has a head all the same, both are read: a head of its own is no extra to be dropped.
        """
        expected = expected_tensors(config)
        misshaped = []
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is not None and info.shape != shape:
                misshaped.append(f"{name}: shape {list(info.shape)}, expected {list(shape)}")
            elif info is not None and info.dtype not in DTYPES:
                misshaped.append(f"{name}: dtype {info.dtype}, expected one of {', '.join(DTYPES)}")
        missing = [name for name in expected if name not in self.tensors]
        unexpected = [name for name in self.tensors if name not in expected and not is_harmless(config, name)]
        if missing or unexpected or misshaped:
            raise TensorMismatchError(str(self.folder), missing=missing, unexpected=unexpected, misshaped=misshaped)
        if config.tie_embeddings and LM_HEAD in self.tensors and not self._equal(LM_HEAD, EMBEDDING):
            raise CheckpointError(
                f"{self.folder} says that the embeddings are tied, but {LM_HEAD} differs from {EMBEDDING}. Set "
                '"tie_word_embeddings": false in its config.json if the model has a head of its own; else remove it.'
            )

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors are the same, numbers that are none included."""
        if self.tensors[one].shape != self.tensors[other].shape or self.dtype(one) != self.dtype(other):
            return False
        return all(a.tobytes() == b.tobytes() for a, b in zip(self.blocks(one), self.blocks(other), strict=True))

    def dtype(self, name: str) -> np.dtype:
        """NumPy type of a tensor."""
        return DTYPES[self.tensors[name].dtype]

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        with _open(self.tensors[name].file) as shard:
            return shard.get_tensor(name)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """A tensor as blocks of consecutive rows, a few MB each."""
        info = self.tensors[name]
        row_bytes = int(np.prod(info.shape[1:], dtype=np.int64)) * DTYPES[info.dtype].itemsize
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))
        for start in range(0, info.shape[0], step):
            with _open(info.file) as shard:
                yield shard.get_slice(name)[start : min(start + step, info.shape[0])]


class SafetensorsWriter:
    """Writes tensors into shards of at most `max_shard_bytes` (or one group), then the index."""

    def __init__(self, folder: Path, max_shard_bytes: int):
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._total_bytes = 0
        self._shards: list[list[str]] = []

    def reserve(self, nbytes: int) -> None:
        """Makes room for tensors of nbytes that will follow, by writing the shard that they would not fit into."""
        if self._pending and self._pending_bytes + nbytes > self._max_shard_bytes:
            self._flush()

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Takes contiguous arrays by name; they are held until their shard is written."""
        self._pending |= tensors
        self._pending_bytes += sum(tensor.nbytes for tensor in tensors.values())

    def close(self) -> None:
        """Writes what is held, gives the shards their final names, and writes the index if there are several."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            self._shard_path(0).rename(self._folder / SINGLE_FILE)
            return
        weight_map = {}
        for index, names in enumerate(self._shards):
            final = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(index).rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        content: dict[str, Any] = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        if not self._pending:
            return
        # transformers reads the framework's name from the metadata.
        save_file(self._pending, self._shard_path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _shard_path(self, index: int) -> Path:
        return self._folder / f"shard-{index:05d}.safetensors"


def _shard_files(folder: Path) -> list[Path]:
    if (folder / SINGLE_FILE).is_file():  # also beside an index: transformers looks for it first
        return [folder / SINGLE_FILE]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{folder / INDEX} has no weight_map from tensors to files.")
        files = [folder / name for name in sorted(set(weight_map.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise CheckpointError(
                f"{folder} lacks {len(absent)} of its {len(files)} weight files: {', '.join(absent)}."
            )
        return files
    hint = " Its weights are PyTorch .bin files: save them as safetensors first." if any(folder.glob("*.bin")) else ""
    raise CheckpointError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX}.{hint}")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no readable safetensors file: {error}") from error
