"""How a table entry, a layer and a KV head name one physical page.

A page holds `page_size` tokens of one KV head of one layer of one request. A slot table may be shared by all layers and
heads, kept per layer, or kept per (layer, head); an entry of it then stands for as many consecutive pages as it covers
(layer, head) pairs. Every kernel that reads K or V through a table takes a `PageAddress`, so one kernel serves all
three.
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class PageAddress:
    """The arithmetic of one layer: `page(entry, head) = entry * entry_stride + layer_offset + head * head_stride`.

    Attributes:
      table_layer: index into the leading axis of the table and of the lengths (0 when layers share one table).
      entry_stride: pages that one table entry stands for.
      layer_offset: first page of this layer inside an entry's pages.
      head_stride: 1 when one entry covers all KV heads, 0 when every head has a table of its own.
    """

    table_layer: int
    entry_stride: int
    layer_offset: int
    head_stride: int

    def page(self, entry, head):
        """Physical page of `head` under `entry`; both broadcast, ints or arrays."""
        return entry * self.entry_stride + self.layer_offset + head * self.head_stride

    def split_layer(self) -> tuple["PageAddress", jax.Array]:
        """(what the layers have in common, this layer's part as an i32 array); `join_layer` puts them together again.

        With the layer as data, the layers of a model share one trace and one compiled kernel.
        """
        # XLA would compute a constant (0, n) as iota * n, one more kernel a layer; a third element keeps it constant.
        layer = jnp.array([self.table_layer, self.layer_offset, 0], jnp.int32)
        return replace(self, table_layer=0, layer_offset=0), layer

    def join_layer(self, layer, table_layers: int | None = None) -> "PageAddress":
        """The address of the `layer` that `split_layer` gave, an array or a kernel's reference to it.

        Args:
          table_layers: length of the table's leading axis. With 1, a kernel need not wait for `layer` to know where in
            the table it is.
        """
        return replace(self, table_layer=0 if table_layers == 1 else layer[0], layer_offset=layer[1])
