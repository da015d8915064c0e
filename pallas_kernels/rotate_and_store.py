"""What happens between a decode step's QKV product and its attention, as one kernel: rotary embedding, and the store.

Apart, these are four kernels of a microsecond or two each (rotate q, rotate k, slice v, store both), half of them too
small to fill a GPU. The values are those of `rotate` followed by `store_kv`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_places, check_pool, check_shape, query_group
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.paging import PageAddress
from pallas_kernels.store_kv import load_places, store_kv, store_kv_reference
from pallas_kernels.tiles import WHOLE, index_grid, load_lasting, next_power_of_two, vector_mask

_NUM_WARPS = 2


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding (Su et al. 2021, in the layout of GPT-NeoX: component i turns with component i + D/2).

    Args:
      x: [T, H, D], computed in float32.
      cos, sin: f32[T, D/2] of each token's angles.

    Returns:
      [T, H, D] in x's dtype.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def rotate_and_store(
    k_pages: jax.Array,
    v_pages: jax.Array,
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    entry: jax.Array,
    slot: jax.Array,
    *,
    num_kv_heads: int,
    address: PageAddress,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotates the queries and keys of T tokens, and stores keys and values of one layer at their slots.

    Args:
      k_pages, v_pages: [P, page, D] pools. Donate them to the enclosing jit: the update is then in place.
      qkv: [T, Hq + 2 * H, D], query heads, then key heads, then value heads; D even.
      cos, sin: f32[T, D/2], as `rotate` takes them.
      entry, slot: i32[Lt, T, Ht], as `store_kv` takes them. Entry 0 drops a token's keys and values.
      num_kv_heads: H; Hq must be a multiple of it.
      address: how entries name pages; its `table_layer` picks the leading index of `entry` and `slot`.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      (q [T, Hq, D] rotated, k_pages, v_pages).

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_pool(k_pages, v_pages)
    dim = k_pages.shape[2]
    check_shape("qkv", qkv, (None, None, dim))
    tokens, heads = qkv.shape[:2]
    if dim % 2:
        raise ValueError(f"qkv must have an even number of components (axis 2), got {dim}")
    if heads <= 2 * num_kv_heads:
        raise ValueError(f"qkv has {heads} heads, expected more than the {2 * num_kv_heads} of keys and values")
    query_group(heads - 2 * num_kv_heads, num_kv_heads)
    check_shape("cos", cos, (tokens, dim // 2))
    check_shape("sin", sin, (tokens, dim // 2))
    check_places(entry, slot, tokens, address, num_kv_heads)
    implementation, interpret = resolve(implementation, interpret)
    if implementation == "xla" or tokens == 0:
        q, k, v = _split(qkv, num_kv_heads)
        stored = store_kv(
            k_pages, v_pages, rotate(k, cos, sin), v, entry, slot, address=address, implementation="xla"
        )  # fmt: skip
        return rotate(q, cos, sin), *stored
    address, layer = address.split_layer()
    return _rotate_and_store_triton(
        k_pages, v_pages, qkv, cos, sin, entry, slot, layer, heads=num_kv_heads, address=address, interpret=interpret
    )


def rotate_and_store_reference(
    k_pages, v_pages, qkv, cos, sin, entry, slot, *, num_kv_heads: int, address: PageAddress
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The meaning of `rotate_and_store`: as complex numbers, pairs of components turn by the token's angles."""

    def turn(x):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = (first + 1j * second) * (cos + 1j * sin)[:, None]
        return jnp.concatenate([turned.real, turned.imag], axis=-1).astype(x.dtype)

    q, k, v = _split(qkv, num_kv_heads)
    return turn(q), *store_kv_reference(k_pages, v_pages, turn(k), v, entry, slot, address=address)


def _split(qkv: jax.Array, num_kv_heads: int) -> list[jax.Array]:
    heads = qkv.shape[1]
    return jnp.split(qkv, [heads - 2 * num_kv_heads, heads - num_kv_heads], axis=1)


def _kernel(
    qkv_ref, cos_ref, sin_ref, entry_ref, slot_ref, layer_ref, _k_in, _v_in, q_out, k_out, v_out, *, address, heads
):
    """H heads of one token: some of its query heads, or (the last program of a token) its key and value heads."""
    token, part = pl.program_id(0), pl.program_id(1)
    address = address.join_layer(layer_ref, entry_ref.shape[0])
    dim, query_heads = qkv_ref.shape[2], q_out.shape[1]
    head = jnp.arange(next_power_of_two(heads), dtype=jnp.int32)
    column = jnp.arange(next_power_of_two(dim // 2), dtype=jnp.int32)
    rows, columns = index_grid(head, column)
    mask = vector_mask(head < heads, columns, dim // 2)

    def halves(first_head):
        return [
            plgpu.load(qkv_ref.at[token, first_head + rows, half + columns], mask=mask, other=0.0)
            for half in (0, dim // 2)
        ]

    def rotation():
        at = jnp.broadcast_to(token, column.shape), column
        return [load_lasting(ref.at[at], mask=column < dim // 2, other=0.0) for ref in (cos_ref, sin_ref)]

    def turned(vectors, rotation):
        (first, second), (cos, sin) = (x.astype(jnp.float32) for x in vectors), (x[None] for x in rotation)
        return [x.astype(qkv_ref.dtype) for x in (first * cos - second * sin, second * cos + first * sin)]

    @pl.when(part * heads < query_heads)
    def _():
        for half, values in zip((0, dim // 2), turned(halves(part * heads), rotation()), strict=True):
            plgpu.store(q_out.at[token, part * heads + rows, half + columns], values, mask=mask)

    @pl.when(part * heads == query_heads)
    def _():
        # All is fetched before anything is waited for, or stored: a load does not pass a store.
        k, v, angles = halves(query_heads), halves(query_heads + heads), rotation()
        page, slot, live = load_places(
            entry_ref, slot_ref, token, head, heads=heads, pages=k_out.shape[0], address=address
        )
        pages, _ = index_grid(page, column)
        slots, _ = index_grid(slot, column)
        stored = vector_mask(live, columns, dim // 2)
        for pool, vectors in ((k_out, turned(k, angles)), (v_out, v)):
            for half, values in zip((0, dim // 2), vectors, strict=True):
                plgpu.store(pool.at[pages, slots, half + columns], values.astype(pool.dtype), mask=stored)


@functools.partial(jax.jit, static_argnames=("heads", "address", "interpret"))
def _rotate_and_store_triton(
    k_pages, v_pages, qkv, cos, sin, entry, slot, layer, *, heads, address, interpret
):  # fmt: skip
    tokens, all_heads, dim = qkv.shape
    query_heads = all_heads - 2 * heads
    pool = jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype)
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, address=address, heads=heads),
            grid=(tokens, query_heads // heads + 1),
            in_specs=[WHOLE] * 8,
            out_specs=[WHOLE] * 3,
            out_shape=[jax.ShapeDtypeStruct((tokens, query_heads, dim), qkv.dtype), pool, pool],
            input_output_aliases={6: 1, 7: 2},
            compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
            interpret=interpret,
            name="rotate_and_store",
        )(qkv, cos, sin, entry, slot, layer, k_pages, v_pages)
    )
