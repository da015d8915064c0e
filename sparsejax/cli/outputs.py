"""Files that a command writes at its end, checked before it begins."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsejax.errors import InvalidArgumentError

OUTPUTS = ("json", "plot", "write_trace")
# Arguments that name a file, a folder or something else, as text: a model, or traces with commas between.
NAMED = ("model", "random_weights", "trace", "compressor", "tokenizer", "data")


def check_outputs(args: argparse.Namespace) -> None:
    """Refuses paths of --json, --plot and --write-trace that could not be written after the work is done.

    Raises:
      InvalidArgumentError: no such folder, a path that cannot be written or that another argument names, too, a figure
        of unknown kind, no matplotlib.
    """
    for name in OUTPUTS:
        path, option = getattr(args, name, None), f"--{name.replace('_', '-')}"
        if path is None:
            continue
        if not path.parent.is_dir():
            raise InvalidArgumentError(f"{option} {path} cannot be written: there is no folder {path.parent}.")
        if path.is_dir():
            raise InvalidArgumentError(f"{option} {path} cannot be written: it is a folder.")
        for other, given in vars(args).items():
            files = given.split(",") if other in NAMED and isinstance(given, str) else []
            files = [given] if isinstance(given, Path) else files
            if other != name and any(Path(each).resolve() == path.resolve() for each in files if each):
                raise InvalidArgumentError(f"{option} and --{other.replace('_', '-')} are the same file, {path}.")
        _try_to_open(option, path)
        if name == "plot":
            from sparsejax.bench.plots import require_matplotlib

            require_matplotlib()
            from matplotlib.backend_bases import FigureCanvasBase

            kinds = sorted(FigureCanvasBase.get_supported_filetypes())
            if path.suffix[1:].lower() not in kinds:
                raise InvalidArgumentError(
                    f"{option} {path} must end in a kind of figure: one of {', '.join(f'.{kind}' for kind in kinds)}."
                )


def _try_to_open(option: str, path: Path) -> None:
    """Opens a file for writing, and leaves everything as it was."""
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise InvalidArgumentError(f"{option} {path} cannot be written: {error.strerror}.") from None
    if is_new:
        path.unlink()
