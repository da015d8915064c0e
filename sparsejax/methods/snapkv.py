"""SnapKV: what the last queries of the prompt look at, smoothed along the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparsejax.methods.base import Method
from sparsejax.methods.pooling import POOLINGS, Pooling, pool_along_text
from sparsejax.methods.registry import register
from sparsejax.methods.slots import Slots
from sparsejax.validation import choice, odd

DEFAULT_KERNEL_SIZE = {"max": 7, "avg": 5, "none": 1}


@register
@dataclass(frozen=True)
class SnapKV(Method):
    """Mean attention probability over the window's queries and the query heads of the group, then centred pooling.

    The window itself is kept, and takes no part in the pooling. Tokens are chosen per KV head.

    Attributes:
      pooling: "max", "avg", or "none". The published code has both of the former; the paper's text describes max.
      kernel_size: odd, tokens that are pooled over; None: 7 for "max", 5 for "avg".
    """

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "What the last queries of the prompt attend to, pooled along the text."
    source: ClassVar[str] = "Li et al. 2024, SnapKV, arXiv:2404.14469"
    records: ClassVar[frozenset[str]] = frozenset({"attention"})
    query_aware: ClassVar[bool] = True
    protects_window: ClassVar[bool] = True
    default_window_tokens: ClassVar[int] = 32

    pooling: Pooling = "max"
    kernel_size: int | None = None

    def __post_init__(self) -> None:
        choice("pooling", self.pooling, POOLINGS)
        if self.kernel_size is not None:
            object.__setattr__(self, "kernel_size", odd("kernel_size", self.kernel_size))

    def scores(self, slots: Slots) -> jax.Array:
        lane = (slice(None), None, None)
        queries = jnp.maximum(slots.recorded * slots.group_size, 1)[lane]
        observed = slots.position >= (slots.text_length - slots.window_tokens)[lane]
        return pool_along_text(
            slots.score / queries,
            slots.position,
            slots.live & ~observed,
            in_text_order=slots.in_text_order,
            size=self.kernel_size or DEFAULT_KERNEL_SIZE[self.pooling],
            pooling=self.pooling,
        )
