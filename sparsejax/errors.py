"""Exceptions of sparsejax. Each carries a one-paragraph message: what was wrong, what was given, what is allowed.

All derive from `SparsejaxError`, and also from the built-in exception a Python user would expect in their place.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

_Value = TypeVar("_Value")


class SparsejaxError(Exception):
    """Base of every exception that sparsejax raises on purpose."""


class InvalidArgumentError(SparsejaxError, ValueError):
    """An argument has a value that is not allowed."""


class UnknownArgumentError(InvalidArgumentError, TypeError):
    """An argument (or a name given as one) does not exist."""


class EmptyPromptError(InvalidArgumentError):
    """A prompt has no tokens, so there is nothing to predict from."""


class PromptTooLongError(InvalidArgumentError):
    """A prompt exceeds `max_model_len`, or what the KV cache can ever hold."""


class DuplicateRequestError(InvalidArgumentError):
    """A request id is already in use by an unfinished request."""


class CheckpointError(SparsejaxError):
    """A checkpoint cannot be read or written."""


class OutOfMemoryError(SparsejaxError, MemoryError):
    """The device or host has no room for what was asked."""


class NotFiniteError(SparsejaxError, ArithmeticError):
    """The model's logits are NaN or infinite, so there is no next token."""

    @classmethod
    def after(cls, whose: str, generated: int) -> NotFiniteError:
        """The error of `whose` logits, behind so many generated tokens."""
        return cls(
            f"the logits of {whose} are NaN or infinite after {generated} generated tokens: the weights hold such "
            "numbers, or float16 overflows (bfloat16 and float32 do not)."
        )


class SchedulingError(SparsejaxError, RuntimeError):
    """The scheduler's protocol was broken by its caller; the request states would no longer be exact."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that `name` most likely meant, or None if none is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_key_error(name: str, valid: Iterable[str], where: str) -> UnknownArgumentError:
    """The error for a keyword argument that does not exist.

    Args:
      name: the key that was given.
      valid: the keys that exist.
      where: what was called with it, e.g. "LLM".
    """
    valid = sorted(valid)
    guess = nearest(name, valid)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return UnknownArgumentError(f"{where} has no argument {name!r}.{hint} Valid arguments: {', '.join(valid)}.")


def pick(argument: str, name: object, table: Mapping[str, _Value], valid: Iterable[str]) -> _Value:
    """`table[name]`.

    Args:
      argument: what messages call the name, e.g. "method".
      valid: names that exist, as messages list them.

    Raises:
      UnknownArgumentError: there is no such name; the message lists those that exist and names the nearest.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    guess = nearest(name, table) if isinstance(name, str) else None
    hint = f" Did you mean {guess!r}?" if guess else ""
    raise UnknownArgumentError(f"{argument} must be one of {', '.join(map(repr, valid))}; got {name!r}.{hint}")
