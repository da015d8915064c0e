"""What the decoder promises its callers besides parity: parameter tree, chosen logits, what `attend` is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import linear
from sparsejax.models import Decoder, ModelConfig, RopeConfig, abstract_params, dense_causal_attend, init_params
from sparsejax.models import decoder as decoder_module
from sparsejax.models.decoder import DecoderLayer
from sparsejax.models.rope import rope_cos_sin

CONFIG = ModelConfig(
    architecture="qwen3",
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    qkv_bias=True,
    o_bias=True,
    qk_norm=True,
    rope=RopeConfig(theta=500.0),
)
TOKENS = jnp.array([3, 1, 4, 1, 5, 9, 2, 6])
POSITIONS = jnp.arange(8)


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0), jnp.float32)


def test_parameter_tree_is_the_documented_one(params):
    d, heads, kv, width, ffn = 24, 4, 2, 16, 40
    layer = {
        "attn_norm": (d,),
        "qkv": {"kernel": (d, (heads + 2 * kv) * width), "bias": ((heads + 2 * kv) * width,)},
        "q_norm": (width,),
        "k_norm": (width,),
        "o": {"kernel": (heads * width, d), "bias": (d,)},
        "mlp_norm": (d,),
        "gate_up": {"kernel": (d, 2 * ffn)},
        "down": {"kernel": (ffn, d)},
    }
    expected = {"embed": (50, d), "layers_0": layer, "layers_1": layer, "final_norm": (d,), "lm_head": (d, 50)}
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected
    tied = ModelConfig(**{**vars(CONFIG), "tie_embeddings": True})
    assert "lm_head" not in abstract_params(tied, jnp.float32)


def test_random_parameters_have_the_promised_distribution(params):
    assert (params["final_norm"] == 1).all()
    assert (params["layers_0"]["qkv"]["bias"] == 0).all()
    kernels = [params["embed"], params["layers_0"]["gate_up"]["kernel"], params["layers_1"]["gate_up"]["kernel"]]
    for kernel in kernels:
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
    assert (kernels[1] != kernels[2]).any()
    assert init_params(CONFIG, jax.random.key(0), jnp.bfloat16)["embed"].dtype == jnp.bfloat16


def test_products_that_add_the_residual_themselves_change_nothing(params, monkeypatch):
    args = (TOKENS, POSITIONS, None, dense_causal_attend(1))
    expected, _ = Decoder(CONFIG, jnp.float32).apply({"params": params}, *args)
    x = jax.random.normal(jax.random.key(1), (8, 24))
    rotation = rope_cos_sin(CONFIG.rope, CONFIG.head_dim, POSITIONS)

    def layer():
        layer = DecoderLayer(CONFIG, jnp.float32, 0, None)  # as no other decoder here: none of its parts is compiled
        return layer.apply({"params": params["layers_0"]}, x, *rotation, None, dense_causal_attend(1))[0]

    expected_layer = layer()
    calls = []

    def added(total, x, weight, bias=None, *, implementation):
        calls.append(implementation)
        return total + linear(x, weight, bias), None

    monkeypatch.setattr(decoder_module, "add_linear", added)
    jax.clear_caches()
    got, _ = Decoder(CONFIG, jnp.float32, None).apply({"params": params}, *args)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(layer(), expected_layer, atol=1e-6)
    assert set(calls) == {None}
    monkeypatch.undo()
    jax.clear_caches()  # of what was traced with the substitute


def test_chosen_logits_are_those_of_all_tokens(params):
    @jax.jit
    def both(params):
        variables, args = {"params": params}, (TOKENS, POSITIONS, None, dense_causal_attend(1))
        every, _ = Decoder(CONFIG, jnp.float32).apply(variables, *args)
        chosen, _ = Decoder(CONFIG, jnp.float32).apply(variables, *args, logit_index=jnp.array([7, 2]))
        hidden, _ = Decoder(CONFIG, jnp.float32).apply(variables, *args, method="hidden_states")
        return every, chosen, Decoder(CONFIG, jnp.float32).apply(variables, hidden, method="unembed")

    every, chosen, unembedded = both(params)
    assert every.shape == (8, 50)
    np.testing.assert_allclose(chosen, every[jnp.array([7, 2])], atol=1e-6)
    np.testing.assert_allclose(unembedded, every, atol=1e-6)


def test_attend_sees_every_layer_once_and_threads_the_cache(params):
    seen = []

    def attend(layer, q, k, v, k_pre_rope, cache):
        seen.append((layer, q.shape, k.shape, v.shape, k_pre_rope.shape))
        return q, [*cache, layer]

    _, cache = jax.eval_shape(
        lambda params: Decoder(CONFIG, jnp.float32).apply({"params": params}, TOKENS, POSITIONS, [], attend), params
    )
    kv = (8, 2, 16)
    assert seen == [(layer, (8, 4, 16), kv, kv, kv) for layer in range(2)]
    assert len(cache) == 2


def test_keys_before_rope_are_those_of_position_zero(params):
    def attend(layer, q, k, v, k_pre_rope, cache):
        return q, [*cache, (k, k_pre_rope)]

    _, keys = Decoder(CONFIG, jnp.float32).apply({"params": params}, TOKENS[:1], jnp.array([0]), [], attend)
    np.testing.assert_array_equal(keys[0][0], keys[0][1])


def test_batched_dense_attention_keeps_sequences_apart(params):
    apply = jax.jit(
        lambda tokens, positions, batch: Decoder(CONFIG, jnp.float32).apply(
            {"params": params}, tokens, positions, None, dense_causal_attend(batch)
        )[0],
        static_argnums=2,
    )
    alone = [apply(half, jnp.arange(4), 1) for half in jnp.split(TOKENS, 2)]
    together = apply(TOKENS, jnp.tile(jnp.arange(4), 2), 2)
    np.testing.assert_allclose(together, jnp.concatenate(alone), atol=1e-5)


def test_uneven_batches_are_refused(params):
    with pytest.raises(ValueError, match="multiple of batch"):
        Decoder(CONFIG, jnp.float32).apply({"params": params}, TOKENS, POSITIONS, None, dense_causal_attend(3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gives_float32_logits_close_to_those_of_float32(params, dtype):
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    args = (TOKENS, POSITIONS, None, dense_causal_attend(1))
    logits, _ = jax.jit(lambda p: Decoder(CONFIG, dtype).apply({"params": p}, *args))(half)
    expected, _ = jax.jit(lambda p: Decoder(CONFIG, jnp.float32).apply({"params": p}, *args))(wide)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=0.02 * float(abs(expected).max()) + 1e-3)
