"""Checks of argument values at the public edge. Each returns the value normalised, or raises an error that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from sparsejax.errors import InvalidArgumentError


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high]; numpy integers pass, bools do not.

    Raises:
      InvalidArgumentError: it is not; the message says what is allowed.
    """
    allowed = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"
    try:
        if isinstance(value, bool):
            raise TypeError
        result = operator.index(value)  # arrays have it, and raise, unless they are one whole number
    except TypeError:
        raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}.") from None
    if result < low or (high is not None and result > high):
        raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}.")
    return result


def number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """`value` as a finite float in [low, high], or in (low, high] if `above`.

    Raises:
      InvalidArgumentError: it is not; the message says what is allowed.
    """
    bracket = "(" if above else "["
    end = "infinity)" if high == math.inf else f"{high:g}]"
    allowed = f"a finite number in {bracket}{low:g}, {end}"
    try:
        if isinstance(value, bool | str):
            raise TypeError
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}.") from None
    if not math.isfinite(result) or result > high or result < low or (above and result == low):
        raise InvalidArgumentError(f"{name} must be {allowed}, got {value!r}.")
    return result


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """`value`, which must be one of `allowed`.

    Raises:
      InvalidArgumentError: it is not; the message lists them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise InvalidArgumentError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}.")
    return value


def flag(name: str, value: Any) -> bool:
    """`value`, which must be True or False.

    Raises:
      InvalidArgumentError: it is neither.
    """
    if not isinstance(value, bool):
        raise InvalidArgumentError(f"{name} must be True or False, got {value!r}.")
    return value


def odd(name: str, value: Any) -> int:
    """`value` as a positive odd int, the size of a centred window.

    Raises:
      InvalidArgumentError: it is not.
    """
    size = whole(name, value, 1)
    if size % 2 == 0:
        raise InvalidArgumentError(f"{name} must be odd, so that the window is centred; got {value!r}.")
    return size


def unicode_text(name: str, value: str) -> str:
    """`value`, which must be whole characters: JSON and command lines can hold half of a surrogate pair.

    Raises:
      InvalidArgumentError: it does.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{name} holds half of a surrogate pair: {error.reason}.") from None
    return value
