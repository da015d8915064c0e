"""DeltaKV: most tokens are stored as small residuals against nearby ones, and few of them are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsejax.methods.base import Family, Method
from sparsejax.methods.registry import register
from sparsejax.methods.selection import DEFAULT_TOP_TOKENS, full_layers, top_tokens


@register
@dataclass(frozen=True)
class DeltaKV(Method):
    """Every token stays. In the sparse layers, those that have left the recent window are compressed by a trained
    compressor, but for the sinks and every tenth or so; a decode reads the sinks, the recent tokens and, of the rest,
    those that the last full-attention layer before attended to most.

    How many tokens are recent and how latents are stored is the engine's to say, for its pools are laid out by it, and
    so is which layers keep everything: `LLM(methods=["deltakv"], compressor=..., full_attention_layers=...)`.

    Attributes:
      top_tokens: compressed tokens to read in a decode step: a number of at least 1, or a fraction of them in (0, 1).
      full_attention_layers: layers that keep everything, layer 0 among them; the engine must have been built with the
        same. None: whatever it was built with.
    """

    name: ClassVar[str] = "deltakv"
    summary: ClassVar[str] = "Tokens as residuals of a trained compressor against nearby ones; few are read."
    source: ClassVar[str] = "DeltaKV, arXiv:2602.08005; the selection is OmniKV's"
    family: ClassVar[Family] = "store"

    top_tokens: int | float = DEFAULT_TOP_TOKENS
    full_attention_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "top_tokens", top_tokens(self.top_tokens))
        if self.full_attention_layers is not None:
            object.__setattr__(self, "full_attention_layers", full_layers(self.full_attention_layers))

    def wanted(self, history: int) -> int:
        """Tokens to read of a history of so many."""
        if isinstance(self.top_tokens, int):
            return min(self.top_tokens, history)
        # In float32, as the device computes it.
        return min(int(np.ceil(np.float32(self.top_tokens) * np.float32(history))), history)
