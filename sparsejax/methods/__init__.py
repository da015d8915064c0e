"""The registry of KV-cache methods: which exist, by name. One file a method; a method is policy and owns no arrays."""

from __future__ import annotations

from sparsejax.errors import UnknownArgumentError, nearest
from sparsejax.methods.full import Full

_METHODS = {method.name: method for method in (Full,)}


def available() -> tuple[str, ...]:
    """Names that `CompressionParams(method=...)` accepts."""
    return tuple(_METHODS)


def get(name: str) -> type[Full]:
    """The dataclass registered under `name`.

    Raises:
      UnknownArgumentError: no such method; the message lists those that exist.
    """
    try:
        return _METHODS[name]
    except (KeyError, TypeError):
        guess = nearest(name, _METHODS) if isinstance(name, str) else None
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise UnknownArgumentError(
            f"method must be one of {', '.join(map(repr, _METHODS))}; got {name!r}.{hint}"
        ) from None


__all__ = ["Full", "available", "get"]
