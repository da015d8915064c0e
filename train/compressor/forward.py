"""The two passes of training and their loss, over stacked layers.

Pass 1 (teacher) runs the frozen model and keeps the signal x = concat(K before RoPE, V) of every layer. Pass 2
(student) reconstructs each layer's signal through the compressor, attends to the reconstruction and goes on, so that
later layers see the errors of earlier ones:

    loss = next-token cross-entropy of the student + sum over layers of mean((reconstruction - teacher's signal)^2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import rms_norm
from sparsejax.compressor import CompressorConfig, reconstruct
from sparsejax.compressor.reconstruct import SEARCH_RESULT
from sparsejax.models import Decoder, ModelConfig
from sparsejax.models.decoder import DecoderLayer
from sparsejax.models.rope import apply_rope, rope_cos_sin
from train.compressor.attention import causal_attention
from train.compressor.placement import Placement

_LOGIT_BYTES = 1 << 29  # of float32 logits held at once on a device


class Losses(NamedTuple):
    """Both parts of the loss, f32[]: next-token cross-entropy, and the squared error summed over layers."""

    ce: jax.Array
    mse: jax.Array


@dataclass(frozen=True)
class TwoPass:
    """What the passes are computed with.

    Attributes:
      model: the frozen decoder.
      compressor: what is trained.
      placement: the mesh.
      dtype: of the computation.
      train_on, recompute: as `TrainOptions`.
    """

    model: ModelConfig
    compressor: CompressorConfig
    placement: Placement
    dtype: Any = jnp.bfloat16
    train_on: str = "both"
    recompute: str = "none"

    def loss(
        self, params: Any, frozen: Any, tokens: jax.Array, documents: jax.Array | None = None
    ) -> tuple[jax.Array, Losses]:
        """The loss of one batch, and its parts.

        Args:
          params: of the compressor, leaves [L, ...] float32.
          frozen: of the model, as `train.compressor.frozen` stacks them; in `dtype`.
          tokens: i32[B, T].
          documents: i32[B, T], number of each token's document in its row; None: one text a row.

        A part that is not trained on counts in the value and gives no gradient.
        """
        signals = jax.lax.stop_gradient(self.teacher_signals(frozen, tokens, documents))
        hidden, mse = self.student(params, frozen, tokens, signals, documents)
        losses = Losses(self.cross_entropy(frozen, hidden, tokens, documents), jnp.sum(mse))
        ce = jax.lax.stop_gradient(losses.ce) if self.train_on == "mse" else losses.ce
        error = jax.lax.stop_gradient(losses.mse) if self.train_on == "ce" else losses.mse
        return ce + error, losses

    def teacher_signals(self, frozen: Any, tokens: jax.Array, documents: jax.Array | None = None) -> jax.Array:
        """[L, B, T, kv_dim]: what the frozen model's layers would store, keys before RoPE first."""
        batch = tokens.shape[0]
        cos, sin = self._angles(tokens)

        def attend(layer: int, q: Any, k: Any, v: Any, k_pre_rope: Any, cache: Any) -> tuple[jax.Array, Any]:
            return self._attention(batch, q, k, v, documents), self._signal(batch, k_pre_rope, v)

        def step(x: jax.Array, layer: Any) -> tuple[jax.Array, jax.Array]:
            return self._layer(layer, x, cos, sin, attend)

        _, signals = jax.lax.scan(step, self._embed(frozen, tokens), frozen["layers"])
        return signals

    def student(
        self, params: Any, frozen: Any, tokens: jax.Array, signals: jax.Array, documents: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The pass that reads reconstructions.

        Args:
          signals: of the teacher.

        Returns:
          (final hidden states [B * T, d], squared error f32[L] of each layer).
        """
        batch = tokens.shape[0]
        cos, sin = self._angles(tokens)

        def step(x: jax.Array, inputs: tuple[Any, Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
            layer, compressor, target = inputs

            def attend(index: int, q: Any, k: Any, v: Any, k_pre_rope: Any, cache: Any) -> tuple[jax.Array, Any]:
                read = reconstruct(self.compressor, compressor, self._signal(batch, k_pre_rope, v))
                error = jnp.mean(jnp.square(read.astype(jnp.float32) - target.astype(jnp.float32)))
                keys, values = (half.reshape(k.shape) for half in jnp.split(read, 2, axis=-1))
                return self._attention(batch, q, apply_rope(keys, cos, sin), values, documents), error

            return self._layer(layer, x, cos, sin, attend)

        if self.recompute != "none":
            policies = jax.checkpoint_policies
            policy = policies.save_only_these_names(SEARCH_RESULT)
            if self.recompute == "dots":
                policy = policies.save_from_both_policies(policy, policies.dots_with_no_batch_dims_saveable)
            # A scan keeps the two computations apart by itself.
            step = jax.checkpoint(step, policy=policy, prevent_cse=False)
        x, errors = jax.lax.scan(step, self._embed(frozen, tokens), (frozen["layers"], params, signals))
        final = self.placement.gathered(frozen["final_norm"])
        return rms_norm(x, final, self.model.rms_norm_eps), errors

    def cross_entropy(
        self, frozen: Any, hidden: jax.Array, tokens: jax.Array, documents: jax.Array | None = None
    ) -> jax.Array:
        """Mean next-token cross-entropy, f32[], of final hidden states [B * T, d]; within documents if given.

        Logits are made for a part of the positions at a time, and again in the backward pass.
        """
        batch, length = tokens.shape
        targets = jnp.roll(tokens, -1, axis=1)
        counted = jnp.broadcast_to(jnp.arange(length) < length - 1, tokens.shape)
        if documents is not None:
            counted &= documents == jnp.roll(documents, -1, axis=1)
        local = max(1, batch // self.placement.mesh.size)
        needed = -(-4 * local * length * self.model.vocab_size // _LOGIT_BYTES)
        # A power of two that divides the length.
        parts = math.gcd(length, 1 << max(0, needed - 1).bit_length())
        head = self.placement.gathered({name: leaf for name, leaf in frozen.items() if name != "layers"})
        unembed = _frozen_unembed(Decoder(self.model, self.dtype))

        @jax.checkpoint
        def part(total: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            x, target, weight = inputs  # [B, T / parts, ...]
            logits = unembed(head, x.reshape(-1, x.shape[-1]))
            chosen = jnp.take_along_axis(logits, target.reshape(-1, 1), axis=-1)[:, 0]
            losses = jax.nn.logsumexp(logits, axis=-1) - chosen
            return total + jnp.sum(losses * weight.reshape(-1)), None

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(batch, parts, length // parts, *x.shape[2:]).swapaxes(0, 1)

        rows = (hidden.reshape(batch, length, -1), targets, counted)
        total, _ = jax.lax.scan(part, jnp.float32(0), tuple(map(split, rows)))
        return total / jnp.maximum(jnp.sum(counted), 1)

    def _angles(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """RoPE angles of packed rows, each from position 0: f32[B * T, D / 2] twice."""
        batch, length = tokens.shape
        positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
        lengths = jnp.full(positions.shape, length, jnp.int32)
        return rope_cos_sin(self.model.rope, self.model.head_dim, positions, lengths)

    def _embed(self, frozen: Any, tokens: jax.Array) -> jax.Array:
        """[B * T, d]."""
        return self.placement.by_rows(frozen["embed"][tokens.reshape(-1)].astype(self.dtype))

    def _layer(self, layer: Any, x: jax.Array, cos: jax.Array, sin: jax.Array, attend: Any) -> tuple[jax.Array, Any]:
        weights = {"params": self.placement.gathered(layer)}
        x, out = DecoderLayer(self.model, self.dtype, 0).apply(weights, x, cos, sin, None, attend)
        return self.placement.by_rows(x), out

    def _attention(
        self, batch: int, q: jax.Array, k: jax.Array, v: jax.Array, documents: jax.Array | None
    ) -> jax.Array:
        """[B * T, Hq, D] of packed rows."""
        q_rows, k_rows, v_rows = (x.reshape(batch, -1, *x.shape[1:]) for x in (q, k, v))
        return causal_attention(q_rows, k_rows, v_rows, documents).reshape(q.shape)

    def _signal(self, batch: int, k_pre_rope: jax.Array, v: jax.Array) -> jax.Array:
        """[B, T, kv_dim] of keys and values [B * T, H, D]."""
        return jnp.concatenate([x.reshape(batch, -1, self.compressor.kv_dim // 2) for x in (k_pre_rope, v)], axis=-1)


def _frozen_unembed(decoder: Decoder) -> Any:
    """`(head, x [N, d]) -> logits f32[N, V]`, differentiable in x, with gradients multiplied in the weights' type.

    Left to itself, JAX would convert the weights to float32 and multiply float32 gradients of logits with them.
    """

    @jax.custom_vjp
    def unembed(head: Any, x: jax.Array) -> jax.Array:
        logits: Any = decoder.apply({"params": head}, x, method="unembed")
        return logits

    def backward(head: Any, gradient: jax.Array) -> tuple[None, jax.Array]:
        weight, axis = (head["embed"], 0) if decoder.config.tie_embeddings else (head["lm_head"], 1)
        exact = jax.lax.Precision.HIGHEST if weight.dtype == jnp.float32 else None
        contract = (((1,), (axis,)), ((), ()))
        return None, jax.lax.dot_general(gradient.astype(weight.dtype), weight, contract, precision=exact)

    unembed.defvjp(lambda head, x: (unembed(head, x), head), backward)
    return unembed
