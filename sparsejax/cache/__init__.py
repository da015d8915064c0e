"""The KV cache: an explicit pytree, and pure, jittable functions `cache -> cache` over it.

`init_cache(layout)` makes an empty cache. A request owns a *row* of the slot table; `allocate` backs new tokens of a
row with pages, `slot_mapping` says where they live, `append` writes their K and V layer by layer (`stamp` their
position and score), `release` empties the row. `fork` gives a row the first tokens of another by reference; `compact`
keeps a subset of a row's tokens and frees the pages that this empties, `repack` does the same by copying. Donate the
cache to every jitted step: all of them work in place.

What holds after every call, for all table layers, rows and heads:

1. The null row 0 has length 0, the null entry 0 is never allocated, written to or referenced: padding lanes of a batch
   name them, and need no branches.
2. A row of length n holds exactly ceil(n / page_size) entries, all different; the cells behind them are 0.
3. `references[entry]` is the number of table cells that name the entry. An entry is on the free stack, once, exactly
   when it is 0. So owned and free entries are disjoint and together all entries but 0, and an empty cache is all free.
4. An entry with more than one reference is immutable, and full: the page that the next token of a row goes to is the
   row's own. `fork` copies a partial last page at once, and `compact` copies a shared page before it changes it.
5. A call that needs more entries than are free, or more than a row can name, changes nothing and says so (`ok`).
6. The order of a row's slots has no meaning (keys carry RoPE already); `compact` changes it. What belongs to a slot (K,
   V, score, position) moves together.

The host holds no page ids: it counts (`CacheLayout.entries_for`, `free_entries`).
"""

from .allocate import allocate, release
from .append import add_scores, append, rotate_and_append, slot_mapping, slots_at, stamp
from .compact import compact
from .dead import drop_dead_pages, live_slots
from .delta import (
    DeltaCache,
    DeltaCacheLayout,
    Entries,
    LatentCache,
    allocate_delta,
    free_delta_entries,
    init_delta_cache,
    latent_slots,
    near_slots,
    read_near,
    release_delta,
    store_near,
)
from .fork import fork
from .layout import CacheLayout, Granularity
from .repack import repack
from .state import FreeList, KVCache, KVPool, SlotMapping, SlotTable, free_entries, init_cache
from .usage import RowUsage, row_usage

__all__ = [
    "CacheLayout",
    "DeltaCache",
    "DeltaCacheLayout",
    "Entries",
    "FreeList",
    "Granularity",
    "KVCache",
    "KVPool",
    "LatentCache",
    "RowUsage",
    "SlotMapping",
    "SlotTable",
    "add_scores",
    "allocate",
    "allocate_delta",
    "append",
    "compact",
    "drop_dead_pages",
    "fork",
    "free_delta_entries",
    "free_entries",
    "init_cache",
    "init_delta_cache",
    "latent_slots",
    "live_slots",
    "near_slots",
    "read_near",
    "release",
    "release_delta",
    "repack",
    "rotate_and_append",
    "row_usage",
    "slot_mapping",
    "slots_at",
    "stamp",
    "store_near",
]
