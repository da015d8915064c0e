"""What decoding reads where methods select: observation layers choose tokens, the layers after them read those.

A step serves requests of several methods at once. In every layer its lanes fall into groups by their role
(`sparsejax.methods.LayerRoles`): each group attends for itself, with the rows of all others blanked out, so that work
and bytes follow what each lane reads. What a layer's roles are is fixed when a step is compiled; which lanes have them,
and how many tokens they choose, is data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    Implementation,
    PageAddress,
    decode_attention,
    page_upper_bounds,
    select_top,
    slot_probabilities,
)
from sparsejax.cache import KVCache
from sparsejax.methods import LayerRoles
from sparsejax.methods.selection import LayerRole, candidate_pages, candidates, chosen_count, chosen_pages

READS_ALL = 0  # number of no roles: a row that reads everything


@dataclass(frozen=True)
class Selecting:
    """What is fixed when a step is compiled.

    Attributes:
      roles: (number, roles) of the requests that select; rows name theirs by the number.
      width: most tokens that a layer which selects reads of a request.
      everyone: every lane selects, by the only roles there are.
    """

    roles: tuple[tuple[int, LayerRoles], ...]
    width: int
    everyone: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSelection:
    """What requests ask for, one of each array a table row (in a step's state) or a segment (in a chunk).

    Attributes:
      roles: i32, number of the roles; READS_ALL: the request reads everything.
      sinks, recent: i32, tokens at the start and the end that are always read.
      count, fraction: i32, f32: how many of the candidates are chosen; one of the two is 0.
    """

    roles: jax.Array | np.ndarray
    sinks: jax.Array | np.ndarray
    recent: jax.Array | np.ndarray
    count: jax.Array | np.ndarray
    fraction: jax.Array | np.ndarray


def no_selection(rows: int) -> RowSelection:
    """Of so many rows, none of which selects (NumPy)."""
    zeros = [np.zeros(rows, np.int32) for _ in range(4)]
    return RowSelection(*zeros, fraction=np.zeros(rows, np.float32))


class View(NamedTuple):
    """What the followers of an observation layer read, B lanes.

    Attributes:
      slots: i32[B, width], logical slots in ascending order.
      length: i32[B], how many of them.
    """

    slots: jax.Array
    length: jax.Array


class LaneSelection:
    """Attention of the lanes of one decode step.

    Args:
      selecting: what is compiled.
      state: of all rows.
      cache: with the newest tokens allocated: lengths are those of the step.
      rows: i32[B], 0 for idle lanes.
    """

    def __init__(
        self,
        selecting: Selecting,
        state: RowSelection,
        cache: KVCache,
        rows: jax.Array,
        *,
        implementation: Implementation | None,
    ) -> None:
        self.selecting = selecting
        self.rows = rows
        self.implementation: Implementation | None = implementation
        asked: RowSelection = jax.tree.map(lambda x: x[rows], state)
        self.roles = asked.roles
        # Rows that select hold the same slots in all tables, in the order of the text.
        self.length = cache.table.length[0, rows, 0]
        self.first, self.last = candidates(self.length, asked.sinks, asked.recent)
        self.count = chosen_count(self.last - self.first, asked.count, asked.fraction)

    def lanes(self, layer: int, role: LayerRole) -> jax.Array | None:
        """bool[B], which lanes have this role in the layer; None: none can."""
        numbers = [number for number, roles in self.selecting.roles if roles.roles[layer] == role]
        if not numbers:
            return None
        if self.selecting.everyone:
            return jnp.ones_like(self.rows, dtype=bool)
        return jnp.isin(self.roles, jnp.asarray(numbers, jnp.int32))

    def attend(
        self,
        layer: int,
        q: jax.Array,
        cache: KVCache,
        view: View | None,
        read_all: Callable[[jax.Array, KVCache], tuple[jax.Array, KVCache]],
    ) -> tuple[jax.Array, KVCache, View | None]:
        """Attention of one layer.

        Args:
          q: [B, Hq, D].
          view: what the last observation layer chose.
          read_all: (rows, cache) -> (out, cache), attention of these rows to everything they hold.

        Returns:
          (out [B, Hq, D], cache, view).
        """
        observing, following, paging = (self.lanes(layer, role) for role in ("observe", "follow", "pages"))
        special = [lanes for lanes in (observing, following, paging) if lanes is not None]
        out = None
        if not (special and self.selecting.everyone):
            others = self.rows
            for lanes in special:
                others = jnp.where(lanes, 0, others)
            out, cache = read_all(others, cache)
        if observing is not None:
            observed, view = self._observe(layer, q, cache, observing, view)
            out = _merge(observing, observed, out)
        if following is not None:
            assert view is not None, "layer 0 reads everything"
            out = _merge(following, self._follow(layer, q, cache, following, view), out)
        if paging is not None:
            out = _merge(paging, self._read_pages(layer, q, cache, paging), out)
        assert out is not None
        return out, cache, view

    def _observe(
        self, layer: int, q: jax.Array, cache: KVCache, lanes: jax.Array, view: View | None
    ) -> tuple[jax.Array, View]:
        """Attends to everything, and chooses what the layers after this one read."""
        first, last, count = (jnp.where(lanes, x, 0) for x in (self.first, self.last, self.count))
        out, probabilities = slot_probabilities(
            q,
            cache.pool.k,
            cache.pool.v,
            cache.table.pages,
            cache.table.length,
            jnp.where(lanes, self.rows, 0),
            first,
            last,
            address=cache.layout.address(layer),
            num_kv_heads=cache.layout.num_kv_heads,
            scale=q.shape[-1] ** -0.5,
            implementation=self.implementation,
        )
        width = self.selecting.width
        chosen = select_top(
            probabilities,
            first,
            last,
            count,
            k=min(width, probabilities.shape[1]),
            probabilities=True,
            implementation=self.implementation,
        )
        new = view_of(chosen, first, last, count, self.length, width=width)
        if view is not None:
            new = View(*(_merge(lanes, mine, theirs) for mine, theirs in zip(new, view, strict=True)))
        return out, new

    def _follow(self, layer: int, q: jax.Array, cache: KVCache, lanes: jax.Array, view: View) -> jax.Array:
        table, address = token_table(cache, layer, self.rows, view.slots)
        dim = cache.layout.head_dim
        length = jnp.where(lanes, view.length, 0)[None, :, None]
        return decode_attention(
            q,
            cache.pool.k.reshape(-1, 1, dim),
            cache.pool.v.reshape(-1, 1, dim),
            table,
            jnp.broadcast_to(length, table.shape[:3]),
            jnp.arange(q.shape[0], dtype=jnp.int32),
            address=address,
            num_kv_heads=cache.layout.num_kv_heads,
            scale=q.shape[-1] ** -0.5,
            implementation=self.implementation,
        )

    def _read_pages(self, layer: int, q: jax.Array, cache: KVCache, lanes: jax.Array) -> jax.Array:
        """Chooses pages by the bounds of their keys, for each KV head, and attends to them."""
        assert cache.pool.bounds is not None, "engines for such methods keep bounds"
        layout, address = cache.layout, cache.layout.address(layer)
        size, heads, columns = layout.page_size, layout.num_kv_heads, layout.max_entries_per_row
        rows, length = jnp.where(lanes, self.rows, 0), jnp.where(lanes, self.length, 0)
        first, last = candidate_pages(self.first, self.last, size)
        first, last = jnp.where(lanes, first, 0), jnp.where(lanes, last, 0)
        count = chosen_pages(last - first, self.count, size)
        bounds = page_upper_bounds(
            q,
            cache.pool.bounds,
            cache.table.pages,
            cache.table.length,
            rows,
            address=address,
            num_kv_heads=heads,
            page_size=size,
            implementation=self.implementation,
        )
        # Sinks, choice and recent tokens each begin or end inside a page.
        width = min(columns, self.selecting.width // size + 4)
        first, last, count, held = (jnp.repeat(x, heads) for x in (first, last, count, layout.pages_for(length)))
        chosen = select_top(
            bounds.reshape(-1, columns), first, last, count, k=width, implementation=self.implementation
        )
        view = view_of(chosen, first, last, count, held, width=width)
        pages = view.slots.reshape(-1, heads, width)
        head = jnp.arange(heads, dtype=jnp.int32)[:, None]
        table_head = head if layout.table_heads > 1 else 0
        entry = cache.table.pages[address.table_layer, rows[:, None, None], table_head, pages]
        # Only the last page of a row is not full, and it is the last of the view.
        missing = layout.pages_for(length) * size - length
        tokens = jnp.maximum(view.length.reshape(-1, heads) * size - missing[:, None], 0)
        return decode_attention(
            q,
            cache.pool.k,
            cache.pool.v,
            address.page(entry, head)[None],
            tokens[None],
            jnp.arange(q.shape[0], dtype=jnp.int32),
            address=PageAddress(table_layer=0, entry_stride=1, layer_offset=0, head_stride=0),
            num_kv_heads=heads,
            scale=q.shape[-1] ** -0.5,
            implementation=self.implementation,
        )


def view_of(
    chosen: jax.Array, first: jax.Array, last: jax.Array, count: jax.Array, length: jax.Array, *, width: int
) -> View:
    """The slots before `first`, those chosen, and those from `last` on, in ascending order.

    Args:
      chosen: i32[B, k], the first `count` of each row are slots in first .. last-1, ascending.
      length: i32[B], slots of each row.
      width: static bound on the slots of the view.
    """
    place = jnp.arange(width, dtype=jnp.int32)
    first, count = first[:, None], count[:, None]
    behind = last[:, None] + place - first - count
    middle = jnp.take_along_axis(chosen, jnp.clip(place - first, 0, chosen.shape[1] - 1), axis=1)
    slots = jnp.where(place < first, place, jnp.where(place < first + count, middle, behind))
    total = length - last + first[:, 0] + count[:, 0]
    return View(jnp.where(place < total[:, None], slots, 0), total)


def token_table(cache: KVCache, layer: int, rows: jax.Array, slots: jax.Array) -> tuple[jax.Array, PageAddress]:
    """A table of single tokens, that is of pages of one slot, in which row b holds `slots[b]` of row rows[b].

    The pool that goes with it is the cache's, reshaped to [P * page, 1, D]. Attention over it reads the tokens as it
    reads any row.

    Args:
      slots: i32[B, n], logical slots that the rows hold.

    Returns:
      (i32[1, B, Ht, n], the layer's page arithmetic).
    """
    layout, address = cache.layout, cache.layout.address(layer)
    head = jnp.arange(layout.table_heads, dtype=jnp.int32)[:, None]
    page, place = slots[:, None] // layout.page_size, slots[:, None] % layout.page_size
    entry = cache.table.pages[address.table_layer, rows[:, None, None], head, page]  # [B, Ht, n]
    table = entry * (address.entry_stride * layout.page_size) + place
    single = PageAddress(
        table_layer=0,
        entry_stride=1,
        layer_offset=address.layer_offset * layout.page_size,
        head_stride=address.head_stride * layout.page_size,
    )
    return table[None], single


def _merge(lanes: jax.Array, mine: jax.Array, others: Any) -> jax.Array:
    """mine [B, ...] in these lanes, `others` elsewhere; None: there are no others."""
    if others is None:
        return mine
    return jnp.where(lanes.reshape(-1, *[1] * (mine.ndim - 1)), mine, others)
