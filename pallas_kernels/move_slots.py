"""Moving single tokens inside the page pool: how compaction fills the holes that eviction leaves."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_integer, check_pool, check_shape
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.tiles import WHOLE, index_grid, load_vectors, next_power_of_two, vector_mask

_BLOCK = 16  # moves per program
_NUM_WARPS = 4


def move_slots(
    k_pages: jax.Array,
    v_pages: jax.Array,
    source: jax.Array,
    target: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Copies the K and V of slot `source[i]` to slot `target[i]` for every i, in place when the pools are donated.

    Args:
      k_pages, v_pages: [P, page, D] pools.
      source: i32[N] flat slot ids, `page * page_size + slot`.
      target: i32[N] flat slot ids. `P * page_size` drops the move, and its source is then ignored. Live targets must be
        distinct, and none may be a live source: the moves run in no particular order.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      The updated (k_pages, v_pages).

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_pool(k_pages, v_pages)
    check_shape("source", source, (None,))
    check_shape("target", target, tuple(source.shape))
    check_integer(source=source, target=target)
    implementation, interpret = resolve(implementation, interpret)
    if source.shape[0] == 0:
        return k_pages, v_pages
    if implementation == "xla":
        return _move_xla(k_pages, v_pages, source, target)
    return _move_triton(k_pages, v_pages, source, target, interpret=interpret)


def move_slots_reference(k_pages, v_pages, source, target) -> tuple[jax.Array, jax.Array]:
    """The meaning of `move_slots`, one move after the other."""
    pages, page_size, _ = k_pages.shape
    for s, t in zip(source.tolist(), target.tolist(), strict=True):
        if t < pages * page_size:
            at, of = divmod(t, page_size), divmod(s, page_size)
            k_pages = k_pages.at[at].set(k_pages[of])
            v_pages = v_pages.at[at].set(v_pages[of])
    return k_pages, v_pages


@jax.jit
def _move_xla(k_pages, v_pages, source, target):
    page_size = k_pages.shape[1]
    from_page, from_slot = source // page_size, source % page_size
    to_page, to_slot = target // page_size, target % page_size  # the sentinel names the page past the last one
    return tuple(
        pool.at[to_page, to_slot].set(pool.at[from_page, from_slot].get(mode="clip"), mode="drop")
        for pool in (k_pages, v_pages)
    )


def _move_kernel(source_ref, target_ref, _k_in, _v_in, k_out, v_out, *, block):
    """`block` moves. Sources are read through the outputs: the input aliases may not show earlier writes."""
    pages, page_size, dim = k_out.shape
    move = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    real = move < source_ref.shape[0]
    sentinel = pages * page_size
    target = plgpu.load(target_ref.at[move], mask=real, other=sentinel)
    live = target < sentinel
    source = plgpu.load(source_ref.at[move], mask=live, other=0)
    column = jnp.arange(next_power_of_two(dim), dtype=jnp.int32)
    to_page, columns = index_grid(target // page_size, column)
    to_slot, _ = index_grid(target % page_size, column)
    mask = vector_mask(live, columns, dim)  # dead lanes point past the pool, as the sentinel does (see store_kv)
    for pool in (k_out, v_out):
        vectors = load_vectors(pool, source // page_size, source % page_size, live, dim=dim)
        plgpu.store(pool.at[to_page, to_slot, columns], vectors, mask=mask)


@functools.partial(jax.jit, static_argnames=("interpret",))
def _move_triton(k_pages, v_pages, source, target, *, interpret):
    pool = jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype)
    block = min(_BLOCK, next_power_of_two(source.shape[0]))
    return tuple(
        pl.pallas_call(
            functools.partial(_move_kernel, block=block),
            grid=(pl.cdiv(source.shape[0], block),),
            in_specs=[WHOLE] * 4,
            out_specs=[WHOLE, WHOLE],
            out_shape=[pool, pool],
            input_output_aliases={2: 0, 3: 1},
            compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
            interpret=interpret,
            name="move_slots",
        )(source, target, k_pages, v_pages)
    )
