"""What a text reads like through a compressor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compressor import (
    CompressorConfig,
    init_params,
    is_center,
    positional_references,
    reconstruct,
    references_of,
)

read = jax.jit(reconstruct, static_argnums=0)
references = jax.jit(references_of, static_argnums=0)

LENGTH, KV = 37, 8
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, LENGTH, KV)), jnp.float32)


def made(**options):
    config = CompressorConfig(
        num_layers=1, kv_dim=KV, **{"kv_compressed_size": 4, "sink_tokens": 3, "cluster_ratio": 0.25, **options}
    )
    params = init_params(config, jax.random.key(0))["layers_0"]
    return config, jax.tree.map(lambda leaf: 20 * leaf, params)


@pytest.mark.parametrize(
    "options", [{}, {"references": "e2e", "chunk_size": 4}, {"cluster_metric": "cosine", "cluster_on_kv": False}]
)
def test_an_identity_gives_back_what_it_got(options):
    config, params = made(kv_compressed_size=KV, **options)
    identity = jax.tree.map(lambda leaf: jnp.eye(KV), params)
    np.testing.assert_allclose(read(config, identity, X), X, rtol=1e-5, atol=1e-5)


def test_sinks_and_centers_are_read_as_they_are_and_nothing_else_is():
    config, params = made()
    same = np.all(np.asarray(read(config, params, X)) == np.asarray(X), axis=(0, 2))
    np.testing.assert_array_equal(same, is_center(np.arange(LENGTH), sinks=3, step=4))


def test_every_token_a_center_means_nothing_is_compressed():
    config, params = made(cluster_ratio=1.0)
    np.testing.assert_array_equal(read(config, params, X), X)


def test_a_text_of_sinks_only_is_left_alone():
    config, params = made()
    np.testing.assert_array_equal(read(config, params, X[:, :3]), X[:, :3])


@pytest.mark.parametrize(
    "options", [{}, {"references": "e2e", "chunk_size": 4}, {"references": "e2e", "chunk_size": 1}]
)
def test_nothing_depends_on_later_tokens(options):
    config, params = made(**options)
    whole = read(config, params, X)
    for length in (5, 20):
        np.testing.assert_allclose(read(config, params, X[:, :length]), whole[:, :length], rtol=1e-5, atol=1e-6)


def test_soft_assignment_at_high_temperature_is_the_mean():
    config, _ = made()
    soft, _ = made(cluster_soft_assignment=True, cluster_temp=1e6)
    sharp, _ = made(cluster_soft_assignment=True, cluster_temp=0.1)
    np.testing.assert_allclose(references(soft, X), references(config, X), rtol=1e-3, atol=1e-4)
    assert np.abs(np.asarray(references(sharp, X) - references(config, X))).max() > 0.1


def test_positional_references():
    x = np.asarray(X)
    mean = np.asarray(positional_references(X, chunk_size=4, mode="avg"))
    for t in range(LENGTH):
        np.testing.assert_allclose(mean[:, t], x[:, max(0, t - 3) : t + 1].sum(axis=1) / 4, rtol=1e-5, atol=1e-6)
    first = np.asarray(positional_references(X, chunk_size=4, mode="first"))
    np.testing.assert_array_equal(first, x[:, np.arange(LENGTH) // 4 * 4])
    assert positional_references(X, chunk_size=1, mode="avg") is None


def test_gradients_reach_references_and_both_projections():
    config, params = made()
    grads = jax.jit(jax.grad(lambda p: jnp.sum(reconstruct(config, p, X) ** 2)))(params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))
    # Token 4 is not a center, center 3 stands before it and is near enough to be one of its references.
    moved = jax.jit(jax.grad(lambda x: jnp.sum(reconstruct(config, params, x)[0, 4])))(X)
    assert float(jnp.abs(moved[0, :4]).max()) > 0
    assert float(jnp.abs(moved[0, 5:]).max()) == 0
