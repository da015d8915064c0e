"""RoPE against its definition: rotations that depend on distance only, and the properties of each context extension."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sparsejax.models.rope import KINDS, RopeConfig, apply_rope, attention_factor, inverse_frequencies, rope_cos_sin

HEAD_DIM = 32
CONFIGS = {
    "default": RopeConfig(),
    "linear": RopeConfig(kind="linear", factor=4.0),
    "dynamic": RopeConfig(kind="dynamic", factor=2.0, original_max_position_embeddings=64),
    "llama3": RopeConfig(kind="llama3", factor=8.0, original_max_position_embeddings=64),
    "yarn": RopeConfig(kind="yarn", factor=4.0, original_max_position_embeddings=64),
}
LENGTHS = jnp.full(2, 100)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_distance_only(kind):
    q, k = np.random.default_rng(0).normal(size=(2, 2, 1, HEAD_DIM)).astype(np.float32)
    q[1], k[1] = q[0], k[0]
    cos, sin = rope_cos_sin(CONFIGS[kind], HEAD_DIM, jnp.array([5, 75]), LENGTHS)
    q = apply_rope(jnp.asarray(q), cos, sin)
    cos, sin = rope_cos_sin(CONFIGS[kind], HEAD_DIM, jnp.array([2, 72]), LENGTHS)
    k = apply_rope(jnp.asarray(k), cos, sin)
    scores = jnp.sum(q * k, axis=(1, 2))
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rotation_keeps_the_norm_up_to_the_attention_factor(kind):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, HEAD_DIM)), jnp.float32)
    rotated = apply_rope(x, *rope_cos_sin(CONFIGS[kind], HEAD_DIM, jnp.array([0, 90]), LENGTHS))
    expected = jnp.linalg.norm(x, axis=-1) * attention_factor(CONFIGS[kind])
    np.testing.assert_allclose(jnp.linalg.norm(rotated, axis=-1), expected, rtol=1e-5)


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
    ],
)
def test_frequencies_are_those_of_transformers(theta, head_dim, scaling):
    """Nearly all to the last bit: at position 100,000 one unit in the last place is a hundredth of a radian."""
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    parameters = {**scaling, "rope_theta": theta}
    if scaling["rope_type"] in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = 8192
    theirs = transformers.LlamaConfig(**sizes, max_position_embeddings=32768, rope_parameters=parameters)
    expected = LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    got = inverse_frequencies(RopeConfig.from_hf(parameters, 32768), head_dim)
    np.testing.assert_allclose(got, expected, rtol=2.5e-7)
    assert (got != expected).mean() < 0.1


def test_position_zero_changes_nothing():
    x = jnp.ones((1, 2, HEAD_DIM), jnp.bfloat16)
    rotated = apply_rope(x, *rope_cos_sin(RopeConfig(), HEAD_DIM, jnp.array([0])))
    assert rotated.dtype == jnp.bfloat16
    assert (rotated == x).all()


def test_linear_divides_positions():
    plain = rope_cos_sin(RopeConfig(), HEAD_DIM, jnp.array([3, 10]))
    stretched = rope_cos_sin(CONFIGS["linear"], HEAD_DIM, jnp.array([12, 40]))
    np.testing.assert_allclose(plain, stretched, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_fast_frequencies_stay_and_slow_ones_are_divided(kind):
    ratio = inverse_frequencies(RopeConfig(), HEAD_DIM) / inverse_frequencies(CONFIGS[kind], HEAD_DIM)
    assert ratio[0] == 1
    np.testing.assert_allclose(ratio[-1], CONFIGS[kind].factor, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-6).all()


def test_dynamic_is_default_up_to_the_original_length_and_stretches_beyond():
    config, positions = CONFIGS["dynamic"], jnp.array([40, 40, 40])
    for head_dim in (HEAD_DIM, 80):  # a fifth of 80's exponents would be off by a unit if XLA divided them
        cos, _ = rope_cos_sin(config, head_dim, positions, jnp.array([41, 64, 200]))
        plain, _ = rope_cos_sin(RopeConfig(), head_dim, positions)
        np.testing.assert_array_equal(cos[:2], plain[:2])
        assert abs(cos[2] - plain[2]).max() > 0.1


def test_dynamic_lengths_default_to_position_plus_one():
    positions = jnp.array([10, 63, 64, 150])
    given = rope_cos_sin(CONFIGS["dynamic"], HEAD_DIM, positions, positions + 1)
    np.testing.assert_array_equal(rope_cos_sin(CONFIGS["dynamic"], HEAD_DIM, positions), given)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"kind": "longrope"}, "longrope"),
        ({"kind": "linear", "factor": 0.0}, "factor"),
        ({"kind": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
    ],
)
def test_bad_values_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        RopeConfig(**arguments)
