"""Loss, update and greedy answers of a dense decoder over whole sequences: the jitted part of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax.models import Decoder, ModelConfig, dense_causal_attend
from sparsejax.models.decoder import Attend
from train.data import ANSWER, CONTEXT

LM_WEIGHT = 0.2
"""Weight of the language-model loss on running text; answers weigh 1."""


def causal_attend(batch: int, dtype: Any) -> Attend:
    """Dense causal attention over `batch` equal sequences: cuDNN's in 16 bits on a GPU, else plain XLA."""
    if jax.default_backend() != "gpu" or jnp.dtype(dtype).itemsize != 2:
        return dense_causal_attend(batch)

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, k_pre_rope: jax.Array, cache: Any):
        del layer, k_pre_rope
        split = [x.reshape(batch, -1, *x.shape[1:]) for x in (q, k, v)]  # [B, T, H, D]
        out = jax.nn.dot_product_attention(*split, is_causal=True, implementation="cudnn")
        return out.reshape(q.shape), cache

    return attend


def forward(config: ModelConfig, params: Any, tokens: jax.Array, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Logits f32[B, T, V] of sequences `tokens` i32[B, T]; parameters are cast to `dtype` where they are used."""
    batch, length = tokens.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    logits, _ = Decoder(config, dtype).apply(
        {"params": params}, tokens.reshape(-1), positions, None, causal_attend(batch, dtype)
    )
    return logits.reshape(batch, length, -1)


class Metrics(NamedTuple):
    """Means over one batch: loss on answer tokens, loss on running text, fraction of answer tokens predicted right."""

    answer_loss: jax.Array
    text_loss: jax.Array
    answer_accuracy: jax.Array


def loss(config: ModelConfig, params: Any, tokens: jax.Array, kinds: jax.Array) -> tuple[jax.Array, Metrics]:
    """Answer loss + LM_WEIGHT x text loss of a batch, arrays as `train.data.Batch` ([B, T])."""
    logits = forward(config, params, tokens)
    targets = jnp.roll(tokens, -1, axis=1)  # the last place of a row is never a target: its kind is PADDING
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = jnp.argmax(logits, axis=-1) == targets

    def mean(values: jax.Array, kind: int) -> jax.Array:
        chosen = kinds == kind
        return jnp.sum(values * chosen) / jnp.maximum(jnp.sum(chosen), 1)

    metrics = Metrics(mean(losses, ANSWER), mean(losses, CONTEXT), mean(right, ANSWER))
    return metrics.answer_loss + LM_WEIGHT * metrics.text_loss, metrics


@dataclass(frozen=True)
class Optimizer:
    """AdamW with gradient clipping; the learning rate is handed to each update.

    Attributes:
        weight_decay: decoupled decay of matrices; norms and embeddings are not decayed.
        clip: largest global norm of a gradient.
    """

    weight_decay: float = 0.05
    clip: float = 1.0

    def transformation(self) -> optax.GradientTransformation:
        """Everything but the learning rate."""

        def decayed(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(lambda path, leaf: path[-1].key == "kernel", params)

        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(b1=0.9, b2=0.98),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
        )


class TrainState(NamedTuple):
    """Parameters (float32 master copy) and the optimizer's state."""

    params: Any
    moments: Any


def make_train_step(
    config: ModelConfig, optimizer: Optimizer
) -> Callable[[TrainState, jax.Array, jax.Array, jax.Array], tuple[TrainState, Metrics]]:
    """A jitted `(state, tokens i32[B, T], kinds u8[B, T], learning_rate f32[]) -> (state, Metrics)`.

    The state is donated.
    """
    transformation = optimizer.transformation()

    def step(state: TrainState, tokens: jax.Array, kinds: jax.Array, learning_rate: jax.Array):
        grads, metrics = jax.grad(lambda params: loss(config, params, tokens, kinds), has_aux=True)(state.params)
        updates, moments = transformation.update(grads, state.moments, state.params)
        params = jax.tree.map(lambda param, update: param - learning_rate * update, state.params, updates)
        return TrainState(params, moments), metrics

    return jax.jit(step, donate_argnums=0)


@partial(jax.jit, static_argnums=0)
def answers_right(config: ModelConfig, params: Any, tokens: jax.Array, kinds: jax.Array) -> jax.Array:
    """bool[B]: whether every answer token is the most likely one given those before it.

    That is exactly when greedy decoding gives the expected answer, found in one pass.
    """
    best = jnp.argmax(forward(config, params, tokens), axis=-1)
    return jnp.all((best == jnp.roll(tokens, -1, axis=1)) | (kinds != ANSWER), axis=1)


@partial(jax.jit, static_argnums=(0, 1))
def _next_tokens(config: ModelConfig, dtype: Any, params: Any, tokens: jax.Array, last: jax.Array) -> jax.Array:
    batch, length = tokens.shape
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    index = jnp.arange(batch, dtype=jnp.int32) * length + last
    logits, _ = Decoder(config, dtype).apply(
        {"params": params}, tokens.reshape(-1), positions, None, causal_attend(batch, dtype), logit_index=index
    )
    return jnp.argmax(logits, axis=-1)


def greedy_answers(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    end_id: int,
    padded_length: int,
    dtype: Any = jnp.bfloat16,
) -> list[list[int]]:
    """Greedy continuations, the end token left out, by running the whole sequence again for each token.

    Slow but free of any cache: the reference for everything that has one. Rows are right-padded to `padded_length`;
    causal attention never sees the padding.

    Raises:
        ValueError: a prompt and its answer exceed `padded_length`.
    """
    longest = max(len(prompt) for prompt in prompts) + max_tokens
    if longest > padded_length:
        raise ValueError(
            f"padded_length must be at least {longest} for these prompts and max_tokens; got {padded_length}"
        )
    tokens = np.zeros((len(prompts), padded_length), np.int32)
    ends = np.array([len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    answers: list[list[int]] = [[] for _ in prompts]
    live = [True] * len(prompts)
    for _ in range(max_tokens):
        last = jnp.asarray(ends - 1, jnp.int32)
        best = np.asarray(_next_tokens(config, dtype, params, jnp.asarray(tokens), last))
        for row, token in enumerate(best.tolist()):
            live[row] = live[row] and token != end_id
            if live[row]:
                answers[row].append(token)
                tokens[row, ends[row]] = token
                ends[row] += 1
        if not any(live):
            break
    return answers
