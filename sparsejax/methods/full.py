"""The empty method: every token's K/V is kept and read, which is dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Full:
    """Dense attention. It has no hyperparameters."""

    name: ClassVar[str] = "full"
