"""What can be wrong with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

from sparsejax.errors import CheckpointError

_LISTED = 40  # names of one kind in a message; a wrong architecture would list hundreds


class CheckpointNotFoundError(CheckpointError):
    """No checkpoint at the given path, or a Hugging Face id that can be neither downloaded nor found in the cache."""


class OutputExistsError(CheckpointError):
    """The folder to write to already holds something."""


class TensorMismatchError(CheckpointError):
    """The tensors of a checkpoint are not those that its config asks for. Lists all of them at once.

    Attributes:
      missing: names that the config asks for and the checkpoint lacks.
      unexpected: names that the checkpoint holds and the config has no use for.
      misshaped: lines that say name, shape or dtype found, and what was expected.
    """

    def __init__(self, where: str, *, missing: Iterable[str], unexpected: Iterable[str], misshaped: Iterable[str]):
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.misshaped = tuple(misshaped)
        parts = [f"The tensors of {where} do not fit its config.json."]
        for label in ("missing", "unexpected", "misshaped"):
            names = getattr(self, label)
            if names:
                more = f"\n  ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                parts.append(f"{len(names)} {label}:" + "".join(f"\n  {name}" for name in names[:_LISTED]) + more)
        super().__init__("\n".join(parts))
