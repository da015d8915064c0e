"""Tokens of DeltaKV requests read back into plain pages of K (after RoPE) and V, for any attention to read.

A prefill chunk attends to all tokens before it: they are read back layer by layer into a scratch, which one layer uses
and the next one overwrites. Decoding does without the scratch (`delta_attention`) if `up` is a matrix.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_integer, check_shape
from pallas_kernels.delta_reconstruct_triton import ReconstructTile, default_tile, delta_reconstruct_triton
from pallas_kernels.delta_reference import read_back_reference
from pallas_kernels.delta_store import DeltaLayout, DeltaStore, check_rotation, check_rows, check_store, check_up
from pallas_kernels.delta_store_xla import places_of, read_back
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.paging import PageAddress

_BLOCK = 256  # tokens that the XLA program reads at a time


def scratch_table(segments: int, columns: int) -> jax.Array:
    """i32[1, S + 1, 1, C]: the table by which attention reads a scratch; row s + 1 is segment s, row 0 is null."""
    table = jnp.arange(segments * columns, dtype=jnp.int32).reshape(1, segments, 1, columns)
    return jnp.pad(table, ((0, 0), (1, 0), (0, 0), (0, 0)))


def scratch_address(num_kv_heads: int) -> PageAddress:
    """How that table's entries name the pages of a scratch."""
    return PageAddress(0, num_kv_heads, 0, 1)


def delta_reconstruct(
    store: DeltaStore,
    rows: jax.Array,
    recent_rows: jax.Array,
    history: jax.Array,
    lengths: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    layout: DeltaLayout,
    num_kv_heads: int,
    positions: jax.Array | None = None,
    up: jax.Array | None = None,
    up_bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    tile: ReconstructTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Reads back the tokens at `positions`, or at 0 .. lengths[s] - 1, of each of S rows.

    Token t of segment s comes to in-page slot t % page of the pages `(s * C + t // page) * H + h`, C = ceil(T / page):
    `scratch_table(S, C)` and `scratch_address(H)` tell attention. The work is that of the tokens that are read,
    whatever T is.

    Args:
      store, layout: where the tokens are, see `delta_store`.
      rows, recent_rows: i32[S] table rows of the history (in both tables) and of the recent tokens.
      history: i32[S] tokens that are not recent.
      lengths: i32[S] tokens of each row, at most history + ring; 0 for padding.
      cos, sin: f32[1 or S, T, D/2] rotation of each token that may be read, T being the static bound. Without
        `positions` that of position t, shared by the segments if the first axis is 1.
      num_kv_heads: H.
      positions: i32[S, T] which tokens; those below 0 or not below the length are left out.
      up: [d, 2*H*D], a linear up-projection, at the precision of the pools; `up_bias` [2*H*D] its bias.
      residual: [S, T, 2*H*D] instead of `up`: what it gave for the latents (`read_latents`).
      tile: tile sizes of the kernel, for tuning.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      (k, v), each [S * C * H, page, D] in the type of the near pool. Slots of tokens that were not read hold anything.

    Raises:
      ValueError, TypeError: arguments that do not fit.
    """
    check_store(store, layout, num_kv_heads)
    segments, tokens, dim = rows.shape[0], cos.shape[1], store.k_pages.shape[2]
    check_rows(segments, rows=rows, recent_rows=recent_rows, history=history, lengths=lengths)
    check_rotation(cos, sin, segments if cos.shape[0] != 1 else 1, tokens, dim)
    if positions is not None:
        check_shape("positions", positions, (segments, tokens))
        check_integer(positions=positions)
    if (up is None) == (residual is None):
        raise ValueError("pass either up or residual, and not both")
    if up is not None:
        check_up(up, up_bias, store, num_kv_heads)
        up = up.astype(store.k_pages.dtype)
    elif residual is not None:
        if up_bias is not None:
            raise ValueError("up_bias goes with up: the residual holds it already")
        check_shape("residual", residual, (segments, tokens, 2 * num_kv_heads * dim))
    implementation, interpret = resolve(implementation, interpret)
    if 0 in (segments, tokens):
        empty = jnp.zeros((0, *store.k_pages.shape[1:]), store.k_pages.dtype)
        return empty, empty
    common, *layers = layout.split_layer()
    if implementation == "xla":
        return _reconstruct_xla(
            store, rows, recent_rows, history, lengths, cos, sin, positions, up, up_bias, residual, *layers,
            layout=common, heads=num_kv_heads,
        )  # fmt: skip
    return delta_reconstruct_triton(
        store, rows, recent_rows, history, lengths, cos, sin, positions, up, up_bias, residual, *layers,
        layout=common, heads=num_kv_heads, tile=tile or default_tile(store.k_pages), interpret=interpret,
    )  # fmt: skip


def delta_reconstruct_reference(
    store, rows, recent_rows, history, lengths, cos, sin, *, layout: DeltaLayout, num_kv_heads: int, positions=None,
    up=None, up_bias=None, residual=None,
):  # fmt: skip
    """The meaning of `delta_reconstruct`, one token after the other, float32 (arguments concrete); 0 where not read."""
    segments, tokens = rows.shape[0], cos.shape[1]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (segments, tokens))
    positions = jnp.where(positions < lengths[:, None], positions, -1)
    cos, sin = (jnp.broadcast_to(x, (segments, *x.shape[1:])) for x in (cos, sin))
    both = read_back_reference(
        store, rows, recent_rows, history, positions, cos, sin, up, up_bias, residual,
        layout=layout, num_kv_heads=num_kv_heads,
    )  # fmt: skip
    return tuple(_pages(jnp.asarray(x), store.k_pages.shape[1]) for x in both)


def _pages(x: jax.Array, page_size: int) -> jax.Array:
    """[S, T, H, D] -> [S * C * H, page, D]."""
    segments, tokens, heads, dim = x.shape
    columns = -(-tokens // page_size)
    x = jnp.pad(x, ((0, 0), (0, columns * page_size - tokens), (0, 0), (0, 0)))
    return x.reshape(segments, columns, page_size, heads, dim).swapaxes(2, 3).reshape(-1, page_size, dim)


@functools.partial(jax.jit, static_argnames=("layout", "heads"))
def _reconstruct_xla(
    store, rows, recent_rows, history, lengths, cos, sin, positions, up, up_bias, residual, near_layer, latent_layer, *,
    layout, heads,
):  # fmt: skip
    """A loop over blocks of tokens that ends at the last one that is read."""
    layout = layout.join_layer(near_layer, latent_layer)
    segments, tokens = rows.shape[0], cos.shape[1]
    dim = store.k_pages.shape[2]
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (segments, tokens))
    positions = jnp.where(positions < lengths[:, None], positions, -1)
    block = min(_BLOCK, tokens)
    steps = -(-tokens // block)

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, steps * block - tokens), *((0, 0),) * (x.ndim - 2)))

    positions = jnp.pad(positions, ((0, 0), (0, steps * block - tokens)), constant_values=-1)
    cos, sin = padded(cos), padded(sin)
    residual = None if residual is None else padded(residual)
    used = jnp.where(positions >= 0, jnp.arange(steps * block, dtype=jnp.int32) + 1, 0).max(initial=0)

    def visit(step, out):
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=step * block, slice_size=block, axis=1)
        new = read_back(
            store, places_of(store, rows, recent_rows, history, part(positions), layout=layout), part(cos), part(sin),
            up, up_bias, None if residual is None else part(residual), layout=layout, heads=heads,
        )  # fmt: skip
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), step * block, axis=1)
            for old, x in zip(out, new, strict=True)
        )

    zeros = jnp.zeros((segments, steps * block, heads, dim), store.k_pages.dtype)
    k, v = jax.lax.fori_loop(0, -(-used // block), visit, (zeros, zeros))
    return tuple(_pages(x[:, :tokens], store.k_pages.shape[1]) for x in (k, v))
