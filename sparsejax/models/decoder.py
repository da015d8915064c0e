"""The decoder of Llama, Qwen2 and Qwen3 as a Flax Linen module over packed tokens.

Tokens are packed along one axis T, whatever requests they belong to; what they attend to is decided by the `attend`
function that the caller hands in. The decoder knows neither caches nor batches:

    logits, cache = Decoder(config, dtype).apply({"params": params}, tokens, positions, cache, attend)

Parameters (kernels are [in, out]):

    embed [V, d]; layers_{i}: {attn_norm [d], qkv {kernel [d, (Hq+2H)*D], bias?}, q_norm? [D], k_norm? [D],
    o {kernel [Hq*D, d], bias?}, mlp_norm [d], gate_up {kernel [d, 2F], bias?}, down {kernel [F, d], bias?}};
    final_norm [d]; lm_head [d, V] unless the embeddings are tied
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from pallas_kernels import add_rms_norm, rms_norm
from sparsejax.models.config import ModelConfig
from sparsejax.models.rope import apply_rope, rope_cos_sin

INIT_SCALE = 0.02  # standard deviation of random weights, as Llama and Qwen start from


class Attend(Protocol):
    """Attention over whatever keys and values the caller keeps, for the packed tokens of one layer."""

    def __call__(
        self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, k_pre_rope: jax.Array, cache: Any, /
    ) -> tuple[jax.Array, Any]:
        """Stores the new keys and values, and attends.

        Args:
          layer: index of the layer, a Python int.
          q: [T, Hq, D] after RoPE; query head h reads KV head h // (Hq / H).
          k, v: [T, H, D], k after RoPE.
          k_pre_rope: [T, H, D], k before RoPE (after QK-norm).
          cache: the caller's pytree.

        Returns:
          (out [T, Hq, D], cache).
        """
        ...


@dataclass(frozen=True)
class AttendFromProjection:
    """An `attend` that rotates queries and keys itself, which can be had cheaper together with storing them.

    Only for models without QK-norm.

    Attributes:
      function: (layer, qkv [T, Hq + 2 * H, D] before RoPE: query heads, key heads, value heads; cos, sin f32[T, D/2],
        cache) -> (out [T, Hq, D], cache).
    """

    function: Callable[[int, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class Decoder(nn.Module):
    """The whole model. `dtype` is the type of parameters and activations; norms, RoPE and logits are float32."""

    config: ModelConfig
    dtype: Any = jnp.bfloat16

    def setup(self) -> None:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = self.param("embed", nn.initializers.normal(INIT_SCALE), shape, self.dtype)
        self.layers = [DecoderLayer(config, self.dtype, index) for index in range(config.num_layers)]
        self.final_norm = self.param("final_norm", nn.initializers.ones, (config.hidden_size,), self.dtype)
        if not config.tie_embeddings:
            self.lm_head = self.param("lm_head", nn.initializers.normal(INIT_SCALE), shape[::-1], self.dtype)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any,
        attend: Attend | AttendFromProjection,
        *,
        logit_index: jax.Array | None = None,
        rope_lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Logits of the chosen tokens.

        Args:
          tokens, positions: i32[T].
          cache: handed to `attend` layer by layer.
          logit_index: i32[N], the tokens whose logits are wanted; None: all.
          rope_lengths: i32[T], see `rope_cos_sin`.

        Returns:
          (logits f32[N or T, V], cache).
        """
        x, cache = self.hidden_states(tokens, positions, cache, attend, rope_lengths=rope_lengths)
        return self.unembed(x if logit_index is None else x[logit_index]), cache

    def hidden_states(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any,
        attend: Attend | AttendFromProjection,
        *,
        rope_lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """The residual stream after the final norm, [T, d] in `dtype`, and the cache. Arguments as `__call__`."""
        cos, sin = rope_cos_sin(self.config.rope, self.config.head_dim, positions, rope_lengths)
        x = self.embed[tokens].astype(self.dtype)  # [T, d]
        delta = None
        for layer in self.layers:
            x, delta, cache = layer.stream(x, delta, cos, sin, cache, attend)
        return add_rms_norm(x, delta, self.final_norm, eps=self.config.rms_norm_eps)[1], cache

    def unembed(self, x: jax.Array) -> jax.Array:
        """Logits f32[N, V] of final hidden states x [N, d]."""
        weight, contract = (self.embed, 1) if self.config.tie_embeddings else (self.lm_head, 0)
        return jax.lax.dot_general(
            x,
            weight.astype(self.dtype),
            (((1,), (contract,)), ((), ())),
            precision=_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each after an RMSNorm and added to the residual stream."""

    config: ModelConfig
    dtype: Any
    index: int

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, attend: Attend | AttendFromProjection
    ) -> tuple[jax.Array, Any]:
        x, delta, cache = self.stream(x, None, cos, sin, cache, attend)
        return x + delta, cache

    @nn.compact
    def stream(
        self,
        x: jax.Array,
        delta: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        cache: Any,
        attend: Attend | AttendFromProjection,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """The layer of x + delta, as (x, delta, cache): whoever norms the sum next does the addition, too."""
        config = self.config
        num_tokens = x.shape[0]

        def linear(name: str, features: int, bias: bool) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=bias,
                dtype=self.dtype,
                param_dtype=self.dtype,
                precision=_precision(self.dtype),
                kernel_init=nn.initializers.normal(INIT_SCALE),
                name=name,
            )

        def norm_weight(name: str, size: int) -> jax.Array:
            return self.param(name, nn.initializers.ones, (size,), self.dtype)

        def add_norm(name: str, x: jax.Array, delta: jax.Array | None) -> tuple[jax.Array, jax.Array]:
            return add_rms_norm(x, delta, norm_weight(name, x.shape[-1]), eps=config.rms_norm_eps)

        def head_norm(name: str, x: jax.Array) -> jax.Array:
            return rms_norm(x, norm_weight(name, config.head_dim), config.rms_norm_eps)

        heads = config.num_heads + 2 * config.num_kv_heads
        x, normed = add_norm("attn_norm", x, delta)
        qkv = linear("qkv", heads * config.head_dim, config.qkv_bias)(normed)
        qkv = qkv.reshape(num_tokens, heads, config.head_dim)
        if isinstance(attend, AttendFromProjection):
            assert not config.qk_norm, "what normalises q and k must come between their projection and RoPE"
            out, cache = attend.function(self.index, qkv, cos, sin, cache)
        else:
            q, k, v = jnp.split(qkv, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
            if config.qk_norm:
                q, k = head_norm("q_norm", q), head_norm("k_norm", k)
            out, cache = attend(self.index, apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, k, cache)
        out = out.reshape(num_tokens, config.num_heads * config.head_dim)
        x, normed = add_norm("mlp_norm", x, linear("o", config.hidden_size, config.o_bias)(out))

        gate_up = linear("gate_up", 2 * config.intermediate_size, config.mlp_bias)(normed)
        gate, up = jnp.split(gate_up, 2, axis=-1)  # [T, F] each
        return x, linear("down", config.hidden_size, config.mlp_bias)(jax.nn.silu(gate) * up), cache


def abstract_params(config: ModelConfig, dtype: Any) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; nothing is allocated."""

    def no_attention(layer, q, k, v, k_pre_rope, cache):
        return q, cache

    token = jnp.zeros(1, jnp.int32)
    variables = jax.eval_shape(
        lambda key: Decoder(config, dtype).init(key, token, token, None, no_attention), jax.random.key(0)
    )
    return variables["params"]


def init_params(config: ModelConfig, key: jax.Array, dtype: Any) -> dict[str, Any]:
    """Random parameters in `dtype` on the default device: weights normal(0, 0.02), norms 1, biases 0.

    Drawn one array at a time, so the peak is the parameters plus one array in float32.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract_params(config, dtype))

    def draw(index: int, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "bias":
            return jnp.zeros(leaf.shape, leaf.dtype)
        return _normal(jax.random.fold_in(key, index), leaf.shape, leaf.dtype)

    return jax.tree.unflatten(tree, [draw(i, path, leaf) for i, (path, leaf) in enumerate(leaves)])


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (INIT_SCALE * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _precision(dtype: Any) -> jax.lax.Precision | None:
    # On a GPU float32 would otherwise be rounded to TF32 (10 bits).
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
