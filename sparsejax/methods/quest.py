"""Quest: every layer attends to the pages whose keys could give a query the largest logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparsejax.errors import InvalidArgumentError
from sparsejax.methods.registry import register
from sparsejax.methods.selection import LayerRoles, SelectionMethod
from sparsejax.validation import whole


@register
@dataclass(frozen=True)
class Quest(SelectionMethod):
    """Bounds of the keys of a page tell how large a query's logits in it can be: read the pages with the largest.

    For every page of the cache the smallest and the largest value of each key dimension are kept. The bound of a page
    is the sum over dimensions of max(q * smallest, q * largest), and for a KV head the largest of its query heads; each
    KV head of each layer reads its own pages. A page is one of the cache: `LLM(page_size=16)` is the paper's.

    Attributes:
      dense_layers: first layers that read everything.
    """

    name: ClassVar[str] = "quest"
    summary: ClassVar[str] = "Each KV head reads the pages whose keys may match the query best."
    source: ClassVar[str] = "Tang et al. 2024, Quest, arXiv:2406.10774"
    needs_page_bounds: ClassVar[bool] = True
    default_sink_tokens: ClassVar[int] = 0
    recent_tokens: ClassVar[int] = 1

    dense_layers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "dense_layers", whole("dense_layers", self.dense_layers, 0))

    def layer_roles(self, num_layers: int, full_layers: Sequence[int]) -> LayerRoles:
        del full_layers
        if self.dense_layers >= num_layers:
            raise InvalidArgumentError(
                f"dense_layers must be less than {num_layers}, the layers of this model, got {self.dense_layers}."
            )
        return LayerRoles(("all",) * self.dense_layers + ("pages",) * (num_layers - self.dense_layers))
