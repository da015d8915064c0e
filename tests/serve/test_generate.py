"""The jitted loop gives the engine's tokens, and ends answers where the engine ends them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine.tiny_engine import CONFIG, ENGINE, VOCAB

from serve.generate import generate, layout_for
from sparsejax import LLM, SamplingParams
from sparsejax.errors import EmptyPromptError, InvalidArgumentError, NotFiniteError, PromptTooLongError
from sparsejax.models import init_params

RNG = np.random.default_rng(3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPTS = [RNG.integers(3, VOCAB, size).tolist() for size in (7, 1, 19, 4)]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, init_params(CONFIG, jax.random.key(5), jnp.float32))


@pytest.fixture(scope="module")
def llm(params):
    return LLM.from_params(CONFIG, params, **ENGINE)


def engine_tokens(llm, prompts, sampling) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, sampling, use_tqdm=False)]


def test_every_way_to_end_an_answer(params, llm):
    """End tokens, stop ids, minimum lengths and limits of their own, in one batch."""
    free = [SamplingParams(temperature=1.0, seed=seed, max_tokens=24, ignore_eos=True) for seed in range(40)]
    by_seed = engine_tokens(llm, [PROMPTS[0]] * len(free), free)
    eos = CONFIG.eos_token_ids[0]
    seed = next(seed for seed, answer in enumerate(by_seed) if eos in answer[1:10])
    end = by_seed[seed].index(eos)
    stop = by_seed[0][6]
    asked = [
        SamplingParams(temperature=1.0, seed=seed, max_tokens=24),
        SamplingParams(temperature=1.0, seed=0, max_tokens=20, ignore_eos=True, stop_token_ids=[60, stop]),
        SamplingParams(temperature=1.0, seed=seed, max_tokens=22, min_tokens=end + 2),
        SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True),
    ]
    prompts = [PROMPTS[0]] * 3 + PROMPTS[2:3]
    answers = generate(CONFIG, params, prompts, asked, page_size=4)
    assert answers == engine_tokens(llm, prompts, asked)
    assert answers[0] == by_seed[seed][: end + 1]
    assert answers[1][-1] in (60, stop)
    assert answers[1] == by_seed[0][: len(answers[1])]
    assert answers[2][:end] == by_seed[seed][:end]
    assert eos not in answers[2][: end + 2]
    assert len(answers[3]) == 1


def test_logits_that_are_not_finite_are_named_with_their_prompt(params):
    damaged = {**params, "embed": params["embed"].at[5].set(jnp.nan)}
    with pytest.raises(NotFiniteError, match="the logits of prompt 1 are NaN or infinite after 0 generated tokens"):
        generate(CONFIG, damaged, [[7, 8], [5, 6]], SamplingParams(temperature=0.0, max_tokens=3), page_size=4)


def test_greedy_and_tables_of_another_shape(params, llm):
    expected = engine_tokens(llm, PROMPTS[:2], GREEDY)
    assert generate(CONFIG, params, PROMPTS[:2], GREEDY) == expected
    assert generate(CONFIG, params, PROMPTS[:2], GREEDY, page_size=8, table_granularity="per_head") == expected


def test_unseeded_prompts_draw_apart_as_in_a_fresh_engine(params):
    sampling = SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
    answers = generate(CONFIG, params, [PROMPTS[0]] * 2, sampling)
    assert answers[0] != answers[1]
    fresh = LLM.from_params(CONFIG, params, **ENGINE)
    assert engine_tokens(fresh, [PROMPTS[0]] * 2, sampling) == answers


def test_an_answer_ends_where_the_positions_end(params):
    (answer,) = generate(CONFIG, params, [[5] * 124], GREEDY)
    assert len(answer) == CONFIG.max_position_embeddings - 124


@pytest.mark.parametrize(
    ("prompts", "sampling", "error", "words"),
    [
        ([[1], []], GREEDY, EmptyPromptError, "prompt 1 is empty"),
        ([[1, VOCAB]], GREEDY, InvalidArgumentError, f"token id {VOCAB}"),
        (["text"], GREEDY, InvalidArgumentError, "prompt 0 is text: this loop takes token ids"),
        ([[1], [2]], [GREEDY], InvalidArgumentError, "sampling has 1 items for 2 prompts"),
        ([[1]], SamplingParams(stop="x"), InvalidArgumentError, "stop strings"),
        ([[1]], SamplingParams(stop_token_ids=[VOCAB]), InvalidArgumentError, f"stop_token_ids with id {VOCAB}"),
        ([[1]], SamplingParams(n=2), InvalidArgumentError, "n > 1"),
        ([[1]], SamplingParams(logprobs=2), InvalidArgumentError, "log-probabilities"),
        ([[1] * 128], GREEDY, PromptTooLongError, "positions reach 128"),
    ],
)
def test_what_the_loop_refuses(params, prompts, sampling, error, words):
    with pytest.raises(error, match=words):
        generate(CONFIG, params, prompts, sampling)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"page_size": 3}, "page_size must be a power of two"),
        ({"table_granularity": "x"}, "table_granularity must be one of"),
        ({"implementation": "foo"}, "implementation must be one of 'triton', 'xla'"),
    ],
    ids=str,
)
def test_arguments_are_checked_as_the_engines_are(params, argument, words):
    with pytest.raises(InvalidArgumentError, match=words):
        generate(CONFIG, params, [[1]], GREEDY, **argument)


def test_no_prompts_no_answers(params):
    assert generate(CONFIG, params, [], GREEDY) == []


@pytest.mark.parametrize("granularity", ["shared", "per_layer", "per_head"])
def test_the_cache_is_made_to_measure(granularity):
    layout = layout_for(CONFIG, 3, 21, page_size=4, granularity=granularity, dtype=jnp.float32)
    assert layout.num_entries - 1 >= 3 * layout.entries_for(21)
    slack = layout.num_entries - 1 - 3 * layout.entries_for(21)
    assert slack * layout.pages_per_entry < CONFIG.num_layers * CONFIG.num_kv_heads, "no more than the null entry"
