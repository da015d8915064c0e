"""Where the tokens of a DeltaKV request are, in one layer whose cache is compressed (arXiv:2602.08005).

A row has `history` tokens that have left the recent window, at positions 0 .. history - 1, and recent ones after them:

| token             | kept as                    | where                                                 |
|-------------------|----------------------------|-------------------------------------------------------|
| center in history | K before RoPE and V, exact | near pool, row rows[b], slot = its ordinal            |
| other in history  | latent z and K references  | latent pool, row rows[b], slot = its ordinal          |
| recent            | K before RoPE and V, exact | near pool, row recent_rows[b], slot = position % ring |

A latent is read back as `up(z) + mean of its K references`, which are centers of the same row; keys are rotated by
their own position when they are read. Where a token is follows from its position (`pallas_kernels.centers`).

The two pools have tables of their own, each with one entry for all layers and heads ("shared").
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.centers import center_ordinals, is_center, latent_ordinals
from pallas_kernels.checks import check_integer, check_pool, check_shape, check_table_heads
from pallas_kernels.latents import LatentPages, check_latents
from pallas_kernels.paging import PageAddress


class DeltaStore(NamedTuple):
    """The arrays; a pytree. All layers share them.

    Attributes:
      k_pages, v_pages: [P, page, D], the near pool; keys before RoPE.
      near_table: i32[1, R', 1, M].
      latents: the latent pool.
      latent_table: i32[1, R, 1, ML].
    """

    k_pages: jax.Array
    v_pages: jax.Array
    near_table: jax.Array
    latents: LatentPages
    latent_table: jax.Array


class Places(NamedTuple):
    """Where listed tokens are in one layer: rows of the pools seen as [P * page, n].

    Attributes:
      near: i32[B, K, T] rows of KV head 0 whose mean is the token's reference; for a token that is kept exactly its own
        row, K times; -1 for unused tokens.
      latent: i32[B, T] row of the token's latent; -1 if it has none or is unused.
    """

    near: jax.Array
    latent: jax.Array


@dataclass(frozen=True)
class DeltaLayout:
    """How positions become places in one layer; static, hashable.

    Attributes:
      near: the layer's address in the near pool, as `CacheLayout.address` of a shared cache of the sparse layers.
      latent: the layer's address in the latent pool: PageAddress(0, Ls, layer, 1).
      sinks, step: geometry of the centers.
      ring: slots of a row of recent tokens; most tokens that can be recent at a time.
    """

    near: PageAddress
    latent: PageAddress
    sinks: int
    step: int
    ring: int

    def split_layer(self) -> tuple["DeltaLayout", jax.Array, jax.Array]:
        """(what the layers have in common, this layer's part of `near`, of `latent`); see `PageAddress.split_layer`."""
        near, near_layer = self.near.split_layer()
        latent, latent_layer = self.latent.split_layer()
        return replace(self, near=near, latent=latent), near_layer, latent_layer

    def join_layer(self, near_layer, latent_layer) -> "DeltaLayout":
        """The layout of the layer that `split_layer` gave, as arrays or a kernel's references to them."""
        return replace(self, near=self.near.join_layer(near_layer), latent=self.latent.join_layer(latent_layer))


def view_positions(selected: jax.Array, history: jax.Array, lengths: jax.Array, *, sinks: int, ring: int) -> jax.Array:
    """Positions that a decode step reads: those selected from the history, the sinks, and all recent tokens.

    Layers of a group share it.

    Args:
      selected: i32[B, T] positions in [sinks, history), below 0: unused.
      history: i32[B] tokens that are not recent.
      lengths: i32[B] tokens of each row, at most history + ring; 0 for padding.

    Returns:
      i32[B, T + sinks + ring], -1 where nothing is read. `selected` is first, so that no block of `delta_attention`
      holds some of both: one without a latent has nothing to project.
    """
    held, last = history[:, None], lengths[:, None]
    sink = jnp.arange(sinks, dtype=jnp.int32)[None]
    recent = held + jnp.arange(ring, dtype=jnp.int32)[None]
    return jnp.concatenate(
        [selected, jnp.where(sink < jnp.minimum(held, last), sink, -1), jnp.where(recent < last, recent, -1)], axis=1
    )


def tokens_at(
    rows: jax.Array, recent_rows: jax.Array, history: jax.Array, positions: jax.Array, *, layout: DeltaLayout
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where listed tokens are; all arguments broadcast, and the arithmetic runs inside kernels, too.

    Returns:
      (compressed bool: has a latent; row i32: near row that its references or itself are in; slot i32: its latent's
      slot if it has one, else its own in that row). Unused positions, below 0, count as center 0.
    """
    sinks, step = layout.sinks, layout.step
    recent = positions >= history
    position = jnp.maximum(positions, 0)
    compressed = ~(recent | is_center(position, sinks=sinks, step=step))
    own = jnp.where(recent, position % layout.ring, center_ordinals(position, sinks=sinks, step=step))
    slot = jnp.where(compressed, latent_ordinals(position, sinks=sinks, step=step), own)
    return compressed, jnp.where(recent, recent_rows, rows), slot


def check_store(store: DeltaStore, layout: DeltaLayout, num_kv_heads: int | None) -> None:
    """Raises unless the arrays fit each other and the layout."""
    check_pool(store.k_pages, store.v_pages)
    check_latents(store.latents)
    for name in ("near_table", "latent_table"):
        table = getattr(store, name)
        check_shape(name, table, (1, None, 1, None))
        check_integer(**{name: table})
    if num_kv_heads is not None:
        check_table_heads("near_table", 1, layout.near, num_kv_heads)
    if layout.near.table_layer or layout.latent.table_layer:
        raise ValueError("the tables of a DeltaStore are shared by the layers: table_layer must be 0 in both addresses")
    if layout.sinks < 0 or layout.step < 1 or layout.ring < 1:
        raise ValueError(f"sinks must be at least 0, step and ring at least 1, got {layout}")


def check_rows(batch: int, **arrays: jax.Array) -> None:
    """Raises unless every array is i32[batch]."""
    for name, array in arrays.items():
        check_shape(name, array, (batch,))
    check_integer(**arrays)


def check_rotation(cos: jax.Array, sin: jax.Array, batch: int, tokens: int | None, dim: int) -> None:
    """Raises unless cos and sin are f32[batch, tokens, D / 2]."""
    if dim % 2:
        raise ValueError(f"the head dimension must be even for rotary embedding, got {dim}")
    check_shape("cos", cos, (batch, tokens, dim // 2))
    check_shape("sin", sin, tuple(cos.shape))
    if cos.dtype != jnp.float32 or sin.dtype != jnp.float32:
        raise TypeError(f"cos and sin must be float32, got {cos.dtype} and {sin.dtype}")


def check_up(up: jax.Array, up_bias: jax.Array | None, store: DeltaStore, num_kv_heads: int) -> None:
    """Raises unless `up` [d, 2*H*D] and its bias [2*H*D] fit the pools."""
    features = 2 * num_kv_heads * store.k_pages.shape[2]
    check_shape("up", up, (store.latents.size, features))
    if up_bias is not None:
        check_shape("up_bias", up_bias, (features,))
