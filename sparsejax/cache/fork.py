"""Sharing: a row takes over the first tokens of another one by reference."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation

from . import free_list
from .move import move
from .state import KVCache, SlotTable


def fork(
    cache: KVCache,
    source: jax.Array,
    target: jax.Array,
    count: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[KVCache, jax.Array]:
    """Gives each target row the first `min(count, length)` tokens of its source row, head by head.

    Full pages are shared: they gain a reference and are immutable from then on. A partial last page is copied at once
    into an entry of the target's own, because both rows will append to it; so `allocate` and `append` need to know
    nothing of sharing.

    Args:
      cache: the cache.
      source: i32[K], rows to read; repetitions are fine (one prefix for many requests).
      target: i32[K], empty rows, distinct except that the null row 0 may repeat (a padding lane).
      count: i32[K], tokens to take over, >= 0; more than a source holds means all it holds.
      implementation: "triton", "xla" or None, as the kernels take it.
      interpret: as the kernels take it.

    Returns:
      The cache and ok, bool[]. If the free entries do not suffice for the copies, a target is not empty or a count is
      negative, then ok is False and the cache is as it was.
    """
    layout = cache.layout
    page_size = layout.page_size
    pages = cache.table.pages[:, source]  # [Lt, K, Ht, M]
    ok = jnp.all(count >= 0) & jnp.all(cache.table.length[:, target] == 0)
    wanted = jnp.where(target > 0, count, 0)[:, None]
    length = jnp.minimum(wanted, cache.table.length[:, source])  # [Lt, K, Ht]
    full, rest = length // page_size, length % page_size
    need = (rest > 0).astype(jnp.int32)
    ok &= jnp.sum(need) <= cache.free.count
    full, rest, need, length = (jnp.where(ok, x, 0) for x in (full, rest, need, length))

    column = jnp.arange(layout.max_entries_per_row, dtype=jnp.int32)
    shared = jnp.where(column < full[..., None], pages, 0)
    free, own = free_list.pop(free_list.share(cache.free, shared), need, width=1)  # own: [Lt, K, Ht, 1]
    partial_column = column == full[..., None]

    # Lanes that copy nothing may look past the last column; the fill serves them alone.
    partial = jnp.take_along_axis(pages, full[..., None], axis=-1, mode="fill", fill_value=0)
    slot = jnp.arange(page_size, dtype=jnp.int32)
    pool = move(
        cache.pool,
        layout,
        source=partial * page_size + slot,
        target=own * page_size + slot,
        live=slot < rest[..., None],
        implementation=implementation,
        interpret=interpret,
    )
    # Adding writes the empty target rows and, whatever the outcome, leaves every other row and the null row alone.
    table = SlotTable(
        pages=cache.table.pages.at[:, target].add(shared + jnp.where(partial_column, own, 0)),
        length=cache.table.length.at[:, target].add(length),
    )
    return dataclasses.replace(cache, pool=pool, table=table, free=free), ok
