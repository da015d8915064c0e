"""What the sparse layers of a `DeltaCache` do with its pools: read tokens back, and attend to some of them.

The kernels know arrays; here they meet the cache, the compressor and the rotation of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import (
    DeltaLayout,
    DeltaStore,
    Implementation,
    Places,
    decode_attention,
    delta_attention,
    delta_places,
    delta_reconstruct,
    prefill_attention,
    read_latents,
    scratch_address,
    scratch_table,
    view_positions,
)
from sparsejax.cache import DeltaCache
from sparsejax.compressor import Compressor, CompressorConfig, StoreGeometry
from sparsejax.models.rope import RopeConfig, rope_cos_sin


@dataclass(frozen=True)
class StoreSpec:
    """How an engine stores requests compressed: static.

    Attributes:
      compressor: sizes and kinds of the projections, and how references are chosen.
      geometry: which tokens are sinks, centers, latents and recent.
      rope: of the model.
    """

    compressor: CompressorConfig
    geometry: StoreGeometry
    rope: RopeConfig


class DeltaView(NamedTuple):
    """What compressed requests read in the layers behind an observation layer. B lanes, V places.

    Attributes:
      positions: i32[B, V], tokens to read; -1 for none.
      cos, sin: f32[B, V, D / 2], their rotation.
      places: by layer of the model, where it keeps them; empty for an `up` that is no matrix.
    """

    positions: jax.Array
    cos: jax.Array
    sin: jax.Array
    places: dict[int, Places]


@dataclass(frozen=True)
class SparseLayer:
    """One sparse layer of a cache, as the kernels see it.

    Attributes:
      cache: the cache.
      layer: index in the model.
      spec: how requests are compressed.
      params: of the layer's compressor.
      implementation: handed to the kernels.
    """

    cache: DeltaCache
    layer: int
    spec: StoreSpec
    params: Any
    implementation: Implementation | None

    @property
    def arrays(self) -> DeltaStore:
        near, latent = self.cache.near, self.cache.latent
        return DeltaStore(near.pool.k, near.pool.v, near.table.pages, latent.pool, latent.table.pages)

    @property
    def layout(self) -> DeltaLayout:
        index, layout, geometry = self.cache.layout.index(self.layer), self.cache.layout, self.spec.geometry
        return DeltaLayout(
            near=layout.near.address(index),
            latent=layout.latent.address(index),
            sinks=geometry.sinks,
            step=geometry.step,
            ring=geometry.ring,
        )

    @property
    def num_kv_heads(self) -> int:
        return self.cache.layout.near.num_kv_heads

    def matrix(self, direction: str) -> dict[str, jax.Array] | None:
        """Kernel and perhaps bias of a linear projection, "down" or "up"; None of one that is no matrix."""
        kind = getattr(self.spec.compressor, f"{direction}_type")
        return self.params[direction]["out"] if kind == "linear" else None

    def attend_chunk(
        self, q: jax.Array, k: jax.Array, v: jax.Array, row: jax.Array, start: jax.Array, starts: jax.Array
    ) -> jax.Array:
        """Attention [T, Hq, D] of a chunk, one segment of one compressed request, to what precedes it and to itself.

        Args:
          q, k, v: of the packed chunk, after RoPE.
          row, start: i32[]; the row, and the tokens of its text before the chunk.
          starts: i32[S + 1], of the chunk; only the first segment is not empty.
        """
        layout, dim = self.cache.layout, q.shape[-1]
        size = layout.full.max_entries_per_row * layout.page_size
        positions = jnp.arange(size, dtype=jnp.int32)
        cos, sin = (x[None] for x in rope_cos_sin(self.spec.rope, dim, positions))
        history, length = jnp.asarray(self.spec.geometry.history(start), jnp.int32)[None], start[None]
        k_pages, v_pages = self.read_back(row[None], history, length, positions[None], cos, sin, listed=False)
        held = jnp.stack([jnp.zeros_like(start), start]).reshape(1, 2, 1)
        return prefill_attention(
            q,
            k,
            v,
            k_pages,
            v_pages,
            scratch_table(1, layout.full.max_entries_per_row),
            held,
            (jnp.arange(starts.shape[0] - 1) == 0).astype(jnp.int32),
            starts,
            address=scratch_address(self.num_kv_heads),
            scale=dim**-0.5,
            implementation=self.implementation,
        )

    def attend_view(self, q: jax.Array, rows: jax.Array, history: jax.Array, view: DeltaView) -> jax.Array:
        """Attention [B, Hq, D] from one query a row to the tokens of a view.

        Args:
          rows: i32[B]; history: i32[B], tokens that are not recent.
        """
        common: dict[str, Any] = {
            "num_kv_heads": self.num_kv_heads,
            "scale": q.shape[-1] ** -0.5,
            "implementation": self.implementation,
        }
        up = self.matrix("up")
        if up is not None:
            return delta_attention(
                q,
                self.arrays,
                rows,
                self.cache.layout.ring_row(rows),
                history,
                view.positions,
                view.cos,
                view.sin,
                up["kernel"],
                up.get("bias"),
                view.places.get(self.layer),
                layout=self.layout,
                plain=self.spec.geometry.sinks + self.spec.geometry.ring,
                **common,
            )
        batch, places = view.positions.shape
        length = jnp.full_like(rows, jnp.iinfo(jnp.int32).max)
        k_pages, v_pages = self.read_back(rows, history, length, view.positions, view.cos, view.sin, listed=True)
        columns = k_pages.shape[0] // (batch * self.num_kv_heads)
        return decode_attention(
            q,
            k_pages,
            v_pages,
            scratch_table(batch, columns),
            jnp.full((1, batch + 1, 1), places, jnp.int32),
            jnp.arange(1, batch + 1, dtype=jnp.int32),
            address=scratch_address(self.num_kv_heads),
            indices=jnp.where(view.positions >= 0, jnp.arange(places, dtype=jnp.int32), -1)[:, None],
            **common,
        )

    def read_back(
        self, rows: jax.Array, history: jax.Array, length: jax.Array, positions: jax.Array, cos, sin, *, listed: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Pages of K after RoPE and V of tokens, as `delta_reconstruct` makes them. listed: of `positions` only."""
        up = self.matrix("up")
        weights: dict[str, Any] = {}
        if up is not None:
            weights = {"up": up["kernel"], "up_bias": up.get("bias")}
        else:
            latents = read_latents(self.arrays, rows, history, positions, layout=self.layout)
            compressor = Compressor(self.spec.compressor, latents.dtype)
            weights = {"residual": compressor.apply({"params": self.params}, latents, None, method="decode")}
        return delta_reconstruct(
            self.arrays,
            rows,
            jnp.asarray(self.cache.layout.ring_row(rows)),
            history,
            length,
            cos,
            sin,
            layout=self.layout,
            num_kv_heads=self.num_kv_heads,
            positions=positions if listed else None,
            implementation=self.implementation,
            **weights,
        )


def make_view(
    selected: jax.Array,
    rows: jax.Array,
    history: jax.Array,
    lengths: jax.Array,
    *,
    layers: Sequence[SparseLayer],
    head_dim: int,
) -> DeltaView:
    """The view of sinks, selected history and recent tokens.

    Args:
      selected: i32[B, T], positions; -1 behind the last.
      rows: i32[B].
      history: i32[B], tokens that are not recent.
      lengths: i32[B], tokens of each text; 0 for lanes that read nothing.
      layers: those that will read it.
    """
    spec = layers[0].spec
    geometry = spec.geometry
    positions = view_positions(selected, history, lengths, sinks=geometry.sinks, ring=geometry.ring)
    cos, sin = rope_cos_sin(spec.rope, head_dim, jnp.maximum(positions, 0).reshape(-1))
    shape = (*positions.shape, head_dim // 2)
    places: dict[int, Places] = {}
    if spec.compressor.up_type == "linear":
        found = delta_places(
            layers[0].arrays,
            rows,
            layers[0].cache.layout.ring_row(rows),
            history,
            positions,
            layouts=[each.layout for each in layers],
            implementation=layers[0].implementation,
        )
        places = {each.layer: at for each, at in zip(layers, found, strict=True)}
    return DeltaView(positions, cos.reshape(shape), sin.reshape(shape), places)
