"""KeyDiff: keys that point away from the others. Needs no attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparsejax.methods.base import Method
from sparsejax.methods.registry import register
from sparsejax.methods.slots import LayerSlots

_EPSILON = 1e-12


@register
@dataclass(frozen=True)
class KeyDiff(Method):
    """Minus the cosine similarity between a key (after RoPE) and the mean of the head's normalised keys.

    It sees keys only, so it may compress between chunks and again while decoding. It has no options.
    """

    name: ClassVar[str] = "keydiff"
    summary: ClassVar[str] = "Keys least similar to the mean key of their head."
    source: ClassVar[str] = "Park et al. 2025, KeyDiff, arXiv:2504.15364, section 3"
    between_chunks: ClassVar[bool] = True

    def layer_scores(self, layer: LayerSlots) -> jax.Array:
        keys = layer.k.astype(jnp.float32)
        unit = keys / jnp.maximum(jnp.linalg.norm(keys, axis=-1, keepdims=True), _EPSILON)  # [K, H, S, D]
        # Only the direction of the mean matters, so the sum serves; slots that are not live are zero.
        total = jnp.sum(unit, axis=2)
        anchor = total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), _EPSILON)
        return -jnp.einsum("khsd,khd->khs", unit, anchor, precision=jax.lax.Precision.HIGHEST)
