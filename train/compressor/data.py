"""Batches of packed rows: deterministic, sharded over processes, resumable at any step.

Reads what `sparsejax pack-data` writes, or a folder saved by Hugging Face `datasets` whose `input_ids` are of one
length.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.errors import InvalidArgumentError
from train.compressor.packing import MANIFEST, open_packed

_DIGESTED = 64  # rows that a digest reads


def check_tokens(tokens: np.ndarray, vocab_size: int) -> None:
    """Raises InvalidArgumentError unless a model of so many tokens knows them all."""
    if tokens.max() >= vocab_size or tokens.min() < 0:
        raise InvalidArgumentError(
            f"The data has token ids from {tokens.min()} to {tokens.max()}; the model knows 0 to {vocab_size - 1}. "
            "Was it tokenized for another model?"
        )


class Rows:
    """Rows of token ids of one length, by number: a source for Grain."""

    def __init__(self, folder: Path, *, length: int | None = None, documents: bool = False) -> None:
        """Opens a folder.

        Args:
          length: tokens of a row to use, from its start; None: all.
          documents: give each token's document too.

        Raises:
          InvalidArgumentError: not a folder of packed rows, rows that differ in length or are shorter than asked for,
            or documents asked for where they are not known.
        """
        self._packed = self._column = None
        if (folder / MANIFEST).is_file():
            self._packed = open_packed(folder)
            self._count, whole = self._packed.tokens.shape
        else:
            self._column = _dataset(folder)
            if documents:
                raise InvalidArgumentError(
                    f"{folder} does not tell documents apart; pack the texts with sparsejax pack-data."
                )
            self._count = len(self._column)
            whole = len(_token_ids(self._column[0]["input_ids"], folder, 0)) if self._count else 0
        if self._count == 0:
            raise InvalidArgumentError(f"{folder} has no rows.")
        if length is not None and length > whole:
            raise InvalidArgumentError(f"length must be at most {whole}, the rows of {folder}; got {length}.")
        self.length = whole if length is None else length
        self._whole, self._documents, self._folder = whole, documents, folder

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> dict[str, np.ndarray]:
        """{"tokens": i32[length], and "documents": i32[length] if asked for} of row `index`."""
        row = int(index)
        if self._packed is not None:
            found = {"tokens": self._packed.tokens[row, : self.length].astype(np.int32)}
            if self._documents:
                found["documents"] = self._packed.documents(row, self.length)
            return found
        assert self._column is not None
        tokens = _token_ids(self._column[row]["input_ids"], self._folder, row)
        if len(tokens) != self._whole:
            raise InvalidArgumentError(
                f"Rows must be packed to one length: row {row} of {self._folder} has {len(tokens)} tokens, row 0 has "
                f"{self._whole}."
            )
        return {"tokens": tokens[: self.length]}

    def digest(self) -> str:
        """Tells rows apart from others, by their number and by a few of them from first to last."""
        found = hashlib.sha256(f"{self._count} x {self._whole}".encode())
        for row in np.unique(np.linspace(0, self._count - 1, _DIGESTED).astype(int)):
            for array in self[row].values():
                found.update(array.tobytes())
        return found.hexdigest()

    def __repr__(self) -> str:
        return f"Rows({self._folder}, {self._count} x {self.length})"


class LocalBatch(NamedTuple):
    """One step's rows of this process.

    Attributes:
      tokens: i32[A, B, T], A micro-batches.
      documents: i32[A, B, T] or None.
    """

    tokens: np.ndarray
    documents: np.ndarray | None


class Batches:
    """An endless stream of `LocalBatch`, shuffled anew in each pass; `state` and `restore` make it resumable."""

    def __init__(
        self, rows: Rows, *, micro_batches: int, batch: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        """
        Args:
          micro_batches, batch: A and B of this process.
          seed: of the order.
          process, processes: which of how many equal shares of the rows to read.

        Raises:
          InvalidArgumentError: fewer rows than one step needs, or Grain is not installed.
        """
        if importlib.util.find_spec("grain") is None:
            raise InvalidArgumentError(
                "Training reads its data with grain, which is not installed: pip install 'sparsejax[train]'."
            )
        import grain

        share = len(rows) // processes
        if share < micro_batches * batch:
            raise InvalidArgumentError(
                f"A step takes {micro_batches * batch} rows of each of {processes} processes (batch_size x "
                f"accumulation x its devices); the data has {share} for each."
            )
        self._shape = (micro_batches, batch)
        # Equal shares, so that one state fits all processes.
        dataset = grain.MapDataset.source(rows)[process : process + share * processes : processes]
        dataset = dataset.seed(seed).shuffle().repeat().batch(micro_batches * batch, drop_remainder=True)
        self._iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=16)))

    def __iter__(self) -> Iterator[LocalBatch]:
        return self

    def __next__(self) -> LocalBatch:
        found = next(self._iterator)
        shaped = {name: array.reshape(*self._shape, -1) for name, array in found.items()}
        return LocalBatch(shaped["tokens"], shaped.get("documents"))

    def state(self) -> dict[str, Any]:
        """Where the stream is, as JSON can hold it."""
        return json.loads(json.dumps(self._iterator.get_state()))

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken; the same rows and options are up to the caller."""
        self._iterator.set_state(state)


def _token_ids(values: Any, folder: Path, row: int) -> np.ndarray:
    """i32[T] of a row of a column input_ids."""
    try:
        tokens = np.asarray(values)
    except (ValueError, OverflowError):  # lists of different lengths, numbers beyond 64 bits
        tokens = np.zeros(0)
    fits = tokens.ndim == 1 and tokens.dtype.kind in "iu"
    if not fits or tokens.min(initial=0) < 0 or tokens.max(initial=0) > np.iinfo(np.int32).max:
        raise InvalidArgumentError(f"input_ids must be token ids, one list a row: row {row} of {folder} is none.")
    return tokens.astype(np.int32)


def _dataset(folder: Path) -> Any:
    """The `train` split of a saved Hugging Face dataset, with a column input_ids."""
    if not folder.is_dir():
        raise InvalidArgumentError(f"There is no data folder {folder}.")
    if not any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        raise InvalidArgumentError(
            f"{folder} holds no training data: neither {MANIFEST} (sparsejax pack-data) nor a dataset saved by Hugging "
            "Face datasets."
        )
    if importlib.util.find_spec("datasets") is None:
        raise InvalidArgumentError(
            f"{folder} needs the package datasets, which is not installed: pip install 'sparsejax[train]'."
        )
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            splits = ", ".join(str(name) for name in list(found))
            raise InvalidArgumentError(f"{folder} has no split 'train'; it has {splits}.")
        found = found["train"]
    if "input_ids" not in found.column_names:
        raise InvalidArgumentError(f"{folder} must have a column input_ids; it has {', '.join(found.column_names)}.")
    return found.select_columns(["input_ids"])
