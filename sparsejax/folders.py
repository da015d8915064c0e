"""Folders that a command makes at its end, checked before it begins."""

from __future__ import annotations

import os
from pathlib import Path

from sparsejax.errors import InvalidArgumentError


def check_can_make(folder: Path, *, name: str = "") -> None:
    """Refuses a folder that could not be made, or written to where it is there already.

    Args:
      name: of the argument, for the message.

    Raises:
      InvalidArgumentError: something on the way to it is no folder, or may not be written.
    """
    folder = folder.expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    trouble = None
    if not there.is_dir():
        trouble = f"{there} is no folder"
    elif not os.access(there, os.W_OK | os.X_OK):
        trouble = f"{there} may not be written"
    if trouble is not None:
        raise InvalidArgumentError(f"{name} {folder} cannot be made: {trouble}.".lstrip())
