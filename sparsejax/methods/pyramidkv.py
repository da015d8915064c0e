"""PyramidKV: SnapKV's scores with budgets that shrink from layer to layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsejax.methods.registry import register
from sparsejax.methods.snapkv import SnapKV


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with the budget rule `pyramid`, whose options (`beta`, `layer_ratios`) say how budgets fall.

    At equal budgets it keeps as many tokens in total as SnapKV does.

    Attributes:
      pooling: as SnapKV's.
      kernel_size: as SnapKV's.
    """

    name: ClassVar[str] = "pyramidkv"
    summary: ClassVar[str] = "SnapKV's scores; lower layers keep more, the total is the same."
    source: ClassVar[str] = "Cai et al. 2024, PyramidKV, arXiv:2406.02069"
    default_budget_rule: ClassVar[str] = "pyramid"
