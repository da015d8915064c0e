"""Which layers should read everything, so that the others can follow the tokens that they choose.

Queries at the end of sample texts attend as decode steps do. For every pair of layers it is measured how much of one
layer's attention goes to the tokens that the other would choose; dynamic programming then finds the full-attention
layers that leave the followers the most of their attention.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation, PageAddress, prefill_attention
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods.selection import candidates, chosen_count
from sparsejax.models import Decoder, ModelConfig

SHORTEST = 256  # texts are padded to powers of two from here on, for each length costs a compilation


@dataclass(frozen=True)
class LayerChoice:
    """Full-attention layers for a model.

    Attributes:
      layers: ascending, layer 0 among them.
      coverage: share of their attention that the followers keep, mean over all layers that follow; 1 if none does.
    """

    layers: tuple[int, ...]
    coverage: float


def measure_coverage(
    config: ModelConfig,
    params: Any,
    texts: Iterable[Sequence[int]],
    *,
    top_tokens: int | float,
    sinks: int = 4,
    recent: int = 32,
    queries: int = 16,
    implementation: Implementation | None = None,
) -> np.ndarray:
    """How much of layer j's attention goes to the tokens that layer i chooses.

    Args:
      config, params: the model.
      texts: token ids of each; the last `queries` tokens of a text are the queries.
      top_tokens: tokens to choose, or the fraction of the candidates.
      sinks, recent: tokens that are no candidates, for they are always read.

    Returns:
      f64[L, L]: element (i, j) is the attention, over candidates alone, that the query heads of layer j give to the
      tokens with the largest probabilities of layer i; mean over heads, queries and texts.

    Raises:
      InvalidArgumentError: no text, or one that is too short for its queries to choose from.
    """
    total, count = np.zeros((config.num_layers, config.num_layers)), 0
    for text in texts:
        if len(text) < queries + sinks + recent + 1:
            raise InvalidArgumentError(
                f"a text must have more than {queries + sinks + recent} tokens to calibrate on, got {len(text)}."
            )
        size = max(SHORTEST, 1 << (len(text) - 1).bit_length())
        tokens = np.zeros(size, np.int32)
        tokens[: len(text)] = text
        decoder: Any = Decoder(config, params["embed"].dtype)
        run = _coverage(decoder, queries, implementation)
        counted = (top_tokens, 0.0) if isinstance(top_tokens, int) else (0, top_tokens)
        total += np.asarray(run(params, tokens, len(text), sinks, recent, *counted), np.float64)
        count += 1
    if not count:
        raise InvalidArgumentError("there is no text to calibrate on.")
    return total / count


@functools.lru_cache(maxsize=4)
def _coverage(decoder: Decoder, queries: int, implementation: Implementation | None) -> Callable[..., jax.Array]:
    """(params, tokens i32[T], length, sinks, recent, count, fraction) -> f32[L, L] of one text."""
    config = decoder.config

    def run(params, tokens, length, sinks, recent, count, fraction):
        at = length - queries + jnp.arange(queries, dtype=jnp.int32)
        first, last = candidates(at + 1, sinks, recent)
        chosen = chosen_count(last - first, jnp.int32(count), jnp.float32(fraction))
        slot = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        live = (slot >= first[:, None]) & (slot < last[:, None])  # [N, T]

        def attend(layer, q, k, v, k_pre_rope, carry):
            del layer, k_pre_rope
            out = _causal(q, k, v, implementation)
            asked = q[at].astype(jnp.float32).reshape(queries, config.num_kv_heads, -1, config.head_dim)
            logits = jnp.einsum("nhgd,thd->nhgt", asked, k.astype(jnp.float32)) * config.head_dim**-0.5
            p = jax.nn.softmax(jnp.where(live[:, None, None], logits, -jnp.inf), axis=-1)
            most = jnp.where(live, p.max(axis=(1, 2)), -1.0)
            least = jnp.take_along_axis(-jnp.sort(-most, axis=1), jnp.maximum(chosen - 1, 0)[:, None], axis=1)
            return out, (*carry, ((most >= least) & live, p.mean(axis=(1, 2))))

        positions = jnp.arange(tokens.shape[0], dtype=jnp.int32)
        lengths = jnp.maximum(positions + 1, length)
        _, layers = decoder.apply(
            {"params": params}, tokens, positions, (), attend, rope_lengths=lengths, method="hidden_states"
        )
        sets, masses = (jnp.stack(each) for each in zip(*layers, strict=True))  # [L, N, T]
        return jnp.einsum("int,jnt->ij", sets.astype(jnp.float32), masses) / queries

    return jax.jit(run)


def _causal(q: jax.Array, k: jax.Array, v: jax.Array, implementation: Implementation | None) -> jax.Array:
    """Attention of one whole text to itself: [T, Hq, D]."""
    pool = jnp.zeros((1, 1, k.shape[2]), k.dtype)
    none, one = jnp.zeros((1, 1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    return prefill_attention(
        q,
        k,
        v,
        pool,
        pool,
        none[..., None],
        none,
        one,
        jnp.array([0, q.shape[0]], jnp.int32),
        address=PageAddress(0, 1, 0, 1),
        scale=q.shape[-1] ** -0.5,
        implementation=implementation,
    )


def choose_layers(coverage: np.ndarray, count: int) -> LayerChoice:
    """The `count` full-attention layers, layer 0 among them, that cover most of the other layers' attention.

    Every other layer follows the last full layer before it.

    Raises:
      InvalidArgumentError: count is not from 1 to the number of layers.
    """
    layers = len(coverage)
    if not 1 <= count <= layers:
        raise InvalidArgumentError(f"the number of full-attention layers must be from 1 to {layers}, got {count}.")
    # gain[i, j]: what layers i+1 .. j-1 keep when they follow layer i and layer j is the next full one, or the end.
    gain = np.full((layers, layers + 1), -np.inf)
    for i in range(layers):
        gain[i, i + 1 :] = np.concatenate([[0.0], np.cumsum(coverage[i, i + 1 :])])
    best, before = np.full((count, layers), -np.inf), np.zeros((count, layers), int)
    best[0, 0] = 0.0
    for place in range(1, count):
        totals = best[place - 1][:, None] + gain[:, :layers]  # [layer before, layer]
        before[place], best[place] = totals.argmax(axis=0), totals.max(axis=0)
    chosen = [int((best[-1] + gain[:, layers]).argmax())]
    kept = float((best[-1] + gain[:, layers]).max())
    for place in range(count - 1, 0, -1):
        chosen.insert(0, int(before[place, chosen[0]]))
    return LayerChoice(tuple(chosen), kept / (layers - count) if count < layers else 1.0)


def format_coverage(coverage: np.ndarray) -> str:
    """The matrix in percent: a line for each layer that chooses, a column for each layer after it."""
    layers = len(coverage)
    lines = ["chosen by | attention kept in layer, %", "          |" + "".join(f"{j:4d}" for j in range(layers))]
    for i, row in enumerate(coverage):
        cells = "".join("    " if j < i else f"{100 * value:4.0f}" for j, value in enumerate(row))
        lines.append(f"{i:9d} |{cells}")
    return "\n".join(lines)


def save_choice(path: str | Path, choice: LayerChoice, coverage: np.ndarray, config: ModelConfig, **asked: Any) -> None:
    """Writes a choice as JSON, with what it was made of and the model's sizes."""
    sizes = {name: getattr(config, name) for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads")}
    record = {**asdict(choice), "model": sizes, "asked": asked, "matrix": coverage.round(6).tolist()}
    Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")
