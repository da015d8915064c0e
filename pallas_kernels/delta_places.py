"""Where a DeltaStore keeps listed tokens, looked up once for all KV heads, as a Pallas-Triton kernel.

Four loads that depend on each other lie between a position and the vectors that make it up. The kernels that read these
vectors run a program per head: they start from what this one finds.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.delta_store import DeltaStore, tokens_at
from pallas_kernels.tiles import WHOLE, next_power_of_two

_BLOCK, _NUM_WARPS = 128, 4  # tokens of a program


class Places(NamedTuple):
    """Rows of the pools seen as [P * page, n].

    Attributes:
      near: i32[S, K, T] rows of KV head 0 whose mean is the token's reference; for a token that is kept exactly its own
        row, K times; -1 for unused tokens.
      latent: i32[S, T] row of the token's latent; -1 if it has none or is unused.

    Blocks of tokens beyond the length of their row are not written.
    """

    near: jax.Array
    latent: jax.Array


def _kernel(*refs, layout, near_page, block, listed):
    """`block` tokens of one segment."""
    near_table_ref, latent_table_ref, reference_ref, rows_ref, recent_rows_ref, history_ref, lengths_ref, *refs = refs
    position_ref, refs = (refs[0], refs[1:]) if listed else (None, refs)
    near_layer_ref, latent_layer_ref, near_ref, latent_ref = refs
    index, s = pl.program_id(0), pl.program_id(1)
    layout = layout.join_layer(near_layer_ref, latent_layer_ref)
    place = index * block + jnp.arange(block, dtype=jnp.int32)
    inside, length = place < latent_ref.shape[1], lengths_ref[s]
    latent_page = reference_ref.shape[1]

    def find(position):
        live = (position >= 0) & (position < length)
        row = rows_ref[s]
        compressed, near_row, own = tokens_at(row, recent_rows_ref[s], history_ref[s], position, layout=layout)
        compressed &= live
        slot = jnp.where(compressed, own, 0)
        entry = plgpu.load(
            latent_table_ref.at[0, jnp.broadcast_to(row, slot.shape), 0, slot // latent_page], mask=compressed, other=0
        )
        page, slot = layout.latent.page(entry, 0), slot % latent_page
        at = jnp.broadcast_to(s, place.shape), place
        plgpu.store(latent_ref.at[at], jnp.where(compressed, page * latent_page + slot, -1), mask=inside)
        for neighbor in range(reference_ref.shape[2]):
            of = jnp.full(slot.shape, neighbor, jnp.int32)
            center = plgpu.load(reference_ref.at[page, slot, of], mask=compressed, other=0).astype(jnp.int32)
            center = jnp.where(compressed, center, own)
            entry = plgpu.load(near_table_ref.at[0, near_row, 0, center // near_page], mask=live, other=0)
            found = layout.near.page(entry, 0) * near_page + center % near_page
            plgpu.store(near_ref.at[at[0], of, place], jnp.where(live, found, -1), mask=inside)

    if position_ref is None:
        pl.when(index * block < length)(lambda: find(place))
    else:
        listed_at = jnp.broadcast_to(s, place.shape), place
        find(plgpu.load(position_ref.at[listed_at], mask=inside, other=-1))


def find_places(
    store: DeltaStore, rows, recent_rows, history, lengths, positions, near_layer, latent_layer, *, tokens: int, layout,
    interpret: bool,
) -> Places:  # fmt: skip
    """Looks up the tokens at `positions` i32[S, T], or 0 .. T-1 if None, that lie below `lengths` i32[S]."""
    segments, neighbors = rows.shape[0], store.latents.reference.shape[2]
    block = min(_BLOCK, max(16, next_power_of_two(tokens)))
    inputs = [store.near_table, store.latent_table, store.latents.reference, rows, recent_rows, history, lengths]
    inputs += [*([] if positions is None else [positions]), near_layer, latent_layer]
    near, latent = pl.pallas_call(
        functools.partial(
            _kernel, layout=layout, near_page=store.k_pages.shape[1], block=block, listed=positions is not None
        ),
        grid=(pl.cdiv(tokens, block), segments),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * 2,
        out_shape=[
            jax.ShapeDtypeStruct((segments, neighbors, tokens), jnp.int32),
            jax.ShapeDtypeStruct((segments, tokens), jnp.int32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="delta_places",
    )(*inputs)
    return Places(near, latent)
