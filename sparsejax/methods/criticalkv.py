"""CriticalKV: SnapKV's attention, and for half of the budget also how much a value can change the layer's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparsejax.methods.budgets import share_of
from sparsejax.methods.protection import priorities
from sparsejax.methods.registry import register
from sparsejax.methods.select import top_slots
from sparsejax.methods.slots import LayerSlots, Slots
from sparsejax.methods.snapkv import SnapKV
from sparsejax.validation import number

# Slots whose projections are computed at a time: what the GPU's second-level cache can hold.
_BLOCK = 256


@register
@dataclass(frozen=True)
class CriticalKV(SnapKV):
    """Two stages. The first `first_stage_ratio` of the budget goes to the highest attention; the rest is ranked by
    (attention + epsilon) * mean over the query heads of the group of |v W_o|_1.

    The first stage is chosen in each head, by the mean budget, whatever the budget rule. Projecting the values costs as
    much as the output projections of the whole prompt.

    Attributes:
      pooling: as SnapKV's.
      kernel_size: as SnapKV's.
      first_stage_ratio: share of the budget that the attention alone decides, in [0, 1].
      epsilon: added to the attention in the second stage.
    """

    name: ClassVar[str] = "criticalkv"
    summary: ClassVar[str] = "SnapKV's attention weighed by the norm of the projected values."
    source: ClassVar[str] = "Feng et al. 2025, CriticalKV, arXiv:2502.03805"
    unrolls_layers: ClassVar[bool] = True

    first_stage_ratio: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "first_stage_ratio", number("first_stage_ratio", self.first_stage_ratio, 0.0, 1.0))
        object.__setattr__(self, "epsilon", number("epsilon", self.epsilon, 0.0))

    def scores(self, slots: Slots) -> jax.Array:
        if slots.budget is None:
            raise ValueError("the view was gathered without budgets; this method needs them.")
        attention = super().scores(slots)
        first = share_of(slots.budget, self.first_stage_ratio)[:, None]
        chosen = top_slots(priorities(attention, slots.live, slots.protected), slots.position, first)
        norms = jnp.stack([projected_norms(slots.layer(index)) for index in range(slots.num_layers)])
        return jnp.where(chosen, jnp.inf, (attention + self.epsilon) * norms)


def projected_norms(layer: LayerSlots) -> jax.Array:
    """f32[K, H, S]: L1 norm of each value times the output projection, mean over the query heads of the group."""
    v = layer.v
    rows, heads, slots, dim = v.shape
    kernel = layer.output_kernel().astype(v.dtype).reshape(heads, layer.group_size, dim, -1)
    blocks = -(-slots // _BLOCK)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, blocks * _BLOCK - slots), (0, 0)))
    v = jnp.moveaxis(v.reshape(rows, heads, blocks, _BLOCK, dim), 2, 0)

    def norms(block: jax.Array) -> jax.Array:
        """f32[K, H, _BLOCK] of values [K, H, _BLOCK, D]."""
        total = jnp.zeros(block.shape[:-1], jnp.float32)
        for group in range(layer.group_size):
            projected = jnp.einsum("khsd,hde->khse", block, kernel[:, group], preferred_element_type=jnp.float32)
            total += jnp.sum(jnp.abs(projected), axis=-1)
        return total / layer.group_size

    norms_by_block = jax.lax.map(norms, v)  # [blocks, K, H, _BLOCK]
    return jnp.moveaxis(norms_by_block, 0, 2).reshape(rows, heads, -1)[..., :slots]
