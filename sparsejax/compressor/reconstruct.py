"""What a cache with this compressor gives back: whole texts through encode and decode, as training sees them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from sparsejax.compressor.config import CompressorConfig
from sparsejax.compressor.geometry import is_center
from sparsejax.compressor.modules import Compressor
from sparsejax.compressor.positional import positional_references
from sparsejax.compressor.search import reference_mean, reference_search, soft_weights

SEARCH_RESULT = "reference_search"
"""Name of the search's result for `jax.checkpoint_policies.save_only_these_names`: small, and dear to compute again."""


def reconstruct(config: CompressorConfig, params: Any, x: jax.Array) -> jax.Array:
    """Signals as they are read back: those of sinks and centers unchanged, all others through the compressor.

    Args:
      params: of one layer (`params["layers_3"]`).
      x: [B, T, kv_dim], texts from position 0; its type is that of the computation.

    Returns:
      [B, T, kv_dim] in the type of x.
    """
    length = x.shape[1]
    if length <= config.sink_tokens:
        return x
    compressor = Compressor(config, x.dtype)
    references = references_of(config, x)
    read: Any = compressor.apply({"params": params}, x, references)
    kept = jnp.asarray(_kept(config, length))[:, None]  # [T, 1]
    return jnp.where(kept, x, read)


def differences(config: CompressorConfig, x: jax.Array) -> jax.Array:
    """What is to be compressed of signals: x - r, and 0 where a token is kept as it is. [B, T, kv_dim] likewise."""
    references = references_of(config, x)
    beside = x if references is None else x - references.astype(x.dtype)
    return jnp.where(jnp.asarray(_kept(config, x.shape[1]))[:, None], 0, beside)


def references_of(config: CompressorConfig, x: jax.Array) -> jax.Array | None:
    """The mean reference of every token, [B, T, kv_dim]; None for an autoencoder without references.

    Gradients pass through the values of the references, not through their choice or weights.
    """
    length = x.shape[1]
    if config.references == "e2e":
        sinks = min(config.sink_tokens, length)
        after = positional_references(x[:, sinks:], chunk_size=config.chunk_size, mode=config.ref_mode)
        return None if after is None else jnp.concatenate([x[:, :sinks], after], axis=1)
    sinks, step = config.sink_tokens, config.step
    # A gather of few rows by constants: slices, so that its gradient is one too.
    centers = jnp.concatenate([x[:, :sinks], x[:, sinks::step]], axis=1)  # [B, M, kv_dim]
    features, center_features = (x, centers) if config.cluster_on_kv else (_keys(x), _keys(centers))
    ids, scores = reference_search(
        features,
        center_features,
        jnp.arange(length, dtype=jnp.int32),
        neighbors=config.neighbors,
        sinks=sinks,
        step=step,
        metric=config.cluster_metric,
    )
    ids, scores = checkpoint_name((ids, scores), SEARCH_RESULT)
    weights = soft_weights(scores, config.cluster_temp) if config.cluster_soft_assignment else None
    return reference_mean(centers, ids, weights)


def _kept(config: CompressorConfig, length: int) -> Any:
    """bool[T]: tokens that are not compressed."""
    if config.references == "e2e":
        return jnp.arange(length) < config.sink_tokens
    return is_center(jnp.arange(length), sinks=config.sink_tokens, step=config.step)


def _keys(x: jax.Array) -> jax.Array:
    return x[..., : x.shape[-1] // 2]
