"""Logits that decode attention leaves behind for kernels that need probabilities, which take the sum over all spans.

A logit is kept as its distance from the largest one that its query head has seen by then in the span, which is kept
for every block. So half precision does for 16-bit pools whatever the size of the logits is: the error of a probability
grows with that distance, to 0.3 % for one of e**-11 of the largest of all slots. That is G numbers a slot beside 2 * D
of K and V.

They are written once and read once soon after, so they are to stay in the L2 cache: to write them to memory between
reads of keys and values takes five times as long as their bytes alone would.

What is kept is bounded. Logits that have no place are computed a second time: correct whatever the lengths, and slower.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.prefix_sums import exclusive_sums
from pallas_kernels.tiles import index_grid

_MOST_BYTES = 256 << 20  # of the logits that are kept

ALIGNMENT = 128
"""Every head's logits start at a multiple of this, which is one of every block: blocks are stored whole."""

_NOWHERE = 1 << 30  # the place of a head without one


class KeptLogits(NamedTuple):
    """What the spans of a decode step keep, in base 2 (times LOG2_E) and with the scale applied.

    Arrays, their shapes or, inside a kernel, references to them.

    Attributes:
      distances: float16 or f32[G, places] logit minus `tops` of its block; -inf of dead slots.
      tops: f32[G, places // block].
    """

    distances: Any
    tops: Any


def kept_dtype(pool_dtype) -> jnp.dtype:
    """The type of the distances beside a pool of `pool_dtype`."""
    return jnp.dtype(jnp.float16 if jnp.dtype(pool_dtype).itemsize <= 2 else jnp.float32)


def all_places(heads: int, max_slots: int) -> int:
    """How many places the logits of `heads` (request, KV head) pairs can take."""
    return heads * -(-max_slots // ALIGNMENT) * ALIGNMENT


def most_places(heads: int, group: int, max_slots: int, dtype) -> int:
    """The static number of places that there are for them, kept in `dtype`."""
    bound = _MOST_BYTES // (jnp.dtype(dtype).itemsize * group * ALIGNMENT)
    return min(all_places(heads, max_slots), ALIGNMENT * max(1, bound))


def kept_shapes(heads: int, group: int, max_slots: int, *, pool_dtype, block: int) -> KeptLogits:
    """Shapes of what is kept by spans that read `block` slots at a time."""
    dtype = kept_dtype(pool_dtype)
    places = most_places(heads, group, max_slots, dtype)
    return KeptLogits(
        jax.ShapeDtypeStruct((group, places), dtype),
        jax.ShapeDtypeStruct((group, places // block), jnp.float32),
    )


def keeps_all(kept: KeptLogits, heads: int, max_slots: int) -> bool:
    """Whether there are places for the logits of `heads` (request, KV head) pairs, however long they are."""
    return kept.distances.shape[1] >= all_places(heads, max_slots)


@functools.partial(jax.jit, static_argnames=("heads",))
def logit_places(lengths: jax.Array, rows: jax.Array, power: jax.Array, *, heads: int) -> jax.Array:
    """i32[Lt, B*H] where the logits of each (request, KV head) start, in units of ALIGNMENT.

    Requests of power 0 keep nothing and take no place. As the work list it does not depend on the layer: one serves a
    step.
    """
    layers, batch = lengths.shape[0], rows.shape[0]
    length = jnp.broadcast_to(lengths[:, rows], (layers, batch, heads))
    units = jnp.where(power[:, None] > 0, -(-length // ALIGNMENT), 0).reshape(layers, -1)
    return jnp.where(units > 0, exclusive_sums(units), _NOWHERE)


def has_place(place, last, kept: KeptLogits):
    """Whether logits of a head with `place` are kept up to slot `last`, its length or an item's, inside a kernel."""
    return place + pl.cdiv(last, ALIGNMENT) <= kept.distances.shape[1] // ALIGNMENT


def keep(
    kept: KeptLogits, logits, live, top, place, first, step, *, stays, group: int, scale: float, block: int
) -> None:
    """Stores one block of an item, inside a kernel.

    Args:
      logits: f32[members, block] before `scale`; those of dead slots may be anything.
      live: bool[block]; None: all are. Logits of dead slots are kept as -inf.
      top: f32[members] the largest so far, base 2.
      place: of the item's head, in units of ALIGNMENT.
      first: the item's first slot, a multiple of `block`.
      step: the block's number in the item.
      stays: whether the item `has_place`.
    """
    member = jnp.arange(logits.shape[0], dtype=jnp.int32)
    # Written so that Triton sees what the index is a multiple of: it then stores vectors.
    start = place * ALIGNMENT + first // block * block
    at_member, at_place = index_grid(member, start + step * block + jnp.arange(block, dtype=jnp.int32))
    distance = logits * (scale * LOG2_E) - top[:, None]
    if live is not None:
        distance = jnp.where(live[None, :], distance, -jnp.inf)
    mask = stays & (at_member < group)
    distance = distance.astype(kept.distances.dtype)
    plgpu.store(kept.distances.at[at_member, at_place], distance, mask=mask, eviction_policy="evict_last")
    at_block = jnp.broadcast_to(start // block + step, member.shape)
    mask = stays & (member < group)
    plgpu.store(kept.tops.at[member, at_block], top, mask=mask, eviction_policy="evict_last")


def run_grid(begin, runs: int, run: int) -> jax.Array:
    """i32[runs, run] the slots from `begin` on, as `load_kept` gives them."""
    shape = (runs, run)
    return begin + jax.lax.broadcasted_iota(jnp.int32, shape, 0) * run + jax.lax.broadcasted_iota(jnp.int32, shape, 1)


class Loaded(NamedTuple):
    """What `load_kept` fetched: distance [runs, run] from the top f32[runs] of its block."""

    distance: jax.Array
    top: jax.Array

    @property
    def logits(self) -> jax.Array:
        """f32[runs, run], base 2; -inf of dead slots, and of those behind the head in its last block."""
        return self.distance.astype(jnp.float32) + self.top[:, None]


def load_kept(kept: KeptLogits, member, place, begin, live: jax.Array, *, run: int, block: int) -> Loaded:
    """Logits of one member of the group, inside a kernel.

    Nothing waits for them before they are used: load many, then use them. Runs are read whole, as blocks are kept
    whole: with a mask of slots, Triton would load them one by one.

    Args:
      member: its number in the group.
      place: of the head, in units of ALIGNMENT.
      begin: the first slot, a multiple of the block.
      live: bool[runs], which runs of slots to read; the others may be anything.
      run: slots of a run; divides `block`.
      block: slots of a block of the spans.
    """
    start = place * ALIGNMENT + begin // block * block
    slot = run_grid(start, live.shape[0], run)
    mask = jnp.broadcast_to(live[:, None], slot.shape)
    distance = plgpu.load(kept.distances.at[jnp.broadcast_to(member, slot.shape), slot], mask=mask, other=0.0)
    at = start // block + jnp.arange(live.shape[0], dtype=jnp.int32) * run // block
    top = plgpu.load(kept.tops.at[jnp.broadcast_to(member, at.shape), at], mask=live, other=0.0)
    return Loaded(distance, top)
