"""OmniKV: some layers attend to everything and choose the tokens that the layers after them attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sparsejax.methods.registry import register
from sparsejax.methods.selection import LayerRoles, SelectionMethod, follower_roles, full_layers


@register
@dataclass(frozen=True)
class OmniKV(SelectionMethod):
    """Tokens that matter to one layer matter to the next ones: choose them once, read them several times.

    A full-attention layer whose next layer is none is an observation layer. In every decode step it gives each
    candidate the largest probability that any query head assigns it, in a softmax over the candidates alone, and the
    layers after it, up to the next full one, attend to the sinks, the `top_tokens` best candidates and the recent
    tokens. One set of tokens serves all KV heads of these layers.

    Attributes:
      full_attention_layers: layers that read everything, layer 0 among them; numbers, or a text such as "0,1,8". None:
        those known for the model (`sparsejax calibrate` finds them for others), or else every sixth layer.
    """

    name: ClassVar[str] = "omnikv"
    summary: ClassVar[str] = "Full layers choose the tokens that the layers after them read."
    source: ClassVar[str] = "Hao et al. 2025, OmniKV, ICLR 2025"

    full_attention_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full_attention_layers is not None:
            object.__setattr__(self, "full_attention_layers", full_layers(self.full_attention_layers))

    def layer_roles(self, num_layers: int, full_layers: Sequence[int]) -> LayerRoles:
        return follower_roles(self.full_attention_layers or full_layers, num_layers)
