"""One optimizer step: gradients of micro-batches summed in float32, clipped, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train.compressor.forward import Losses, TwoPass
from train.compressor.options import TrainOptions


class TrainState(NamedTuple):
    """What a step changes: compressor parameters (float32, [L, ...]), AdamW's state, number of steps done."""

    params: Any
    optimizer: Any
    step: jax.Array


class StepMetrics(NamedTuple):
    """Of one step, f32[]: loss and its parts (means over micro-batches), gradient norm before clipping, rate."""

    loss: jax.Array
    ce: jax.Array
    mse: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array


def learning_rate(options: TrainOptions, steps: int) -> Callable[[Any], jax.Array]:
    """Linear warm-up to the peak over warmup_ratio * steps, then linearly to 0 at the end of the run."""
    warmup = round(options.warmup_ratio * steps)

    def rate(step: Any) -> jax.Array:
        done = jnp.asarray(step, jnp.float32) + 1
        rising = done / max(warmup, 1)
        falling = (steps + 1 - done) / max(steps - warmup, 1)
        return options.learning_rate * jnp.where(done <= warmup, rising, jnp.clip(falling, 0, 1))

    return rate


def make_optimizer(options: TrainOptions, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW with the schedule of a run of `steps`."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(
            learning_rate(options, steps),
            b1=options.beta1,
            b2=options.beta2,
            eps=options.epsilon,
            weight_decay=options.weight_decay,
        ),
    )


def init_state(params: Any, options: TrainOptions, steps: int) -> TrainState:
    """The state before the first step."""
    return TrainState(params, make_optimizer(options, steps).init(params), jnp.int32(0))


def make_train_step(passes: TwoPass, options: TrainOptions, steps: int) -> Any:
    """The jitted `(state, frozen, tokens i32[A, B, T], documents i32[A, B, T] or None) -> (state, StepMetrics)`.

    A micro-batches are taken one after the other; their gradients count equally. The state is donated.
    """
    optimizer = make_optimizer(options, steps)
    rate = learning_rate(options, steps)

    def step(state: TrainState, frozen: Any, tokens: jax.Array, documents: jax.Array | None):
        gradient = jax.value_and_grad(passes.loss, has_aux=True)

        def add(total: Any, micro: tuple[jax.Array, jax.Array | None]) -> tuple[Any, tuple[jax.Array, Losses]]:
            found, grads = gradient(state.params, frozen, *micro)
            return jax.tree.map(jnp.add, total, grads), found

        count = tokens.shape[0]
        if count == 1:
            (loss, parts), grads = gradient(
                state.params, frozen, tokens[0], None if documents is None else documents[0]
            )
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            total, found = jax.lax.scan(add, zeros, (tokens, documents))
            grads = jax.tree.map(lambda leaf: leaf / count, total)
            loss, parts = jax.tree.map(jnp.mean, found)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        metrics = StepMetrics(loss, parts.ce, parts.mse, _norm(grads), rate(state.step))
        return TrainState(optax.apply_updates(state.params, updates), moments, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)), jnp.float32(0)))
