"""KV-Compress: squared attention, observed in the prompt and while decoding, and pages freed across all heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparsejax.methods.base import Method
from sparsejax.methods.pooling import pool_along_text
from sparsejax.methods.registry import register
from sparsejax.methods.slots import Slots
from sparsejax.validation import choice, flag, odd

NORMS = ("L1", "L2")
AGGREGATIONS = ("sum", "avg")

_POOLED_TOKENS = 7
_RECENT_TOKENS = 32


@register
@dataclass(frozen=True)
class KVCompress(Method):
    """Sum over the observed queries and the query heads of the group of (attention probability)^2.

    Observed are the last `window_tokens` queries of the prompt (or all of them, with `full_range`) and, unless
    `compress_once`, every decoded token. The pages of the least important tokens of all layers and heads are freed, see
    the budget rule `global_pages`; the published experiments protect the last 32 tokens, the default here as well (but
    at most half of the budget).

    Three things differ from the published code. The maximum over neighbours is taken when tokens are ranked, of the
    group's sum, not during prefill of each query head's; so it smooths what decode adds as well, and a repeated
    compression never pools twice. `avg` divides by the number of observed queries that could see the token, the same in
    prefill and decode. All of the protected window is kept, not one token less.

    Attributes:
      norm: "L2" sums squared probabilities, "L1" the probabilities.
      aggregation: "sum", or "avg": per query that could see the token.
      full_range: observe every query of the prompt; `window_tokens` is ignored and nothing is pooled.
      kernel_size: odd, tokens that the centred maximum is taken over, 1 for none. None: 7, or 1 with full_range.
    """

    name: ClassVar[str] = "kv_compress"
    summary: ClassVar[str] = "Squared attention; whole pages freed across all layers and heads."
    source: ClassVar[str] = "Rehg 2024, KV-Compress, arXiv:2410.00161"
    records: ClassVar[frozenset[str]] = frozenset({"attention", "decode"})
    query_aware: ClassVar[bool] = True
    between_chunks: ClassVar[bool] = True
    default_compress_once: ClassVar[bool] = False
    default_budget_rule: ClassVar[str] = "global_pages"
    default_window_tokens: ClassVar[int] = 32

    norm: str = "L2"
    aggregation: str = "sum"
    full_range: bool = False
    kernel_size: int | None = None

    def __post_init__(self) -> None:
        choice("norm", self.norm, NORMS)
        choice("aggregation", self.aggregation, AGGREGATIONS)
        flag("full_range", self.full_range)
        if self.kernel_size is not None:
            object.__setattr__(self, "kernel_size", odd("kernel_size", self.kernel_size))

    @property
    def power(self) -> int:
        return 2 if self.norm == "L2" else 1

    def record_from(self, text_length: int, window_tokens: int) -> int:
        return 0 if self.full_range else super().record_from(text_length, window_tokens)

    def default_recent_tokens(self, budget: int, window_tokens: int) -> int:
        del window_tokens
        return min(_RECENT_TOKENS, budget // 2)

    def scores(self, slots: Slots) -> jax.Array:
        scores = slots.score
        if self.aggregation == "avg":
            scores = scores / jnp.maximum(_queries_behind(slots), 1)
        size = self.kernel_size or (1 if self.full_range else _POOLED_TOKENS)
        return pool_along_text(
            scores, slots.position, slots.live, size=size, pooling="max", in_text_order=slots.in_text_order
        )


def _queries_behind(slots: Slots) -> jax.Array:
    """i32[L, K, H, S]: the observed queries that could see each token, those at its position or behind it."""
    if slots.observed is None:
        lane = (slice(None), None, None)
        return jnp.minimum(slots.recorded[lane], slots.text_length[lane] - slots.position)
    observed, text_length = slots.observed, slots.text_length
    return jax.vmap(lambda position: observed.behind(position, text_length))(slots.position)
