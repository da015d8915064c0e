"""Random eviction: the baseline that any scorer must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.methods.registry import register
from sparsejax.methods.scope import ScopedMethod
from sparsejax.methods.slots import Slots


@register
@dataclass(frozen=True)
class Random(ScopedMethod):
    """A score in [0, 1) that is a hash of the request's seed, the position, the layer and the head.

    The same request keeps the same tokens whatever else runs and however its slots lie; evicting step by step keeps a
    uniform sample of the text.

    Attributes:
      scope: "head": every head of every layer draws its own; "layer": the heads of a layer share one; "all": all share.
    """

    name: ClassVar[str] = "random"
    uses_seed: ClassVar[bool] = True
    summary: ClassVar[str] = "A random subset of the tokens."
    between_chunks: ClassVar[bool] = True
    evicts_per_step: ClassVar[bool] = True
    default_compress_once: ClassVar[bool] = False

    def scores(self, slots: Slots) -> jax.Array:
        layer = jnp.arange(1 if self.equal_layers else slots.num_layers, dtype=jnp.uint32)[:, None, None, None]
        head = jnp.arange(1 if self.equal_heads else slots.num_kv_heads, dtype=jnp.uint32)[:, None]
        bits = _mix(slots.seed[:, None, None] + np.uint32(0x9E3779B9))
        for word in (slots.position.astype(jnp.uint32), layer, head):
            bits = _mix(bits ^ word)
        # 24 bits are what a float32 in [0, 1) holds exactly.
        return (bits >> 8).astype(jnp.float32) * np.float32(2.0**-24)


def _mix(bits: jax.Array) -> jax.Array:
    """u32: a bijection that spreads every input bit over all output bits (Appleby, MurmurHash3, 32-bit finaliser)."""
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
