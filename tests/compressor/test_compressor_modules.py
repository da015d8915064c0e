"""The projections compute their formulas, and the residual is taken in the latent space."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from sparsejax.compressor import Compressor, CompressorConfig, abstract_params, init_params

X = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
R = np.random.default_rng(1).normal(size=(2, 5, 12)).astype(np.float32)


def made(**options):
    config = CompressorConfig(num_layers=1, kv_dim=12, kv_compressed_size=4, **options)
    rng = np.random.default_rng(0)
    # Biases that are zero, as they start, would hide what happens to them.
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3), abstract_params(config)["layers_0"])
    return config, jax.tree.map(np.float32, params)


def run(config, params, method, *arrays):
    return np.asarray(_run(config, method, params, *arrays))


@partial(jax.jit, static_argnums=(0, 1))
def _run(config, method, params, *arrays):
    return Compressor(config, jnp.float32).apply({"params": params}, *arrays, method=method)


def project(kind, params, x):
    def dense(name, x):
        layer = params[name]
        return x @ np.asarray(layer["kernel"]) + np.asarray(layer.get("bias", 0.0))

    if kind == "mlp_gelu":
        hidden = dense("hidden", x)
        x = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
    elif kind == "mlp_swiglu":
        gate, up = np.split(dense("gate_up", x), 2, axis=-1)
        x = gate / (1 + np.exp(-gate)) * up
    return dense("out", x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "mlp_gelu", "mlp_swiglu"])
def test_projections_compute_their_formulas(kind, bias):
    config, params = made(down_type=kind, up_type=kind, down_intermediate_size=6, up_intermediate_size=10, bias=bias)
    latent = run(config, params, "encode", X, R)
    np.testing.assert_allclose(
        latent, project(kind, params["down"], X) - project(kind, params["down"], R), rtol=1e-4, atol=1e-5
    )
    read = run(config, params, "decode", latent, R)
    np.testing.assert_allclose(read, project(kind, params["up"], latent) + R, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(run(config, params, "__call__", X, R), read)


def test_without_a_reference_it_is_an_autoencoder():
    config, params = made(bias=True)
    latent = run(config, params, "encode", X, None)
    np.testing.assert_allclose(latent, project("linear", params["down"], X), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        run(config, params, "decode", latent, None), project("linear", params["up"], latent), rtol=1e-4, atol=1e-5
    )


def test_split_compresses_keys_and_values_apart():
    config, params = made(split_kv=True, references="e2e", chunk_size=2)
    assert set(params) == {"k_down", "k_up", "v_down", "v_up"}
    latent = run(config, params, "encode", X, R)
    assert latent.shape == (2, 5, config.latent_size) == (2, 5, 8)
    other = np.concatenate([X[..., :6], R[..., 6:]], axis=-1)
    mixed = run(config, params, "encode", other, R)
    np.testing.assert_array_equal(mixed[..., :4], latent[..., :4])
    np.testing.assert_allclose(mixed[..., 4:], 0, atol=1e-6)
    read = run(config, params, "decode", latent, R)
    np.testing.assert_allclose(
        read[..., :6], project("linear", params["k_up"], latent[..., :4]) + R[..., :6], rtol=1e-4, atol=1e-5
    )


def test_abstract_params_are_the_real_ones():
    config = CompressorConfig(num_layers=2, kv_dim=12, kv_compressed_size=4, down_type="mlp_swiglu", bias=True)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config))
    params = init_params(config, jax.random.key(1))
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    first, second = (np.asarray(params[f"layers_{i}"]["up"]["out"]["kernel"]) for i in range(2))
    assert not np.array_equal(first, second)
