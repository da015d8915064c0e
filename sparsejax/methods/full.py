"""The empty method: every token's K/V is kept and read, which is dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsejax.methods.base import Family, Method
from sparsejax.methods.registry import register


@register
@dataclass(frozen=True)
class Full(Method):
    """Dense attention. It has no options."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "Keeps everything (dense attention)."
    family: ClassVar[Family] = "full"
