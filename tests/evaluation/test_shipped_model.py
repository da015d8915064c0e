"""The embedded model does what its card says: it answers the tasks on held-out seeds."""

import json

import jax.numpy as jnp
import pytest
from transformers import AutoTokenizer

from sparsejax.assets import tiny_model_path
from sparsejax.evaluation import TASKS, evaluate, mean_scores
from sparsejax.models import ModelConfig
from train.export import load_params
from train.forward import greedy_answers

LENGTH = 512


def test_package_data_is_complete_and_small():
    files = {path.name: path.stat().st_size for path in tiny_model_path().iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files.keys() == expected | {"README.md"}
    assert sum(files.values()) < 25e6


@pytest.fixture(scope="module")
def model():
    config = ModelConfig.from_hf(json.loads((tiny_model_path() / "config.json").read_text()))
    return config, load_params(tiny_model_path(), config)


def test_answers_held_out_questions(model):
    config, params = model
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())

    def generate(prompts):
        return greedy_answers(
            config,
            params,
            prompts,
            max_tokens=6,
            end_id=tokenizer.eos_token_id,
            padded_length=LENGTH,
            dtype=jnp.float32,
        )

    rows = evaluate(generate, tokenizer, lengths=(LENGTH,), samples=1, seed=99, batch_size=6, progress=False)
    assert [row.task for row in rows] == list(TASKS)
    assert mean_scores(rows)[LENGTH] >= 0.9
