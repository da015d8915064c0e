"""H2O: heavy hitters, the tokens that gathered most attention so far, and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparsejax.methods.registry import register
from sparsejax.methods.scope import ScopedMethod
from sparsejax.methods.slots import Slots
from sparsejax.validation import number, whole


@register
@dataclass(frozen=True)
class H2O(ScopedMethod):
    """The sum of all attention probabilities a token received, in the prompt and while decoding.

    Recent means by position. With scope "layer" or "all" the heads hold the same tokens in the same slots, because
    every choice before was theirs together; so their scores are averaged slot by slot.

    Attributes:
      scope: "head": each KV head chooses for itself; "layer": scores are averaged over the heads of a layer first;
        "all": over all layers and heads.
      recent_ratio: share of the budget that is recent tokens when `recent_tokens` is not given, in [0, 1].
      prefill_window: record only the last so many queries of a prompt; None: all of them.
    """

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "Tokens with the most accumulated attention, and recent ones."
    source: ClassVar[str] = "Zhang et al. 2023, H2O, arXiv:2306.14048"
    records: ClassVar[frozenset[str]] = frozenset({"attention", "decode"})
    between_chunks: ClassVar[bool] = True
    evicts_per_step: ClassVar[bool] = True
    default_compress_once: ClassVar[bool] = False

    recent_ratio: float = 0.5
    prefill_window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "recent_ratio", number("recent_ratio", self.recent_ratio, 0.0, 1.0))
        if self.prefill_window is not None:
            object.__setattr__(self, "prefill_window", whole("prefill_window", self.prefill_window, 1))

    def record_from(self, text_length: int, window_tokens: int) -> int:
        del window_tokens
        return 0 if self.prefill_window is None else max(text_length - self.prefill_window, 0)

    def default_recent_tokens(self, budget: int, window_tokens: int) -> int:
        del window_tokens
        return int(budget * self.recent_ratio)

    def scores(self, slots: Slots) -> jax.Array:
        axes = {"head": (), "layer": (2,), "all": (0, 2)}[self.scope]
        if not axes:
            return slots.score
        return jnp.broadcast_to(jnp.mean(slots.score, axis=axes, keepdims=True), slots.score.shape)
