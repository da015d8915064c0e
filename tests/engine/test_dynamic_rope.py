"""Dynamic-NTK RoPE: the base of a prompt's tokens is set by its whole length, however the prompt is computed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, ENGINE, VOCAB

from serve.generate import generate
from sparsejax import LLM, SamplingParams
from sparsejax.models import Decoder, RopeConfig, dense_causal_attend, init_params

ORIGINAL = 16
DYNAMIC = dataclasses.replace(
    CONFIG,
    max_position_embeddings=ORIGINAL,
    rope=RopeConfig(kind="dynamic", factor=8.0, original_max_position_embeddings=ORIGINAL),
)
RNG = np.random.default_rng(1)
PROMPTS = [RNG.integers(3, VOCAB, size).tolist() for size in (41, 12, 30)]  # the second grows over ORIGINAL
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
LONGEST = 8 * ORIGINAL


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, init_params(DYNAMIC, jax.random.key(7), jnp.float32))


@pytest.fixture(scope="module")
def make_llm(params):
    return lambda **engine: LLM.from_params(DYNAMIC, params, **(ENGINE | {"max_model_len": LONGEST} | engine))


@pytest.fixture(scope="module")
def expected(make_llm):
    """Alone, each prompt in one chunk."""
    llm = make_llm(max_num_batched_tokens=64)
    return [llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS]


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def test_the_base_does_change_the_tokens(params, expected):
    plain = dataclasses.replace(DYNAMIC, rope=RopeConfig(), max_position_embeddings=LONGEST)
    assert generate(plain, params, PROMPTS[:1], GREEDY) != expected[:1]


def test_first_token_is_that_of_a_dense_pass(params, expected):
    """One pass over the prompt in which every token takes the base of the whole prompt."""

    @jax.jit
    def last_logits(tokens):
        index = jnp.arange(len(tokens), dtype=jnp.int32)
        args = (tokens, index, None, dense_causal_attend(1, DYNAMIC.head_dim**-0.5))
        lengths = jnp.full_like(index, len(tokens))
        return Decoder(DYNAMIC, jnp.float32).apply({"params": params}, *args, rope_lengths=lengths)[0][-1]

    assert int(last_logits(jnp.asarray(PROMPTS[0])).argmax()) == expected[0][0]


def test_chunked_and_preempted_equal_one_shot(make_llm, expected):
    llm = make_llm(max_num_batched_tokens=7, num_pages=4 * 28)  # 27 entries: enough to admit all, not to finish them
    assert [tokens(llm.generate(prompt, GREEDY, use_tqdm=False))[0] for prompt in PROMPTS] == expected
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens(outputs) == expected
    assert sum(output.metrics.num_preemptions for output in outputs) > 0


def test_engine_equals_jitted_loop(params, expected):
    assert generate(DYNAMIC, params, PROMPTS, GREEDY) == expected
