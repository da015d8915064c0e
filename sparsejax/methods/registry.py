"""Methods by name: `register` one, `get` its class, list or describe them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from sparsejax.errors import InvalidArgumentError, pick
from sparsejax.methods.base import Method

_METHODS: dict[str, type[Method]] = {}

COMMON_ARGUMENTS = frozenset(
    (
        "method", "budget_tokens", "keep_fraction", "sink_tokens", "recent_tokens", "window_tokens", "compress_once",
        "context_tokens", "interval_tokens", "strategy", "num_per_evict", "budget_rule", "budget_floor", "options",
        "max_cache_tokens", "protected_window_size",
    )
)  # fmt: skip
"""Arguments of `CompressionParams` for all methods: no option of a method may have such a name."""

_AnyMethod = TypeVar("_AnyMethod", bound=type[Method])


def register(method: _AnyMethod) -> _AnyMethod:
    """Class decorator: makes a method available under its `name`. Put it above `@dataclass(frozen=True)`.

    Raises:
      InvalidArgumentError: not a frozen dataclass derived from Method, no name, summary or scorer, another class has
        the name, or an option has no default or the name of something else.
    """
    label = getattr(method, "__qualname__", repr(method))
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise InvalidArgumentError(f"a method must derive from sparsejax.methods.Method; {label} does not.")
    own = method.__dict__.get("__dataclass_params__")
    if own is None or not own.frozen:
        raise InvalidArgumentError(f"{label} must be decorated with @dataclass(frozen=True), below @register.")
    for attribute in ("name", "summary"):
        if not isinstance(getattr(method, attribute, None), str):
            raise InvalidArgumentError(f"{label} must define the class variable {attribute}: a string.")
    scored = method.layer_scores is not Method.layer_scores or method.scores is not Method.scores
    if method.family == "evict" and not scored:
        raise InvalidArgumentError(f"{label} must define layer_scores (or scores).")
    for field in dataclasses.fields(method):
        if hasattr(Method, field.name):
            raise InvalidArgumentError(
                f"{label} has an option {field.name!r}, which means something else for every method: name it otherwise."
            )
        if field.name in COMMON_ARGUMENTS:
            raise InvalidArgumentError(
                f"{label} has an option {field.name!r}, which is an argument of CompressionParams: name it otherwise."
            )
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InvalidArgumentError(f"{label} must give its option {field.name!r} a default.")
    known = _METHODS.get(method.name)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise InvalidArgumentError(f"a method named {method.name!r} exists: {known.__module__}.{known.__qualname__}.")
    _METHODS[method.name] = method
    return method


def available() -> tuple[str, ...]:
    """Names that `CompressionParams(method=...)` accepts: "full", then the others by alphabet."""
    return tuple(sorted(_METHODS, key=lambda name: (name != "full", name)))


def get(name: str) -> type[Method]:
    """The dataclass registered under `name`.

    Raises:
      UnknownArgumentError: no such method; the message lists those that exist.
    """
    return pick("method", name, _METHODS, available())


@dataclasses.dataclass(frozen=True)
class MethodDescription:
    """What a method is, for listings.

    Attributes:
      name, summary, source, family: as the method declares them.
      query_aware: whether the last tokens of what is compressed (a question) steer what is kept.
      budget_rule: name of the rule used unless the request names another.
      options: the method's own options with their defaults.
    """

    name: str
    summary: str
    source: str
    family: str
    query_aware: bool
    budget_rule: str
    options: Mapping[str, Any]


def describe(name: str) -> MethodDescription:
    """What the method `name` is.

    Raises:
      UnknownArgumentError: no such method.
    """
    method = get(name)
    return MethodDescription(
        name=method.name,
        summary=method.summary,
        source=method.source,
        family=method.family,
        query_aware=method.query_aware,
        budget_rule=method.default_budget_rule,
        options={field.name: getattr(method(), field.name) for field in dataclasses.fields(method)},
    )
