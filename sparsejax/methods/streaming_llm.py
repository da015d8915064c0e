"""StreamingLLM: the first tokens (attention sinks) and the most recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparsejax.methods.base import Method
from sparsejax.methods.registry import register
from sparsejax.methods.slots import Slots


@register
@dataclass(frozen=True)
class StreamingLLM(Method):
    """Newer tokens score higher; the sinks are protected. Decode goes on within the budget. It has no options.

    Tokens keep their own positions (the paper renumbers them inside the cache).
    """

    name: ClassVar[str] = "streaming_llm"
    summary: ClassVar[str] = "The first tokens and the most recent ones."
    source: ClassVar[str] = "Xiao et al. 2023, Efficient Streaming Language Models, arXiv:2309.17453"
    between_chunks: ClassVar[bool] = True
    evicts_per_step: ClassVar[bool] = True
    default_compress_once: ClassVar[bool] = False
    default_sink_tokens: ClassVar[int] = 4

    @property
    def equal_heads(self) -> bool:
        return True

    @property
    def equal_layers(self) -> bool:
        return True

    def scores(self, slots: Slots) -> jax.Array:
        # Positions beyond 2^24 may round to equal scores; equal scores go to the newer token.
        return slots.position.astype(jnp.float32)
