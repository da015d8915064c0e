"""A few training steps at toy size, and the layout on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.checkpoint import load_model
from sparsejax.models import ModelConfig, init_params
from train.data import token_count, training_batch
from train.export import from_hf_tensors, load_params, save_model, to_hf_tensors
from train.forward import Optimizer, TrainState, answers_right, forward, make_train_step
from train.recipe import Recipe, tiny_config
from train.tiny_model import main
from train.tokenizer import END_ID, train_tokenizer

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=2048,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    tie_embeddings=True,
    eos_token_ids=(END_ID,),
    bos_token_id=1,
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0), jnp.float32)


def test_a_few_steps_reduce_both_losses(tokenizer, params):
    optimizer = Optimizer()
    step = make_train_step(CONFIG, optimizer)
    state = TrainState(jax.tree.map(jnp.copy, params), optimizer.transformation().init(params))
    history = []
    for index in range(12):
        batch = training_batch(tokenizer, token_count(tokenizer), seed=0, index=index, rows=4, length=128)
        state, metrics = step(state, jnp.asarray(batch.tokens), jnp.asarray(batch.kinds), jnp.float32(1e-2))
        history.append((float(metrics.answer_loss), float(metrics.text_loss)))
    first, last = np.array(history[0]), np.array(history[-1])
    assert (last < first - 1.0).all()
    assert history[0][1] == pytest.approx(np.log(CONFIG.vocab_size), abs=0.3)


def test_answers_right_agrees_with_argmax(tokenizer, params):
    tokens = jnp.asarray(training_batch(tokenizer, token_count(tokenizer), seed=0, index=0, rows=2, length=128).tokens)
    best = jnp.argmax(forward(CONFIG, params, tokens), axis=-1)
    kinds = np.zeros((2, 128), np.uint8)
    kinds[:, 5] = 2
    # A row whose token 6 is what the model predicts after token 5 is right; with any other token it is wrong.
    tokens = tokens.at[0, 6].set(best[0, 5]).at[1, 6].set((best[1, 5] + 1) % CONFIG.vocab_size)
    assert answers_right(CONFIG, params, tokens, jnp.asarray(kinds)).tolist() == [True, False]


def test_hugging_face_names_invert(params):
    back = from_hf_tensors(CONFIG, to_hf_tensors(CONFIG, params))
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))


def test_a_saved_model_loads_through_the_package(tmp_path, tokenizer, params):
    save_model(tmp_path, CONFIG, params, tokenizer, card="# card\n")
    config, loaded = load_model(tmp_path, dtype=jnp.float32)
    assert config == CONFIG
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf.astype(jnp.bfloat16), np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded), rounded)
    jax.tree.map(np.testing.assert_array_equal, load_params(tmp_path, config), rounded)
    assert (tmp_path / "README.md").read_text() == "# card\n"


def test_the_recipe_describes_the_shipped_architecture():
    config = tiny_config(Recipe(), 2048)
    count = sum(
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(lambda k: init_params(config, k, jnp.bfloat16), jax.random.key(0)))
    )
    assert 4e6 < count < 12e6
    assert config.group_size == 4
    assert config.head_dim == 64


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--out", "--minutes", "--init", "--seed", "--lengths"))
