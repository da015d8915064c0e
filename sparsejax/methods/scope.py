"""Methods whose heads may choose for themselves, or together for a layer or for the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from sparsejax.methods.base import Method
from sparsejax.validation import choice

SCOPES = ("head", "layer", "all")


@dataclass(frozen=True)
class ScopedMethod(Method):
    """Base of methods with a scope.

    Attributes:
      scope: who chooses: "head", each KV head; "layer", the heads of a layer together; "all", all heads of all layers.
    """

    scope: str = "head"

    def __post_init__(self) -> None:
        choice("scope", self.scope, SCOPES)

    @property
    def equal_heads(self) -> bool:
        return self.scope != "head"

    @property
    def equal_layers(self) -> bool:
        return self.scope == "all"
