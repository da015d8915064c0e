"""Compactor: keys that are hard to express by the others, and keys that their neighbourhood attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.invert_spd import MAX_SIZE, invert_spd
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods.base import Method
from sparsejax.methods.registry import register
from sparsejax.methods.slots import LayerSlots
from sparsejax.validation import number, whole

ATTENTION_BLOCK = 128
"""Tokens of a block within which the recorded attention mass is computed, without a causal mask."""

_SKETCH_SEED = 42
_EPSILON = 1e-3
_EXACT = jax.lax.Precision.HIGHEST


@register
@dataclass(frozen=True)
class Compactor(Method):
    """z(block attention) + blend * z(leverage), query-agnostic.

    Block attention is recorded during prefill: in each block of 128 tokens, what all queries put on a key (after RoPE,
    scale 1, no causal mask), summed over the queries and the query heads of the group; standardised over the heads and
    tokens of a row. The leverage score of a key before RoPE is x^T (X^T X + regularization I)^-1 x, where X are the
    keys of its chunk, sketched to `sketch_size` numbers by a fixed Gaussian matrix and centred; standardised over the
    heads and tokens of the chunk.

    A chunk is a run of `chunk_size` held tokens of a head in the order of the text, however the slots lie. While
    nothing was evicted these are the chunks of the text. When a prompt is compressed between its prefill chunks, the
    survivors form chunks of their own: of parts of the text that little is left of, all leverages would be near 1,
    which tells nothing.

    The published engine protects the first 16 tokens and the last 64, which its budget counts although it is derived
    from the others. Here the budget is what is kept: by default the first 16 tokens, and the last 64 but at most a
    quarter of the budget, are paid from it.

    Attributes:
      sketch_size: columns of the Gaussian matrix, 1 to 128.
      chunk_size: tokens of a chunk, a multiple of 128; prefill chunks are multiples of it.
      regularization: added to the diagonal, positive.
      blend: weight of the leverage. The published engine's 0.5; the paper has 0.3.
    """

    name: ClassVar[str] = "compactor"
    summary: ClassVar[str] = "Leverage scores of keys blended with the attention inside blocks."
    source: ClassVar[str] = "Chari and Van Durme 2025, Compactor, arXiv:2507.08143"
    records: ClassVar[frozenset[str]] = frozenset({"blocks"})
    between_chunks: ClassVar[bool] = True
    default_budget_rule: ClassVar[str] = "layer"
    default_sink_tokens: ClassVar[int] = 16

    sketch_size: int = 48
    chunk_size: int = 512
    regularization: float = 5e-3
    blend: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "sketch_size", whole("sketch_size", self.sketch_size, 1, MAX_SIZE))
        object.__setattr__(self, "chunk_size", whole("chunk_size", self.chunk_size, ATTENTION_BLOCK))
        if self.chunk_size % ATTENTION_BLOCK:
            raise InvalidArgumentError(f"chunk_size must be a multiple of {ATTENTION_BLOCK}, got {self.chunk_size}.")
        object.__setattr__(self, "regularization", number("regularization", self.regularization, 0.0, above=True))
        object.__setattr__(self, "blend", number("blend", self.blend, 0.0))

    @property
    def chunk_alignment(self) -> int:
        return self.chunk_size

    def default_recent_tokens(self, budget: int, window_tokens: int) -> int:
        del window_tokens
        return min(64, budget // 4)

    def layer_scores(self, layer: LayerSlots) -> jax.Array:
        attention = _standardise(layer.score, layer.live, axes=(1, 2))
        sketch = jnp.asarray(sketch_matrix(layer.k.shape[-1], self.sketch_size))
        x = jnp.einsum("khsd,dm->khsm", layer.k_before_rope(), sketch, precision=_EXACT)
        return attention + self.blend * self._leverage(x, layer)

    def _leverage(self, x: jax.Array, layer: LayerSlots) -> jax.Array:
        """f32[K, H, S]: the standardised leverage scores of sketched keys f32[K, H, S, m]."""
        if layer.in_text_order:
            return _chunk_leverage(x, layer.live, self.chunk_size, self.regularization)
        order = jnp.argsort(jnp.where(layer.live, layer.position, jnp.iinfo(jnp.int32).max), axis=-1, stable=True)
        leverage = _chunk_leverage(
            jnp.take_along_axis(x, order[..., None], axis=2),
            jnp.take_along_axis(layer.live, order, axis=2),
            self.chunk_size,
            self.regularization,
        )
        return jnp.take_along_axis(leverage, jnp.argsort(order, axis=-1), axis=2)


def sketch_matrix(dim: int, size: int) -> np.ndarray:
    """f32[dim, size]: independent normal numbers of variance 1 / size, the same for all layers, heads and requests."""
    normal = np.random.default_rng(_SKETCH_SEED).standard_normal((dim, size), dtype=np.float32)
    return normal / np.sqrt(np.float32(size))


def _chunk_leverage(x: jax.Array, live: jax.Array, chunk: int, regularization: float) -> jax.Array:
    """f32[K, H, S]: standardised leverage scores; the live slots lie at the front, in the order of the text."""
    rows, heads, slots, size = x.shape
    chunk = min(chunk, slots)
    chunks = -(-slots // chunk)
    padding = chunks * chunk - slots
    x = jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))).reshape(rows, heads, chunks, chunk, size)
    live = jnp.pad(live, ((0, 0), (0, 0), (0, padding))).reshape(rows, heads, chunks, chunk)
    count = jnp.maximum(jnp.sum(live, axis=-1, dtype=jnp.float32), 1.0)[..., None]
    # Slots that are not live hold zeros, so they add nothing to the sum.
    mean = jnp.sum(x, axis=-2) / count
    x = jnp.where(live[..., None], x - mean[..., None, :], 0.0)
    gram = jnp.einsum("khcti,khctj->khcij", x, x, precision=_EXACT)
    gram += regularization * jnp.eye(size, dtype=jnp.float32)
    inverse = invert_spd(gram.reshape(-1, size, size)).reshape(gram.shape)
    leverage = jnp.sum(jnp.einsum("khcti,khcij->khctj", x, inverse, precision=_EXACT) * x, axis=-1)
    leverage = _standardise(jnp.maximum(leverage, 0.0), live, axes=(1, 3))
    return leverage.reshape(rows, heads, -1)[..., :slots]


def _standardise(values: jax.Array, live: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    """f32: zero mean and unit variance over the live slots along `axes`; nearly equal values all become about 0."""
    count = jnp.maximum(jnp.sum(live, axis=axes, keepdims=True, dtype=jnp.float32), 1.0)
    mean = jnp.sum(jnp.where(live, values, 0.0), axis=axes, keepdims=True) / count
    centred = jnp.where(live, values - mean, 0.0)
    variance = jnp.sum(centred * centred, axis=axes, keepdims=True) / count
    return centred * jax.lax.rsqrt(variance + _EPSILON * _EPSILON)
