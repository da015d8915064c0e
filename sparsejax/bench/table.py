"""Plain-text tables of measurements: a line a row, columns as wide as they need to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Column = tuple[str, Callable[[Any], str | None]]
"""A title, and what stands under it for a row; None where nothing was measured."""


def format_rows(columns: Sequence[Column], rows: Sequence[Any]) -> str:
    """The titles, then a line a row, aligned to the right; "-" where there is no value."""
    cells = [
        [title for title, _ in columns],
        *([("-" if text is None else text) for text in (cell(row) for _, cell in columns)] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in cells)


def number(value: float | None, decimals: int, *, times: float = 1.0) -> str | None:
    """A measured value in the unit of its column, or None if there is none."""
    return None if value is None else f"{times * value:.{decimals}f}"


def percent(value: float | None, decimals: int = 1) -> str | None:
    """A share in percent, or None if there is none."""
    return None if value is None else f"{value:.{decimals}%}"
