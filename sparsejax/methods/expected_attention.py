"""Expected attention: what queries like those of the prompt would put on a key from the positions that come next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sparsejax.methods.base import Method
from sparsejax.methods.registry import register
from sparsejax.methods.slots import LayerSlots
from sparsejax.validation import flag, number, whole

MAX_FUTURE_TOKENS = 1 << 16

_LAST_POSITION = int(jnp.iinfo(jnp.int32).max)
_EXACT = jax.lax.Precision.HIGHEST


@register
@dataclass(frozen=True)
class ExpectedAttention(Method):
    """Softmax over the keys of E[exp(q.k / sqrt(D))] for normal queries, averaged over the group, times the value norm.

    Queries before RoPE are taken as normal with the mean mu and the covariance S of the prompt's (without its first
    ones, whose hidden states are outliers). R is the rotation matrix averaged over the next `future_tokens` positions;
    with m = R mu and C = R S R^T a key k has the logit m.k / sqrt(D) + k^T C k / (2 D). Query-agnostic.

    Tokens at the first `skipped_queries` positions take no part in the softmax, as they dominate it; as many sinks are
    protected by default.

    Attributes:
      future_tokens: positions after the text that the rotation is averaged over, 1 to 65,536.
      skipped_queries: first queries of the text that are left out of the moments.
      use_covariance: False: the mean query only.
      use_vnorm: weigh by the L2 norm of the value.
      epsilon: added to the probability before it is weighed.
    """

    name: ClassVar[str] = "expected_attention"
    summary: ClassVar[str] = "Attention expected from future queries, by the statistics of the prompt's."
    source: ClassVar[str] = "Devoto et al. 2025, Expected Attention, arXiv:2510.00636"
    records: ClassVar[frozenset[str]] = frozenset({"moments"})
    default_sink_tokens: ClassVar[int] = 4

    future_tokens: int = 512
    skipped_queries: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "future_tokens", whole("future_tokens", self.future_tokens, 1, MAX_FUTURE_TOKENS))
        object.__setattr__(self, "skipped_queries", whole("skipped_queries", self.skipped_queries, 0, _LAST_POSITION))
        flag("use_covariance", self.use_covariance)
        flag("use_vnorm", self.use_vnorm)
        object.__setattr__(self, "epsilon", number("epsilon", self.epsilon, 0.0))

    def record_from(self, text_length: int, window_tokens: int) -> int:
        del window_tokens
        return min(self.skipped_queries, text_length - 1)

    def layer_scores(self, layer: LayerSlots) -> jax.Array:
        mean, covariance = self._query_statistics(layer)
        k = layer.k.astype(jnp.float32)
        dim = k.shape[-1]
        counted = layer.live & (layer.position >= self.skipped_queries)

        def probabilities(group: jax.Array) -> jax.Array:
            """f32[K, H, S]: of one query head of each KV head."""
            logits = jnp.einsum("khsd,khd->khs", k, mean[:, :, group], precision=_EXACT) / jnp.sqrt(float(dim))
            if self.use_covariance:
                spread = jnp.einsum("khsd,khde->khse", k, covariance[:, :, group], precision=_EXACT)
                logits += jnp.sum(spread * k, axis=-1) / (2 * dim)
            total = jax.nn.logsumexp(logits, axis=-1, where=counted, keepdims=True)
            return jnp.exp(jnp.minimum(logits - total, 0.0))

        # One query head at a time: the products of all keys with a covariance are as large as the keys.
        scores = jnp.mean(jax.lax.map(probabilities, jnp.arange(layer.group_size, dtype=jnp.int32)), axis=0)
        if self.use_vnorm:
            scores = (scores + self.epsilon) * jnp.linalg.norm(layer.v.astype(jnp.float32), axis=-1)
        return scores

    def _query_statistics(self, layer: LayerSlots) -> tuple[jax.Array, jax.Array]:
        """Mean f32[K, H, G, D] and covariance f32[K, H, G, D, D] of the queries, rotated to the positions to come."""
        moments = layer.moments
        if moments is None:
            raise ValueError("the view was gathered without moments of the queries; this method needs them.")
        count = jnp.maximum(moments.count, 1.0)[:, None, None]
        mean = moments.first / count  # [K, Hq, D]
        covariance = moments.second / count[..., None] - mean[..., :, None] * mean[..., None, :]
        future = layer.text_length[:, None] + jnp.arange(self.future_tokens, dtype=jnp.int32)
        cos, sin = (jnp.mean(part, axis=1)[:, None, :] for part in layer.rope(future))  # [K, 1, D / 2]
        mean = _rotate(mean, cos, sin)
        cos, sin = cos[:, :, None], sin[:, :, None]
        covariance = _rotate(_rotate(covariance, cos, sin).swapaxes(-1, -2), cos, sin)
        heads = (mean.shape[0], -1, layer.group_size)
        return mean.reshape(*heads, *mean.shape[2:]), covariance.reshape(*heads, *covariance.shape[2:])


def _rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the last axis of x [..., D] by cos, sin [..., D / 2], half-split layout."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
