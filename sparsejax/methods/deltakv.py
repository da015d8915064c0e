"""DeltaKV: most tokens are stored as small residuals against nearby ones, and few of them are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sparsejax.methods.base import Family, Method
from sparsejax.methods.registry import register
from sparsejax.validation import number, whole


@register
@dataclass(frozen=True)
class DeltaKV(Method):
    """Every token stays. In the sparse layers, those that have left the recent window are compressed by a trained
    compressor, but for the sinks and every tenth or so; a decode reads the sinks, the recent tokens and, of the rest,
    those that the last full-attention layer before attended to most.

    Which layers keep everything, how many tokens are recent and how latents are stored is the engine's, for its pools
    are laid out by it: `LLM(methods=["deltakv"], compressor=..., full_attention_layers=...)`.

    Options:
      top_tokens: compressed tokens to read in a decode step: a number of at least 1, or a fraction of them in (0, 1).
    """

    name: ClassVar[str] = "deltakv"
    summary: ClassVar[str] = "Tokens as residuals of a trained compressor against nearby ones; few are read."
    source: ClassVar[str] = "DeltaKV, arXiv:2602.08005; the selection is OmniKV's"
    family: ClassVar[Family] = "store"

    top_tokens: int | float = 2048

    def __post_init__(self) -> None:
        value = self.top_tokens
        is_share = isinstance(value, float) and 0 < value < 1
        checked = number("top_tokens", value, 0.0, 1.0, above=True) if is_share else whole("top_tokens", value, 1)
        object.__setattr__(self, "top_tokens", checked)

    def wanted(self, history: int) -> int:
        """Tokens to read of a history of so many."""
        if isinstance(self.top_tokens, int):
            return min(self.top_tokens, history)
        # In float32, as the device computes it.
        return min(int(np.ceil(np.float32(self.top_tokens) * np.float32(history))), history)
