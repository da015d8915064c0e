"""Where a DeltaStore keeps listed tokens, looked up once for all KV heads, as a Pallas-Triton kernel.

Four loads that depend on each other lie between a position and the vectors that make it up. The kernels that read these
vectors run a program per head: they start from what this one finds. Layers that read the same positions may have them
looked up together: the tables are theirs in common, only references differ.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_integer, check_shape
from pallas_kernels.delta_store import DeltaLayout, DeltaStore, Places, check_rows, check_store, tokens_at
from pallas_kernels.delta_store_xla import places_of
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.tiles import WHOLE, next_power_of_two

_BLOCK, _NUM_WARPS = 128, 4  # tokens of a program


def delta_places(
    store: DeltaStore,
    rows: jax.Array,
    recent_rows: jax.Array,
    history: jax.Array,
    positions: jax.Array,
    *,
    layouts: Sequence[DeltaLayout],
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> list[Places]:
    """Looks listed tokens up for several layers at once; `delta_attention` takes what was found for its layer.

    What is found holds until tokens of these rows are compressed.

    Args:
      store, rows, recent_rows, history, positions: as `delta_attention` takes them.
      layouts: of the layers, which differ in the layer only.
      implementation, interpret: see `dispatch.resolve`.

    Raises:
      ValueError, TypeError: arguments that do not fit.
    """
    if not layouts:
        raise ValueError("layouts must have one layer at least")
    for layout in layouts:
        check_store(store, layout, None)
    check_rows(rows.shape[0], rows=rows, recent_rows=recent_rows, history=history)
    check_shape("positions", positions, (rows.shape[0], None))
    check_integer(positions=positions)
    common, near_layers, latent_layers = zip(*(layout.split_layer() for layout in layouts), strict=True)
    if len(set(common)) > 1:
        raise ValueError(f"layouts must differ in the layer only, got {layouts}")
    implementation, interpret = resolve(implementation, interpret)
    if implementation == "xla" or 0 in positions.shape:
        layers = zip(near_layers, latent_layers, strict=True)
        return [_find_xla(store, rows, recent_rows, history, positions, *layer, layout=common[0]) for layer in layers]
    return _find(
        store, rows, recent_rows, history, positions, near_layers, latent_layers, layout=common[0], interpret=interpret
    )


@functools.partial(jax.jit, static_argnames=("layout",))
def _find_xla(store, rows, recent_rows, history, positions, near_layer, latent_layer, *, layout):
    return places_of(store, rows, recent_rows, history, positions, layout=layout.join_layer(near_layer, latent_layer))


@functools.partial(jax.jit, static_argnames=("layout", "interpret"))
def _find(store, rows, recent_rows, history, positions, near_layers, latent_layers, *, layout, interpret):
    everywhere = jnp.full_like(rows, jnp.iinfo(jnp.int32).max)  # the positions that are listed are all held
    return find_places(
        store, rows, recent_rows, history, everywhere, positions, near_layers, latent_layers,
        tokens=positions.shape[1], layout=layout, interpret=interpret,
    )  # fmt: skip


def _kernel(*refs, layers, layout, near_page, block, listed):
    """`block` tokens of one segment, in each layer."""
    near_table_ref, latent_table_ref, reference_ref, rows_ref, recent_rows_ref, history_ref, lengths_ref, *refs = refs
    position_ref, refs = (refs[0], refs[1:]) if listed else (None, refs)
    near_layer_refs, latent_layer_refs, outs = refs[:layers], refs[layers : 2 * layers], refs[2 * layers :]
    layouts = [layout.join_layer(near, latent) for near, latent in zip(near_layer_refs, latent_layer_refs, strict=True)]
    near_refs, latent_refs = outs[::2], outs[1::2]
    index, s = pl.program_id(0), pl.program_id(1)
    place = index * block + jnp.arange(block, dtype=jnp.int32)
    inside, length = place < latent_refs[0].shape[1], lengths_ref[s]
    latent_page, neighbors = reference_ref.shape[1:]

    def find(position):
        live = (position >= 0) & (position < length)
        row = rows_ref[s]
        compressed, near_row, own = tokens_at(row, recent_rows_ref[s], history_ref[s], position, layout=layout)
        compressed &= live
        slot = jnp.where(compressed, own, 0)
        latent_entry = plgpu.load(
            latent_table_ref.at[0, jnp.broadcast_to(row, slot.shape), 0, slot // latent_page], mask=compressed, other=0
        )
        slot = slot % latent_page
        # All loads come before all stores, over which they would not be moved: so those of the layers overlap.
        latents, centers, nears = [], [], []
        for layout_here in layouts:
            page = layout_here.latent.page(latent_entry, 0)
            latents.append(jnp.where(compressed, page * latent_page + slot, -1))
            for neighbor in range(neighbors):
                of = jnp.full(slot.shape, neighbor, jnp.int32)
                center = plgpu.load(reference_ref.at[page, slot, of], mask=compressed, other=0).astype(jnp.int32)
                centers.append(jnp.where(compressed, center, own))
        for number, center in enumerate(centers):
            entry = plgpu.load(near_table_ref.at[0, near_row, 0, center // near_page], mask=live, other=0)
            found = layouts[number // neighbors].near.page(entry, 0) * near_page + center % near_page
            nears.append(jnp.where(live, found, -1))
        at = jnp.broadcast_to(s, place.shape)
        # The cache is asked to keep them until their layers come.
        store = functools.partial(plgpu.store, mask=inside, eviction_policy="evict_last")
        for layer in range(layers):
            store(latent_refs[layer].at[at, place], latents[layer])
            for neighbor in range(neighbors):
                of = jnp.full(slot.shape, neighbor, jnp.int32)
                found = nears[layer * neighbors + neighbor]
                store(near_refs[layer].at[at, of, place], found)

    if position_ref is None:
        pl.when(index * block < length)(lambda: find(place))
    else:
        listed_at = jnp.broadcast_to(s, place.shape), place
        find(plgpu.load(position_ref.at[listed_at], mask=inside, other=-1))


def find_places(
    store: DeltaStore, rows, recent_rows, history, lengths, positions, near_layers: Sequence[jax.Array],
    latent_layers: Sequence[jax.Array], *, tokens: int, layout, interpret: bool,
) -> list[Places]:  # fmt: skip
    """Looks up, in each layer, the tokens at `positions` i32[S, T], or 0 .. T-1 if None, below `lengths` i32[S].

    Of no positions, blocks of tokens beyond the length of their row are not written.
    """
    segments, neighbors, layers = rows.shape[0], store.latents.reference.shape[2], len(near_layers)
    block = min(_BLOCK, max(16, next_power_of_two(tokens)))
    inputs = [store.near_table, store.latent_table, store.latents.reference, rows, recent_rows, history, lengths]
    inputs += [*([] if positions is None else [positions]), *near_layers, *latent_layers]
    shapes = [
        jax.ShapeDtypeStruct((segments, neighbors, tokens), jnp.int32),
        jax.ShapeDtypeStruct((segments, tokens), jnp.int32),
    ] * layers
    found = pl.pallas_call(
        functools.partial(
            _kernel,
            layers=layers,
            layout=layout,
            near_page=store.k_pages.shape[1],
            block=block,
            listed=positions is not None,
        ),
        grid=(pl.cdiv(tokens, block), segments),
        in_specs=[WHOLE] * len(inputs),
        out_specs=[WHOLE] * len(shapes),
        out_shape=shapes,
        compiler_params=plgpu.CompilerParams(num_warps=_NUM_WARPS, num_stages=1),
        interpret=interpret,
        name="delta_places",
    )(*inputs)
    return [Places(near, latent) for near, latent in zip(found[::2], found[1::2], strict=True)]
