"""Writing the K and V of new tokens into the page pool, in place when the pools are donated."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_places, check_pool, check_shape
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.paging import PageAddress
from pallas_kernels.tiles import WHOLE, index_grid, load_lasting, next_power_of_two, vector_mask

_NUM_WARPS = 4


def store_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    entry: jax.Array,
    slot: jax.Array,
    *,
    address: PageAddress,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Stores one layer's K and V of T tokens at their slots.

    Args:
      k_pages, v_pages: [P, page, D] pools. Donate them to the enclosing jit: the update is then in place.
      k, v: [T, H, D], cast to the dtype of the pools.
      entry: i32[Lt, T, Ht] table entry whose page takes the token. Entry 0, the null entry, drops the token.
      slot: i32[Lt, T, Ht] place inside the page, in [0, page).
      address: how entries name pages; its `table_layer` picks the leading index of `entry` and `slot`.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      The updated (k_pages, v_pages). Live (entry, slot) pairs must be distinct.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_pool(k_pages, v_pages)
    dim = k_pages.shape[2]
    check_shape("k", k, (None, None, dim))
    check_shape("v", v, tuple(k.shape))
    tokens, heads, _ = k.shape
    check_places(entry, slot, tokens, address, heads)
    implementation, interpret = resolve(implementation, interpret)
    if tokens == 0:
        return k_pages, v_pages
    k, v = k.astype(k_pages.dtype), v.astype(v_pages.dtype)
    address, layer = address.split_layer()
    if implementation == "xla":
        return _store_xla(k_pages, v_pages, k, v, entry, slot, layer, address=address)
    return _store_triton(k_pages, v_pages, k, v, entry, slot, layer, address=address, interpret=interpret)


def store_kv_reference(k_pages, v_pages, k, v, entry, slot, *, address: PageAddress) -> tuple[jax.Array, jax.Array]:
    """The meaning of `store_kv`, one (token, head) after the other."""
    tokens, heads, _ = k.shape
    for t in range(tokens):
        for h in range(heads):
            at = (address.table_layer, t, min(h, entry.shape[2] - 1))
            if entry[at] != 0:
                page = address.page(entry[at], h)
                k_pages = k_pages.at[page, slot[at]].set(k[t, h].astype(k_pages.dtype))
                v_pages = v_pages.at[page, slot[at]].set(v[t, h].astype(v_pages.dtype))
    return k_pages, v_pages


@functools.partial(jax.jit, static_argnames=("address",))
def _store_xla(k_pages, v_pages, k, v, entry, slot, layer, *, address):
    address = address.join_layer(layer)
    tokens, heads, _ = k.shape
    entry = jnp.broadcast_to(entry[address.table_layer], (tokens, heads))
    slot = jnp.broadcast_to(slot[address.table_layer], (tokens, heads))
    # Dropped tokens go to pages past the pool, each to another one, so that the indices are unique as promised.
    beyond = k_pages.shape[0] + jnp.arange(tokens, dtype=jnp.int32)[:, None]
    page = jnp.where(entry == 0, beyond, address.page(entry, jnp.arange(heads, dtype=jnp.int32)))
    slot = jnp.where(entry == 0, jnp.arange(heads, dtype=jnp.int32), slot)
    return tuple(
        pool.at[page, slot].set(new, mode="drop", unique_indices=True) for pool, new in ((k_pages, k), (v_pages, v))
    )


def load_places(
    entry_ref, slot_ref, token, head: jax.Array, *, heads: int, pages: int, address: PageAddress
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(page, slot, live), each like `head` i32[n]: where a token's heads are stored, inside a kernel.

    Lanes behind the `heads` and of dropped tokens are dead. They point past the pool of `pages`: the interpreter writes
    old values back at masked lanes, and they must hit nothing live.
    """
    real = head < heads
    at = (address.table_layer, jnp.broadcast_to(token, head.shape), head if entry_ref.shape[2] > 1 else head * 0)
    entry, slot = (load_lasting(ref.at[at], mask=real, other=0, layers=ref.shape[0]) for ref in (entry_ref, slot_ref))
    live = real & (entry != 0)
    return jnp.where(live, address.page(entry, head), pages), slot, live


def _store_kernel(k_ref, v_ref, entry_ref, slot_ref, layer_ref, _k_in, _v_in, k_out, v_out, *, address, heads):
    """One token: all its heads. The pools are only written, through the outputs, which are the donated inputs."""
    token = pl.program_id(0)
    address = address.join_layer(layer_ref, entry_ref.shape[0])
    dim = k_out.shape[2]
    head = jnp.arange(next_power_of_two(heads), dtype=jnp.int32)
    column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
    page, slot, live = load_places(entry_ref, slot_ref, token, head, heads=heads, pages=k_out.shape[0], address=address)
    pages, columns = index_grid(page, column)
    slots, _ = index_grid(slot, column)
    rows, _ = index_grid(head, column)
    # Fetched while the places are, and both before either is stored: a load does not pass a store.
    new = [
        plgpu.load(ref.at[token, rows, columns], mask=vector_mask(head < heads, columns, dim), other=0.0)
        for ref in (k_ref, v_ref)
    ]
    for values, pool in zip(new, (k_out, v_out), strict=True):
        plgpu.store(pool.at[pages, slots, columns], values, mask=vector_mask(live, columns, dim))


@functools.partial(jax.jit, static_argnames=("address", "interpret"))
def _store_triton(k_pages, v_pages, k, v, entry, slot, layer, *, address, interpret):
    tokens, heads, _ = k.shape
    pool = jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype)
    return tuple(
        pl.pallas_call(
            functools.partial(_store_kernel, address=address, heads=heads),
            grid=(tokens,),
            in_specs=[WHOLE] * 7,
            out_specs=[WHOLE, WHOLE],
            out_shape=[pool, pool],
            input_output_aliases={5: 0, 6: 1},
            compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
            interpret=interpret,
            name="store_kv",
        )(k, v, entry, slot, layer, k_pages, v_pages)
    )
