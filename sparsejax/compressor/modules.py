"""The learned parts of a compressor, as Flax Linen modules.

Parameters of a whole compressor (kernels are [in, out]; biases only with `config.bias`):

    layers_{i}: {down: PROJECTION, up: PROJECTION}         with split_kv {k_down, k_up, v_down, v_up}
    PROJECTION of "linear":     out {kernel [in, out], bias?}
                  "mlp_gelu":   hidden {kernel [in, m], bias?}, out {kernel [m, out], bias?}
                  "mlp_swiglu": gate_up {kernel [in, 2m], bias?} (gate half first), out {kernel [m, out], bias?}
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sparsejax.compressor.config import CompressorConfig

INIT_SCALE = 0.02  # standard deviation of random kernels, as published compressors start from


class Projection(nn.Module):
    """`down` or `up` of one pair. Computes in `dtype`; parameters are made in float32, the type of a master copy.

    Attributes:
      kind: "linear", "mlp_gelu" or "mlp_swiglu".
      features: size of the output.
      hidden: width inside an MLP (m).
      bias: whether the layers have biases.
      dtype: of the computation.
    """

    kind: str
    features: int
    hidden: int
    bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., in] -> [..., features]."""

        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(
                features,
                use_bias=self.bias,
                dtype=self.dtype,
                param_dtype=jnp.float32,
                # On a GPU float32 would otherwise be rounded to TF32 (10 bits).
                precision=jax.lax.Precision.HIGHEST if jnp.dtype(self.dtype) == jnp.float32 else None,
                kernel_init=nn.initializers.normal(INIT_SCALE),
                name=name,
            )

        if self.kind == "mlp_gelu":
            x = jax.nn.gelu(dense("hidden", self.hidden)(x), approximate=False)
        elif self.kind == "mlp_swiglu":
            gate, up = jnp.split(dense("gate_up", 2 * self.hidden)(x), 2, axis=-1)
            x = jax.nn.silu(gate) * up
        return dense("out", self.features)(x)


class Compressor(nn.Module):
    """The compressor of one layer: `apply({"params": params["layers_3"]}, x, r, method="encode")`."""

    config: CompressorConfig
    dtype: Any = jnp.bfloat16

    def setup(self) -> None:
        config = self.config
        down, up = config.down_intermediate_size, config.up_intermediate_size

        def pair() -> tuple[Projection, Projection]:
            return (
                Projection(config.down_type, config.kv_compressed_size, down, config.bias, self.dtype),
                Projection(config.up_type, config.input_size, up, config.bias, self.dtype),
            )

        if config.split_kv:
            self.k_down, self.k_up = pair()
            self.v_down, self.v_up = pair()
        else:
            self.down, self.up = pair()

    def __call__(self, x: jax.Array, reference: jax.Array | None) -> jax.Array:
        """What a token is read back as: `decode(encode(x, r), r)`, [..., kv_dim] in `dtype`."""
        return self.decode(self.encode(x, reference), reference)

    def encode(self, x: jax.Array, reference: jax.Array | None) -> jax.Array:
        """Latents [..., latent_size] of signals x [..., kv_dim]: `down(x) - down(r)`.

        Args:
          reference: r [..., kv_dim]; None: `down(x)`, a plain autoencoder.
        """
        # One product for both: the weights are read once, and their gradient is summed in float32.
        stacked = x[None] if reference is None else jnp.stack([x, reference])
        if self.config.split_kv:
            keys, values = jnp.split(stacked, 2, axis=-1)
            projected = jnp.concatenate([self.k_down(keys), self.v_down(values)], axis=-1)
        else:
            projected = self.down(stacked)
        return projected[0] if reference is None else projected[0] - projected[1]

    def decode(self, latent: jax.Array, reference: jax.Array | None) -> jax.Array:
        """Signals [..., kv_dim] of latents [..., latent_size]: `up(z) + r`."""
        if self.config.split_kv:
            keys, values = jnp.split(latent, 2, axis=-1)
            delta = jnp.concatenate([self.k_up(keys), self.v_up(values)], axis=-1)
        else:
            delta = self.up(latent)
        return delta if reference is None else delta + reference.astype(delta.dtype)


def init_params(config: CompressorConfig, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters of all layers: kernels normal(0, 0.02), biases 0."""
    x = jnp.zeros((1, config.kv_dim), jnp.float32)

    def one(index: int) -> dict[str, Any]:
        return dict(Compressor(config, jnp.float32).init(jax.random.fold_in(key, index), x, x)["params"])

    return {f"layers_{index}": one(index) for index in range(config.num_layers)}


def abstract_params(config: CompressorConfig) -> dict[str, Any]:
    """The parameter tree as float32 `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    return jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
