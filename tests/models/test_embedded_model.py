"""The embedded model decodes greedily in bfloat16 to the tokens that transformers gives."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import sparsejax
from sparsejax.checkpoint import load_model
from sparsejax.models import Decoder, dense_causal_attend

FOLDER = Path(sparsejax.__file__).parent / "assets" / "tiny"
PROMPT, ANSWER = 96, 16


def test_greedy_tokens_equal_transformers_in_bfloat16():
    config, params = load_model(FOLDER, dtype=jnp.bfloat16)
    prompt = np.random.default_rng(0).integers(3, config.vocab_size, PROMPT)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        expected = model.generate(
            torch.tensor(prompt)[None], do_sample=False, max_new_tokens=ANSWER, min_new_tokens=ANSWER, eos_token_id=None
        )[0].numpy()

    @jax.jit
    def greedy(tokens):  # each answer token after the ones before it, so one pass decides all
        index = jnp.arange(PROMPT - 1, PROMPT + ANSWER - 1)
        args = (tokens, jnp.arange(len(tokens)), None, dense_causal_attend(1))
        logits, _ = Decoder(config, jnp.bfloat16).apply({"params": params}, *args, logit_index=index)
        return jnp.argmax(logits, axis=-1)

    np.testing.assert_array_equal(greedy(jnp.asarray(expected)), expected[PROMPT:])
