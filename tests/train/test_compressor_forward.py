"""The two passes of compressor training against the decoder, and what gives gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compressor_cases import COMPRESSOR, LENGTH, MODEL, model_params, one_device, tokens

from sparsejax.compressor import CompressorConfig, abstract_params, init_params
from sparsejax.models import Decoder, dense_causal_attend
from train.compressor.flops import step_flops
from train.compressor.forward import TwoPass
from train.compressor.frozen import stack_compressor, stack_layers, unstack_compressor
from train.compressor.options import TrainOptions
from train.compressor.step import init_state, make_train_step

TOKENS = tokens(2)
KV = 2 * MODEL.num_kv_heads * MODEL.head_dim


def compressor(**options):
    config = CompressorConfig(num_layers=2, kv_dim=KV, **{**COMPRESSOR, **options})
    params = jax.tree.map(lambda leaf: 10 * leaf, init_params(config, jax.random.key(1)))
    return config, stack_compressor(params)


@pytest.fixture(scope="module")
def frozen():
    return stack_layers(MODEL, model_params(), one_device())


def dense(token_rows):
    """(cross-entropy, signals [L, B, T, kv_dim]) of the decoder itself."""
    batch, length = token_rows.shape
    signals = []

    def attend(layer, q, k, v, k_pre_rope, cache):
        signals.append(jnp.concatenate([x.reshape(batch, length, -1) for x in (k_pre_rope, v)], axis=-1))
        return dense_causal_attend(batch)(layer, q, k, v, k_pre_rope, cache)

    positions = jnp.tile(jnp.arange(length), batch)
    logits, _ = Decoder(MODEL, jnp.float32).apply(
        {"params": model_params()}, token_rows.reshape(-1), positions, None, attend
    )
    logits = logits.reshape(batch, length, -1)[:, :-1]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(token_rows[:, 1:]))
    return jnp.mean(loss), jnp.stack(signals)


def value_and_grads(passes, params, frozen, token_rows=TOKENS, documents=None):
    return jax.jit(jax.value_and_grad(passes.loss, has_aux=True))(params, frozen, token_rows, documents)


def test_an_identity_compressor_leaves_the_model_as_it_is(frozen):
    config, params = compressor(kv_compressed_size=KV)
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.eye(KV), leaf.shape), params)
    passes = TwoPass(MODEL, config, one_device(), jnp.float32)
    loss, parts = jax.jit(passes.loss)(params, frozen, TOKENS)
    expected, signals = jax.jit(dense)(TOKENS)
    np.testing.assert_allclose(parts.ce, expected, rtol=1e-5)
    assert float(parts.mse) < 1e-8
    np.testing.assert_allclose(loss, parts.ce + parts.mse, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(passes.teacher_signals)(frozen, TOKENS), signals, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def plain(frozen):
    """Value and gradients with everything trained on and nothing computed twice."""
    config, params = compressor(down_type="mlp_swiglu")
    return value_and_grads(TwoPass(MODEL, config, one_device(), jnp.float32), params, frozen)


@pytest.mark.parametrize("kind", ["full", "dots"])
def test_rematerialisation_changes_nothing_but_what_is_computed_twice(frozen, plain, kind):
    config, params = compressor(down_type="mlp_swiglu")
    found = value_and_grads(TwoPass(MODEL, config, one_device(), jnp.float32, recompute=kind), params, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, plain)


def products(jaxpr):
    """(operand types, FLOP, times run) of every matrix product in a jaxpr, those inside scans as often as they run."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left, right = (var.aval for var in equation.invars)
            inner = np.prod([left.shape[axis] for axis in contract])
            yield (left.dtype, right.dtype), 2 * inner * np.prod(equation.outvars[0].aval.shape), 1
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = value if hasattr(value, "eqns") else getattr(value, "jaxpr", None)
            if inner is not None:
                yield from ((types, flops, times * count) for types, flops, count in products(inner))


def gradient_jaxpr(recompute, dtype, frozen, length=LENGTH):
    config, params = compressor(down_type="mlp_swiglu")
    passes = TwoPass(MODEL, config, one_device(), dtype, recompute=recompute)
    frozen = jax.tree.map(lambda leaf: leaf.astype(dtype), frozen)
    return config, jax.make_jaxpr(jax.grad(passes.loss, has_aux=True))(params, frozen, tokens(1, length)).jaxpr


def test_the_flop_count_is_that_of_the_products_of_a_step(frozen):
    config, jaxpr = gradient_jaxpr("none", jnp.float32, frozen)
    flops = step_flops(MODEL, config, LENGTH)
    counted = sum(flop * count for _, flop, count in products(jaxpr))
    queries, keys, d = 32, 16, MODEL.hidden_size
    half_square = 2 * LENGTH**2 * queries
    qkv, rest = d * (queries + 2 * keys), d * queries + 3 * d * MODEL.intermediate_size
    centers = 3 + -(-(LENGTH - 3) // 4)
    # What the program computes beyond that: whole squares of scores, the teacher's last layer, the gradient of the
    # first layer's input (it scans over equal layers), logits once more, one-hot products, scores of later centers.
    surplus = half_square * ((4 - 1) + (4 - 2) + (8 - 4))
    surplus += 2 * LENGTH * (qkv + rest - 2 * d * keys) + 2 * LENGTH * qkv
    surplus += 2 * LENGTH * d * MODEL.vocab_size + 2 * MODEL.num_layers * 2 * LENGTH * centers * KV + flops.search
    assert counted == pytest.approx(flops.total + surplus, rel=1e-6)


def test_the_search_is_not_repeated_by_rematerialisation_and_16_bit_products_stay_so(frozen):
    _, jaxpr = gradient_jaxpr("full", jnp.bfloat16, frozen)
    centers = 3 + -(-(LENGTH - 3) // 4)
    search = 2 * LENGTH * centers * KV
    found = list(products(jaxpr))
    # Scores once a layer; the one-hot product forward, again, and its transpose, each as large.
    assert sum(count for _, flop, count in found if flop == search) == 4 * MODEL.num_layers
    weights = [types for types, flop, _ in found if flop >= 2 * LENGTH * MODEL.hidden_size * MODEL.hidden_size]
    attention = 2 * LENGTH**2 * 32
    wide = [types for types, flop, _ in found if jnp.float32 in types and flop not in (attention, search)]
    assert weights
    assert not wide


def test_detached_parts_give_no_gradient(frozen, plain):
    config, params = compressor(down_type="mlp_swiglu")
    (whole, _), together = plain
    apart = []
    for part in ("ce", "mse"):
        passes = TwoPass(MODEL, config, one_device(), jnp.float32, train_on=part)
        (loss, _), grads = value_and_grads(passes, params, frozen)
        np.testing.assert_allclose(loss, whole, rtol=1e-6)
        apart.append(grads)
    total = jax.tree.map(jnp.add, *apart)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), total, together)
    assert all(float(jnp.abs(leaf).max()) > 1e-5 for leaf in jax.tree.leaves(apart))


def test_steps_on_one_batch_reduce_the_error_and_accumulation_is_a_mean(frozen):
    config, params = compressor(kv_compressed_size=16)
    passes = TwoPass(MODEL, config, one_device(), jnp.float32)
    options = TrainOptions(max_steps=30, learning_rate=3e-2, dtype="float32")
    step = make_train_step(passes, options, 30)
    state = init_state(jax.tree.map(jnp.copy, params), options, 30)
    errors = []
    for _ in range(30):
        state, metrics = step(state, frozen, TOKENS[None], None)
        errors.append(float(metrics.mse))
    assert errors[-1] < 0.5 * errors[0]
    assert int(state.step) == 30
    # Two micro-batches of one row are one of two.
    _, apart = step(init_state(jax.tree.map(jnp.copy, params), options, 30), frozen, TOKENS[:, None], None)
    _, together = step(init_state(jax.tree.map(jnp.copy, params), options, 30), frozen, TOKENS[None], None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), apart, together)


def test_document_masks_keep_documents_apart(frozen):
    config, params = compressor(kv_compressed_size=KV)
    params = jax.tree.map(lambda leaf: jnp.broadcast_to(jnp.eye(KV), leaf.shape), params)
    passes = TwoPass(MODEL, config, one_device(), jnp.float32)
    half = LENGTH // 2
    documents = np.tile(np.arange(LENGTH) // half, (2, 1)).astype(np.int32)
    _, parts = jax.jit(passes.loss)(params, frozen, TOKENS, documents)
    # The same documents as rows of their own: keys turn with distances only, so where a document starts is no matter.
    expected, _ = jax.jit(dense)(TOKENS.reshape(4, half))
    np.testing.assert_allclose(parts.ce, expected, rtol=1e-5)


def test_stacks_of_layers_come_apart_again():
    config = CompressorConfig(num_layers=3, kv_dim=8, kv_compressed_size=2, bias=True)
    params = init_params(config, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, unstack_compressor(stack_compressor(params)), params)
    assert jax.tree.structure(abstract_params(config)) == jax.tree.structure(params)
