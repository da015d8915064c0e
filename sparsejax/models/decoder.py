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

from pallas_kernels import Implementation, add_linear, add_rms_norm, gated_linear, linear, matmul_precision, rms_norm
from sparsejax.models.config import ModelConfig
from sparsejax.models.rope import apply_rope, rope_cos_sin

Linear = tuple[jax.Array, jax.Array | None]  # kernel [in, out] and bias [out] of a linear layer
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
    """The whole model.

    Attributes:
      dtype: of parameters and activations; norms, RoPE and logits are float32.
      products: implementation of the linear layers. None is the best of the device, which may be neither differentiated
        nor partitioned over several.
    """

    config: ModelConfig
    dtype: Any = jnp.bfloat16
    products: Implementation | None = "xla"

    def setup(self) -> None:
        config = self.config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = parameter(self, "embed", nn.initializers.normal(INIT_SCALE), shape, self.dtype)
        self.layers = [DecoderLayer(config, self.dtype, index, self.products) for index in range(config.num_layers)]
        self.final_norm = parameter(self, "final_norm", nn.initializers.ones, (config.hidden_size,), self.dtype)
        if not config.tie_embeddings:
            self.lm_head = parameter(self, "lm_head", nn.initializers.normal(INIT_SCALE), shape[::-1], self.dtype)

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
            precision=matmul_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )


class DecoderLayer(nn.Module):
    """Attention and gated MLP, each after an RMSNorm and added to the residual stream. `products`: as of `Decoder`."""

    config: ModelConfig
    dtype: Any
    index: int
    products: Implementation | None = "xla"

    def __call__(
        self, x: jax.Array, cos: jax.Array, sin: jax.Array, cache: Any, attend: Attend | AttendFromProjection
    ) -> tuple[jax.Array, Any]:
        x, delta, cache = self.stream(x, None, cos, sin, cache, attend)
        return x if delta is None else x + delta, cache

    @nn.compact
    def stream(
        self,
        x: jax.Array,
        delta: jax.Array | None,
        cos: jax.Array,
        sin: jax.Array,
        cache: Any,
        attend: Attend | AttendFromProjection,
    ) -> tuple[jax.Array, jax.Array | None, Any]:
        """The layer of x + delta, as (x, delta, cache): whoever norms the sum next does the addition, too.

        A delta of None is nothing to add.
        """
        config, dtype = self.config, self.dtype

        def weights(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
            return LinearWeights(outputs, use_bias=bias, dtype=dtype, name=name)(inputs)

        def norm(name: str, size: int) -> jax.Array:
            return parameter(self, name, nn.initializers.ones, (size,), dtype)

        hidden, heads = config.hidden_size, config.num_heads + 2 * config.num_kv_heads
        attn_norm, mlp_norm = norm("attn_norm", hidden), norm("mlp_norm", hidden)
        qkv_weights = weights("qkv", hidden, heads * config.head_dim, config.qkv_bias)
        o = weights("o", config.num_heads * config.head_dim, hidden, config.o_bias)
        gate_up = weights("gate_up", hidden, 2 * config.intermediate_size, config.mlp_bias)
        down = weights("down", config.intermediate_size, hidden, config.mlp_bias)
        head_norms = tuple(norm(name, config.head_dim) for name in ("q_norm", "k_norm")) if config.qk_norm else None

        x, qkv = _project(x, delta, attn_norm, qkv_weights, config=config)
        if isinstance(attend, AttendFromProjection):
            assert not config.qk_norm, "what normalises q and k must come between their projection and RoPE"
            out, cache = attend.function(self.index, qkv, cos, sin, cache)
        else:
            q, k, v, k_pre_rope = _split_and_rotate(qkv, head_norms, cos, sin, config=config)
            out, cache = attend(self.index, q, k, v, k_pre_rope, cache)
        return *_mlp(x, out, o, mlp_norm, gate_up, down, config=config, products=self.products), cache


class LinearWeights(nn.Module):
    """Declares the parameters of a linear layer."""

    features: int
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, inputs: int) -> Linear:
        kernel = parameter(self, "kernel", nn.initializers.normal(INIT_SCALE), (inputs, self.features), self.dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, parameter(self, "bias", nn.initializers.zeros, (self.features,), self.dtype)


def parameter(module: nn.Module, name: str, initializer: Callable, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """`module.param`, but quick where the parameter is given.

    Flax then traces the initialiser to compare shapes: with a few parameters a layer that is half of the time that
    tracing a step takes.

    Raises:
      ValueError: it is given in another shape.
    """
    if not module.has_variable("params", name):
        return module.param(name, initializer, shape, dtype)
    value = module.get_variable("params", name)
    if value.shape != shape:
        path = "/".join((*module.path, name))
        raise ValueError(f"parameter {path} must have shape {shape}, got {value.shape}")
    return value


# What a layer does but for attention, as jitted functions: traced and lowered for the first layer only, the others
# call the same. XLA inlines the calls.


@partial(jax.jit, static_argnames="config")
def _project(
    x: jax.Array, delta: jax.Array | None, norm: jax.Array, qkv: Linear, *, config: ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """x + delta, and queries, keys and values of its norm: [T, Hq + 2 * H, D]."""
    x, normed = add_rms_norm(x, delta, norm, eps=config.rms_norm_eps)
    return x, linear(normed, *qkv).reshape(x.shape[0], -1, config.head_dim)


@partial(jax.jit, static_argnames="config")
def _split_and_rotate(
    qkv: jax.Array,
    norms: tuple[jax.Array, ...] | None,
    cos: jax.Array,
    sin: jax.Array,
    *,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(q, k, v, k_pre_rope) as `Attend` takes them. norms: weights of QK-norm."""
    q, k, v = jnp.split(qkv, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
    if norms is not None:
        q, k = (rms_norm(each, weight, config.rms_norm_eps) for each, weight in zip((q, k), norms, strict=True))
    return apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, k


@partial(jax.jit, static_argnames=("config", "products"))
def _mlp(
    x: jax.Array,
    out: jax.Array,
    o: Linear,
    norm: jax.Array,
    gate_up: Linear,
    down: Linear,
    *,
    config: ModelConfig,
    products: Implementation | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The layer behind attention: (x, delta) of its result x + delta. out: [T, Hq, D]."""
    attended = out.reshape(x.shape[0], -1).astype(x.dtype)
    x, delta = add_linear(x, attended, *o, implementation=products)
    x, normed = add_rms_norm(x, delta, norm, eps=config.rms_norm_eps)
    return add_linear(x, gated_linear(normed, *gate_up, implementation=products), *down, implementation=products)


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
