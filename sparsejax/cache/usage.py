"""What rows hold and what their next tokens will take: the figures that the host's accounting cannot know ahead."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from .dead import live_slots
from .state import KVCache


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["held", "next_growth", "second_growth", "active"],
    meta_fields=[],
)
@dataclass(frozen=True)
class RowUsage:
    """Counts of table entries, summed over the tables of each row. All 0 for the null row.

    Attributes:
      held: i32[K], entries that the row names, shared ones included.
      next_growth: i32[K], entries that one more token of the row takes.
      second_growth: i32[K], entries that the token after that one takes.
      active: i32[K], live tokens, summed over the tables; None unless asked for.
    """

    held: jax.Array
    next_growth: jax.Array
    second_growth: jax.Array
    active: jax.Array | None


def row_usage(
    cache: KVCache, rows: jax.Array | None = None, *, hole: jax.Array | None = None, max_slots: int | None = None
) -> RowUsage:
    """Measures rows.

    Args:
      cache: the cache.
      rows: i32[K]; None for all R rows of the table, by row.
      hole: i32[Lt, R, Ht], the dead slot that the next token of each table goes to, or negative. A table with such a
        hole does not grow by its next token; the token after it counts as if there were no other hole. None: no holes.
      max_slots: static bound on the lengths, to have the live tokens counted; None: they are not.
    """
    layout = cache.layout
    if rows is None:
        rows = jnp.arange(layout.num_rows, dtype=jnp.int32)
    length = cache.table.length[:, rows]  # [Lt, K, Ht]
    real = (rows > 0)[:, None]
    appended = real if hole is None else real & (hole[:, rows] < 0)
    after = length + appended
    full, then_full = length % layout.page_size == 0, after % layout.page_size == 0

    def total(counts):
        return jnp.sum(counts, axis=(0, 2), dtype=jnp.int32)

    return RowUsage(
        held=total(layout.pages_for(length)),
        next_growth=total(appended & full),
        second_growth=total(real & then_full),
        active=None if max_slots is None else total(jnp.sum(live_slots(cache, rows, max_slots=max_slots), axis=-1)),
    )
