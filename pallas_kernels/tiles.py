"""Small helpers for indexing tiles inside Pallas kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.paging import PageAddress

WHOLE = pl.BlockSpec(memory_space=pl.ANY)
"""Hands a kernel the whole array as a pointer, without a copy."""


def load_lasting(
    ref, *, mask: jax.Array | None = None, other: jax.typing.ArrayLike | None = None, layers: int = 1
) -> jax.Array:
    """Loads what every layer, or every step, reads anew: the L2 cache is asked to keep it, inside a kernel.

    The weights of a layer are several times what the cache holds. They would push out the few kilobytes that small
    kernels wait for, and a wait for memory is a large part of the time that such a kernel takes.

    Args:
      layers: of so many layers each has its own; asks for nothing if these are several.
    """
    return plgpu.load(ref, mask=mask, other=other, eviction_policy="evict_last" if layers == 1 else None)


def load_of_layer(ref, layer, index) -> jax.Array:
    """Element [layer, index] of an array [Lt, n], inside a kernel."""
    # The interpreter takes a layer that is a Python int for no index of a load.
    return load_lasting(ref.at[index * 0 + layer, index], layers=ref.shape[0])


def load_of_head(ref, row, head, *, address: PageAddress) -> jax.Array:
    """What an array [Lt, R, Ht] has of a KV head of table row `row`, inside a kernel; Ht is 1 or the KV heads."""
    return ref[address.table_layer, row, head if ref.shape[2] > 1 else 0]


def next_power_of_two(size: int) -> int:
    """Smallest power of two that is at least `size` (Triton tiles have no other sizes)."""
    return 1 << max(size - 1, 0).bit_length()


def index_grid(rows: jax.Array, cols: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two index vectors as a pair of [rows, cols] arrays. Masked accesses need whole index arrays to be interpreted."""
    shape = (rows.shape[0], cols.shape[0])
    return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(cols[None, :], shape)


MIN_DOT_ROWS = 16
"""The smallest tile of a tensor-core product."""


def group_members(group: int) -> jax.Array:
    """i32[members] the query heads of a KV head by number, and behind them what fills a tile of a product."""
    return jnp.arange(max(MIN_DOT_ROWS, next_power_of_two(group)), dtype=jnp.int32)


def load_queries(q_ref, b, head, *, group: int) -> jax.Array:
    """[members, padded D] of request b and KV head `head` from q [B, Hq, D], in a kernel; 0 behind the group and D."""
    member, dim = group_members(group), q_ref.shape[2]
    members, columns = index_grid(member, jnp.arange(next_power_of_two(dim), dtype=jnp.int32))
    mask = vector_mask(member < group, columns, dim)
    return plgpu.load(q_ref.at[b, head * group + members, columns], mask=mask, other=0.0)


def exact_dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` of two tiles, accumulated in float32; float32 operands are not rounded to TF32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, precision=precision)


def fast_exp2(x: jax.Array) -> jax.Array:
    """`2**x` of float32 to 2 units in the last place, denormal results as 0, inside a kernel that is not interpreted.

    One instruction. Pallas lowers `jnp.exp2` to a library function that also keeps denormals, with which prefill
    attention takes 1.3 times as long on an H200.
    """
    (result,) = plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def kernel_exp2(interpret: bool) -> Callable[[jax.Array], jax.Array]:
    """The exponential for a kernel; the interpreter has no inline assembly."""
    return jnp.exp2 if interpret else fast_exp2


def locate_slots(
    table_ref, row, head, token: jax.Array, live: jax.Array | None, *, address: PageAddress, page_size: int
):
    """(page, slot), each like `token`, of the logical slots `token` of KV head `head` of table row `row`, in a kernel.

    `table_ref` is the whole table [Lt, R, Ht, M]. Slots that are not `live` (None: all are) come out in page
    `address.page(0, head)`.
    """
    table_head = head if table_ref.shape[2] > 1 else 0
    entry = plgpu.load(
        table_ref.at[address.table_layer, row, table_head, token // page_size],
        mask=live,
        other=None if live is None else 0,
    )
    return address.page(entry, head), token % page_size


def vector_mask(live: jax.Array | None, columns: jax.Array, dim: int) -> jax.Array | None:
    """bool, like `columns`: which elements of vectors exist, those of live rows left of `dim`. None means all."""
    mask = None if live is None else jnp.broadcast_to(live[:, None], columns.shape)
    if columns.shape[1] == dim:
        return mask
    inside = columns < dim
    return inside if mask is None else mask & inside


def load_vectors(pool_ref, page: jax.Array, slot: jax.Array, live: jax.Array | None, *, dim: int) -> jax.Array:
    """[n, padded dim] vectors at (page, slot) of a pool [P, page, D], inside a kernel; 0 where dead or past `dim`."""
    column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
    page, columns = index_grid(page, column)
    slot, _ = index_grid(slot, column)
    mask = vector_mask(live, columns, dim)
    return plgpu.load(pool_ref.at[page, slot, columns], mask=mask, other=None if mask is None else 0.0)
