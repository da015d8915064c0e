"""Reading text files that a user names: UTF-8, and an error that says which file, and where it is none."""

from __future__ import annotations

from pathlib import Path

from sparsejax.errors import InvalidArgumentError


def read_text(path: str | Path, *, name: str | None = None) -> str:
    """The text of a UTF-8 file.

    Args:
      name: what messages call it, if not by its path.

    Raises:
      InvalidArgumentError: it cannot be read, or is no UTF-8.
    """
    name = str(path) if name is None else name
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"{name} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidArgumentError(f"{name} must be UTF-8 text; line {line} is not: {error.reason}.") from None


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """(number from 1, line) of the lines that are not blank.

    They end with a newline only: `str.splitlines` also ends them at characters that JSON and prompts may hold, such as
    U+2028.
    """
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
