"""Files that a command writes at its end, checked before it begins."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsejax.errors import InvalidArgumentError


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses paths of --json and --plot that could not be written after the work is done.

    Raises:
      InvalidArgumentError: no such folder, a path that cannot be written or that another argument names, too, a figure
        of unknown kind, no matplotlib.
    """
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is None:
            continue
        if not path.parent.is_dir():
            raise InvalidArgumentError(f"--{name} {path} cannot be written: there is no folder {path.parent}.")
        if path.is_dir():
            raise InvalidArgumentError(f"--{name} {path} cannot be written: it is a folder.")
        for other, given in vars(args).items():
            # Some name files or something else, as text: a model, or traces with commas between.
            files = [given] if isinstance(given, Path) else given.split(",") if isinstance(given, str) else []
            if other != name and any(Path(each).resolve() == path.resolve() for each in files if each):
                raise InvalidArgumentError(f"--{name} and --{other.replace('_', '-')} are the same file, {path}.")
        _try_to_open(name, path)
        if name == "plot":
            from sparsejax.bench.plots import require_matplotlib

            require_matplotlib()
            from matplotlib.backend_bases import FigureCanvasBase

            kinds = sorted(FigureCanvasBase.get_supported_filetypes())
            if path.suffix[1:].lower() not in kinds:
                raise InvalidArgumentError(
                    f"--{name} {path} must end in a kind of figure: one of {', '.join(f'.{kind}' for kind in kinds)}."
                )


def _try_to_open(name: str, path: Path) -> None:
    """Opens a file for writing, and leaves everything as it was."""
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise InvalidArgumentError(f"--{name} {path} cannot be written: {error.strerror}.") from None
    if is_new:
        path.unlink()
