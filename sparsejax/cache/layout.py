"""The static shape of a KV cache: sizes, table granularity and the page arithmetic that follows from them."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.paging import PageAddress

Granularity = Literal["shared", "per_layer", "per_head"]

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class CacheLayout:
    """Everything about a cache that is known before any token arrives. Hashable, so it can be a static jit argument.

    A *page* holds `page_size` tokens of one KV head of one layer of one request. A *table entry* stands for
    `pages_per_entry` consecutive pages, one for each (layer, head) pair that shares the table:

    | granularity | table axes [Lt, Ht] | pages_per_entry | heads and layers of a request hold            |
    |-------------|---------------------|-----------------|-----------------------------------------------|
    | "shared"    | [1, 1]              | L * H           | the same number of tokens, the same slots     |
    | "per_layer" | [L, 1]              | H               | as many tokens as each layer keeps            |
    | "per_head"  | [L, H]              | 1               | as many tokens as each head of a layer keeps  |

    Attributes:
      num_layers: L.
      num_kv_heads: H.
      head_dim: D.
      num_pages: physical pages in the pool, those of the null entry included.
      max_slots: most tokens that a row can hold, rounded up to whole pages.
      max_rows: rows that requests can use; the null row comes on top.
      page_size: tokens of a page, a power of two.
      granularity: "shared", "per_layer" or "per_head".
      dtype: of K and V, a floating type.
      with_score: keep an f32 score per slot.
      with_position: keep the i32 position of the token in each slot.
      with_bounds: keep the smallest and largest value of each dimension of a page's keys.

    Raises:
      ValueError: a size is not positive, page_size is no power of two, granularity is unknown, dtype is not floating,
        there is no entry besides the null one, or slot ids would not fit into 32 bits.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    max_rows: int
    max_slots: int
    page_size: int = 32
    granularity: Granularity = "shared"
    dtype: DTypeLike = jnp.bfloat16
    with_score: bool = False
    with_position: bool = False
    with_bounds: bool = False

    def __post_init__(self):
        for name in ("num_layers", "num_kv_heads", "head_dim", "num_pages", "max_rows", "max_slots", "page_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two, got {self.page_size}")
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"granularity must be one of {get_args(Granularity)}, got {self.granularity!r}")
        # One spelling of a type, so that equal layouts hash alike.
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype must be a floating type, got {self.dtype}")
        if self.num_entries < 2:
            raise ValueError(
                f"num_pages must be at least {2 * self.pages_per_entry} (the null entry and one more, "
                f"{self.pages_per_entry} pages each with granularity {self.granularity!r}), got {self.num_pages}"
            )
        if self.num_pages * self.page_size > _INT32_MAX:
            raise ValueError(
                f"num_pages * page_size must not exceed {_INT32_MAX} (slot ids are 32-bit), "
                f"got {self.num_pages} * {self.page_size}"
            )

    @property
    def table_layers(self) -> int:
        """Lt: 1 when all layers share one table, else L."""
        return 1 if self.granularity == "shared" else self.num_layers

    @property
    def table_heads(self) -> int:
        """Ht: H when every head has its own table, else 1."""
        return self.num_kv_heads if self.granularity == "per_head" else 1

    @property
    def pages_per_entry(self) -> int:
        """Consecutive pages that one table entry stands for."""
        return (self.num_layers // self.table_layers) * (self.num_kv_heads // self.table_heads)

    @property
    def num_entries(self) -> int:
        """Table entries that the pool can back, the null entry included."""
        return self.num_pages // self.pages_per_entry

    @property
    def num_rows(self) -> int:
        """R: table rows, the null row included."""
        return self.max_rows + 1

    @property
    def max_entries_per_row(self) -> int:
        """M: entries of one row of one (layer, head) table."""
        return self.pages_for(self.max_slots)

    @property
    def entries_per_page_column(self) -> int:
        """Lt * Ht: entries that one more page of tokens costs a request."""
        return self.table_layers * self.table_heads

    def pages_for(self, tokens):
        """Pages of one (layer, head) that hold `tokens` tokens: an int, or an array of them."""
        return (tokens + self.page_size - 1) // self.page_size

    def entries_for(self, tokens: int) -> int:
        """Entries that a row of `tokens` tokens in every layer and head takes."""
        return self.entries_per_page_column * self.pages_for(tokens)

    def address(self, layer: int) -> PageAddress:
        """The page arithmetic of one layer, as the kernels take it.

        Raises:
          ValueError: layer is not in [0, num_layers).
        """
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer must be in [0, {self.num_layers}), got {layer}")
        return PageAddress(
            table_layer=0 if self.granularity == "shared" else layer,
            entry_stride=self.pages_per_entry,
            layer_offset=layer * self.num_kv_heads if self.granularity == "shared" else 0,
            head_stride=0 if self.granularity == "per_head" else 1,
        )

    def pages_of(self, entries: int) -> int:
        """Pages of so many table entries."""
        return entries * self.pages_per_entry

    def bytes_of(self, entries: int) -> int:
        """Device memory of the K and V of so many table entries."""
        return entries * self.pages_per_entry * 2 * self.page_size * self.head_dim * jnp.dtype(self.dtype).itemsize

    def table_bytes(self) -> int:
        """Device memory of table and lengths."""
        return 4 * self.entries_per_page_column * self.num_rows * (self.max_entries_per_row + 1)

    def bytes(self) -> int:
        """Device memory of the whole cache: pool, scores, positions, bounds, table, lengths and free list."""
        slots = self.num_pages * self.page_size
        pool = 2 * slots * self.head_dim * jnp.dtype(self.dtype).itemsize
        per_slot = 4 * slots * (int(self.with_score) + int(self.with_position))
        free = 4 * (2 * self.num_entries + 1)
        bounds = 2 * self.num_pages * self.head_dim * jnp.dtype(self.dtype).itemsize if self.with_bounds else 0
        return pool + per_slot + bounds + self.table_bytes() + free
