"""The page-granular budget rule of KV-Compress: whole pages are freed, the cheapest of all layers and heads first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.methods.budgets import BudgetRule, register_rule
from sparsejax.methods.protection import priorities
from sparsejax.methods.select import ordered_bits, top_slots
from sparsejax.methods.slots import Slots

_HIGHEST_BIT = np.uint32(0x80000000)
# The key of slots that may not go: above that of any score.
_KEPT = np.uint32(0xFFFFFFFF)


@register_rule
@dataclass(frozen=True)
class GlobalPages(BudgetRule):
    """One budget of pages for all layers and heads of a request; a head keeps what its pages hold.

    The budget is rounded up to whole pages of each head, as in the published engine. In a head with n tokens, freeing
    the i-th page costs the score of the (i * page_size + hang)-th worst token that may go, hang = (n - 1) % page_size +
    1 being the tokens of its last page. Of all pages of all heads the cheapest are freed, until the budget is met or
    all that is left is protected; equal costs go by (layer, head, page), and within a head equal scores by age, oldest
    first. So heads that lose tokens end with full pages, and no token is dropped that does not help to free a page.

    The plan is that of a greedy walk over all tokens in ascending order of scores. It is found by bisection over the
    bits of the cost: a head frees 1 + floor((m - hang) / page_size) pages of cost at most t, m counting its tokens with
    a score of at most t. Nothing is sorted, and neither the order of slots nor other requests matter.
    """

    name: ClassVar[str] = "global_pages"
    summary: ClassVar[str] = "One budget of whole pages for all layers and heads."
    source: ClassVar[str] = "Rehg 2024, KV-Compress, arXiv:2410.00161, section 4"

    def keep(self, scores: jax.Array, slots: Slots, budget: jax.Array) -> jax.Array:
        page_size = slots.page_size
        priority = priorities(scores, slots.live, slots.protected)
        held = jnp.sum(slots.live, axis=-1, dtype=jnp.int32)  # [L, K, H]
        hang = (held - 1) % page_size + 1
        key = jnp.where(slots.live & ~slots.protected, ordered_bits(priority), _KEPT)

        def freeable(threshold: jax.Array) -> jax.Array:
            """i32[L, K, H]: pages of each head that cost at most `threshold`, u32[1, K, 1]."""
            going = jnp.sum(key <= threshold[..., None], axis=-1, dtype=jnp.int32)
            return jnp.where(going >= hang, (going - hang) // page_size + 1, 0)

        def total(pages: jax.Array) -> jax.Array:
            """i32[1, K, 1]: of all layers and heads."""
            return jnp.sum(pages, axis=(0, 2), keepdims=True)

        # More than a head can hold is as good as all of it, and keeps the product in 32 bits.
        allowed = -(-jnp.minimum(budget, key.shape[-1]) // page_size)[None, :, None]
        excess = total(-(-held // page_size)) - held.shape[0] * held.shape[2] * allowed

        def refine(step: jax.Array, threshold: jax.Array) -> jax.Array:
            bit = _HIGHEST_BIT >> step.astype(jnp.uint32)
            cheaper = freeable(threshold | (bit - np.uint32(1)))
            return jnp.where(total(cheaper) <= excess, threshold | bit, threshold)

        # All pages that cost less than the threshold go, and some that cost as much. It is the key of protected slots
        # if there are too few pages to free.
        threshold = jax.lax.fori_loop(0, 32, refine, jnp.zeros(excess.shape, jnp.uint32))
        cheaper = jnp.where(threshold > 0, freeable(threshold - np.uint32(1)), 0)
        equal = jnp.where(threshold < _KEPT, freeable(threshold) - cheaper, 0)
        # Of equal costs, the first heads' pages go first.
        before = _sum_before(equal)
        freed = jnp.where(excess > 0, cheaper + jnp.clip(excess - total(cheaper) - before, 0, equal), 0)
        victims = jnp.where(freed > 0, (freed - 1) * page_size + hang, 0)
        return top_slots(priority, slots.position, held - victims)

    def max_entries(self, budget: int, text_length: int, *, num_layers: int, num_kv_heads: int, page_size: int) -> int:
        return num_layers * num_kv_heads * -(-min(budget, text_length) // page_size)

    def most_kept(self, budget: int, *, page_size: int) -> int:
        return -(-budget // page_size) * page_size  # the pages that are left may all be full


def _sum_before(values: jax.Array) -> jax.Array:
    """i32[L, K, H]: the sum over the layers and heads before each, of its row."""
    layers, rows, heads = values.shape
    flat = values.swapaxes(0, 1).reshape(rows, layers * heads)
    before = jnp.cumsum(flat, axis=-1, dtype=jnp.int32) - flat
    return before.reshape(rows, layers, heads).swapaxes(0, 1)
