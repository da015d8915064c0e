"""Decode attention over tokens of a DeltaKV cache, whose keys and values are never written.

One new token per request attends to a list of positions: sinks, tokens selected from the history and recent ones
(`view_positions`). Only keys need the up-projection of every token. Values do not: with probabilities p and latents z
`sum p_i (z_i @ up + r_i) = (sum p_i z_i) @ up + sum p_i r_i`, one product a head. Logits and partial sums pass through
memory; latents that are codes are unpacked once for all heads.
"""

import functools
from typing import Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels import online_softmax
from pallas_kernels.checks import check_integer, check_query, check_scale, check_shape, query_group
from pallas_kernels.delta_attention_triton import DeltaTile, default_tile, delta_attention_triton
from pallas_kernels.delta_places import delta_places
from pallas_kernels.delta_reference import read_back_reference
from pallas_kernels.delta_store import (
    DeltaLayout,
    DeltaStore,
    Places,
    check_rotation,
    check_rows,
    check_store,
    check_up,
)
from pallas_kernels.delta_store_xla import latents_at, read_back
from pallas_kernels.dispatch import Implementation, resolve


@overload
def delta_attention(
    q: jax.Array,
    store: DeltaStore,
    rows: jax.Array,
    recent_rows: jax.Array,
    history: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    up: jax.Array,
    up_bias: jax.Array | None = ...,
    places: Places | None = ...,
    *,
    layout: DeltaLayout,
    num_kv_heads: int,
    scale: float,
    plain: int = ...,
    return_lse: Literal[False] = ...,
    tile: DeltaTile | None = ...,
    implementation: Implementation | None = ...,
    interpret: bool | None = ...,
) -> jax.Array: ...


@overload
def delta_attention(
    q: jax.Array,
    store: DeltaStore,
    rows: jax.Array,
    recent_rows: jax.Array,
    history: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    up: jax.Array,
    up_bias: jax.Array | None = ...,
    places: Places | None = ...,
    *,
    layout: DeltaLayout,
    num_kv_heads: int,
    scale: float,
    plain: int = ...,
    return_lse: Literal[True],
    tile: DeltaTile | None = ...,
    implementation: Implementation | None = ...,
    interpret: bool | None = ...,
) -> tuple[jax.Array, jax.Array]: ...


def delta_attention(
    q: jax.Array,
    store: DeltaStore,
    rows: jax.Array,
    recent_rows: jax.Array,
    history: jax.Array,
    positions: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    up: jax.Array,
    up_bias: jax.Array | None = None,
    places: Places | None = None,
    *,
    layout: DeltaLayout,
    num_kv_heads: int,
    scale: float,
    plain: int = 0,
    return_lse: bool = False,
    tile: DeltaTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attends from one query per request to the listed tokens of its row.

    A compressed token is `up(z) + mean of its references`; its key is rotated by cos, sin of its place in the list. For
    an `up` that is no matrix use `delta_reconstruct` with `positions` and `residual`, and `decode_attention`.

    Args:
      q: [B, Hq, D] after RoPE; query heads h*G .. h*G+G-1 use KV head h.
      store, layout: where the tokens are, see `delta_store`.
      rows, recent_rows: i32[B] table rows of the history (in both tables) and of the recent tokens.
      history: i32[B] tokens that are not recent.
      positions: i32[B, V] tokens to read, all of which must be held; below 0: unused. One listed twice counts twice.
        All layers of a group of followers may share it.
      cos, sin: f32[B, V, D/2] rotation of the listed positions.
      up: [d, 2*H*D] the linear up-projection, at the precision of the pools.
      up_bias: [2*H*D] or None.
      places: what `delta_places` found for this layer; None: it is looked up.
      num_kv_heads: H.
      scale: factor of the scores, usually D**-0.5.
      plain: so many of the last listed tokens have no latent (sinks, centers, recent tokens; the end of what
        `view_positions` gives). The kernel then neither projects anything for their keys nor fetches these once a
        reference. Not checked: a token of these that has a latent is read as its first reference, by the kernel alone.
      return_lse: also return the log-sum-exp of the scaled scores.
      tile: tile sizes of the kernel, for tuning.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      out [B, Hq, D] in q's dtype, and with `return_lse` f32[B, Hq] (natural logarithm). A request that reads nothing
      has out 0 and log-sum-exp EMPTY_LSE.

    Raises:
      ValueError, TypeError: arguments that do not fit; among them an `up` that is no matrix.
    """
    check_store(store, layout, num_kv_heads)
    batch, dim = q.shape[0], store.k_pages.shape[2]
    check_query(q, None, dim)
    check_scale(scale)
    query_group(q.shape[1], num_kv_heads)
    check_rows(batch, rows=rows, recent_rows=recent_rows, history=history)
    check_shape("positions", positions, (batch, None))
    check_integer(positions=positions)
    check_rotation(cos, sin, batch, positions.shape[1], dim)
    check_up(up, up_bias, store, num_kv_heads)
    if places is not None:
        check_shape("places.near", places.near, (batch, store.latents.reference.shape[2], positions.shape[1]))
        check_shape("places.latent", places.latent, tuple(positions.shape))
        check_integer(**{f"places.{name}": array for name, array in places._asdict().items()})
    if not 0 <= plain <= positions.shape[1]:
        raise ValueError(f"plain must be between 0 and the {positions.shape[1]} listed tokens, got {plain}")
    implementation, interpret = resolve(implementation, interpret)
    dtype = q.dtype
    up = up.astype(store.k_pages.dtype)
    common = layout.split_layer()[0]
    if places is None:
        (places,) = delta_places(
            store, rows, recent_rows, history, positions, layouts=[layout], implementation=implementation,
            interpret=interpret,
        )  # fmt: skip
    if 0 in (batch, positions.shape[1]):
        out, lse = jnp.zeros_like(q), jnp.full(q.shape[:2], online_softmax.EMPTY_LSE, jnp.float32)
    elif implementation == "xla":
        out, lse = _attention_xla(
            q, store, places, cos, sin, up, up_bias, layout=common, heads=num_kv_heads, scale=scale
        )
    else:
        # Codes are unpacked once for all heads.
        unpacked = None if store.latents.scale is None else latents_at(store, places.latent)
        out, lse = delta_attention_triton(
            q.astype(store.k_pages.dtype), store, unpacked, places, cos, sin, up, up_bias, layout=common,
            heads=num_kv_heads, scale=scale, plain=plain, tile=tile or default_tile(store.k_pages), interpret=interpret,
        )  # fmt: skip
    out = out.astype(dtype)
    return (out, lse) if return_lse else out


def delta_attention_reference(
    q, store, rows, recent_rows, history, positions, cos, sin, up, up_bias=None, *, layout: DeltaLayout,
    num_kv_heads: int, scale: float,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The meaning of `delta_attention` (arguments concrete): (out f32[B, Hq, D], lse f32[B, Hq])."""
    k, v = read_back_reference(
        store, rows, recent_rows, history, positions, cos, sin, up, up_bias, layout=layout, num_kv_heads=num_kv_heads
    )
    return _attend(q, jnp.asarray(k), jnp.asarray(v), positions >= 0, scale)


def _attend(q, k, v, live, scale):
    """(out f32[B, Hq, D], lse f32[B, Hq]) of k, v f32[B, V, H, D] where live bool[B, V]."""
    batch, q_heads, dim = q.shape
    q = q.astype(jnp.float32).reshape(batch, k.shape[2], -1, dim)
    live = live[:, None, None]  # [B, 1, 1, V]
    scores = jnp.einsum("bhgd,bvhd->bhgv", q, k, precision="highest") * scale
    scores = jnp.where(live, scores, -jnp.inf)
    lse = jnp.where(live.any(-1), jax.nn.logsumexp(scores, axis=-1), online_softmax.EMPTY_LSE)
    weights = jnp.where(live, jnp.exp(scores - lse[..., None]), 0.0)
    out = jnp.einsum("bhgv,bvhd->bhgd", weights, v, precision="highest")
    return out.reshape(batch, q_heads, dim), lse.reshape(batch, q_heads)


@functools.partial(jax.jit, static_argnames=("layout", "heads", "scale"))
def _attention_xla(q, store, places, cos, sin, up, up_bias, *, layout, heads, scale):
    k, v = read_back(store, places, cos, sin, up, up_bias, None, layout=layout, heads=heads)
    return _attend(q, k, v, places.near[:, 0] >= 0, scale)
