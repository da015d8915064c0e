"""Many questions over one compressed context: it is compressed once, shared, and no question has a say in it."""

from __future__ import annotations

import numpy as np
import pytest
from eviction_cases import ENGINE, GREEDY, METHODS, PROMPTS, RNG, assert_all_free, compression, name_of, tokens
from eviction_oracle import assert_greedy, forward, held, serve
from tiny_engine import VOCAB

from sparsejax import SamplingParams
from sparsejax.engine.requests.inputs import TokenizedPrompt

CONTEXT = PROMPTS[0][:50]
QUESTIONS = [RNG.integers(3, VOCAB, size).tolist() for size in (9, 4, 13)]
PROMPTS_OVER_IT = [CONTEXT + question for question in QUESTIONS]
ASKED = [compression(method, context_tokens=len(CONTEXT)) for method in METHODS]
# What is compressed again behind the context cannot be shared.
SHARED = [asked for asked in ASKED if asked.once]


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm(**ENGINE)


@pytest.fixture(scope="module")
def computed(llm):
    """What each question gets when nothing is shared: the context is forgotten before each."""

    def one(prompt, asked):
        llm.reset_prefix_cache()
        output = llm.generate(prompt, GREEDY, asked, use_tqdm=False)[0]
        assert output.metrics.num_cached_tokens == 0
        return output.outputs[0].token_ids

    return lambda asked: [one(prompt, asked) for prompt in PROMPTS_OVER_IT]


def cached(outputs) -> list[int]:
    return [output.metrics.num_cached_tokens for output in outputs]


@pytest.mark.parametrize("asked", SHARED, ids=name_of)
def test_later_questions_fork_the_compressed_context(llm, computed, asked):
    expected = computed(asked)
    llm.reset_prefix_cache()
    outputs = [llm.generate(prompt, GREEDY, asked, use_tqdm=False)[0] for prompt in PROMPTS_OVER_IT]
    assert cached(outputs) == [0, len(CONTEXT), len(CONTEXT)]
    assert [output.metrics.num_compressions for output in outputs] == [1, 0, 0]
    first, *others = (output.metrics for output in outputs)
    assert 0 < first.kv_bytes_after_compression < first.kv_bytes_before_compression
    for metrics in others:
        assert metrics.kept_tokens == first.kept_tokens
        assert metrics.kv_bytes_before_compression == first.kv_bytes_before_compression
        assert metrics.kv_bytes_after_compression == first.kv_bytes_after_compression
    assert tokens(outputs) == expected
    llm.reset_prefix_cache()
    together = llm.generate(PROMPTS_OVER_IT, GREEDY, asked, use_tqdm=False)
    assert tokens(together) == expected
    assert cached(together).count(len(CONTEXT)) == 2, "the others wait for the first, then take over its context"
    assert_all_free(llm)


def test_without_prefix_caching_every_question_compresses(make_llm, computed):
    off = make_llm(**ENGINE, enable_prefix_caching=False, max_num_seqs=8)
    asked = SHARED[[each.method for each in SHARED].index("snapkv")]
    outputs = [off.generate(prompt, GREEDY, asked, use_tqdm=False)[0] for prompt in PROMPTS_OVER_IT]
    assert cached(outputs) == [0, 0, 0]
    assert tokens(outputs) == computed(asked)
    assert_all_free(off)


@pytest.mark.parametrize("asked", ASKED, ids=name_of)
def test_the_question_does_not_change_what_is_kept(llm, asked):
    """Of the context, before the question is computed."""
    rows = []
    for question in QUESTIONS:
        llm.reset_prefix_cache()
        run = serve(llm, CONTEXT + question, GREEDY, asked)
        rows.append(next(row for row in run.after if row.length == len(CONTEXT)))
    for row in rows:
        assert row.live.sum() < 4 * len(CONTEXT)
        np.testing.assert_array_equal(row.live, rows[0].live)
        np.testing.assert_array_equal(row.score, rows[0].score)
    assert_all_free(llm)


def test_contexts_differ_by_text_parameters_and_seed(llm):
    snapkv = compression("snapkv", context_tokens=50)
    drawn = compression("random", context_tokens=50, compress_once=True)
    seeded = [SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, seed=seed) for seed in (1, 2)]
    other = [*CONTEXT[:49], CONTEXT[49] % (VOCAB - 4) + 3]
    assert other != CONTEXT
    llm.reset_prefix_cache()
    for prompt, params, asked, expected in (
        (PROMPTS_OVER_IT[0], GREEDY, snapkv, 0),
        (PROMPTS_OVER_IT[1], GREEDY, snapkv, 50),
        (PROMPTS_OVER_IT[1], GREEDY, compression("snapkv", 25, context_tokens=50), 0),
        (PROMPTS_OVER_IT[1], GREEDY, compression("snapkv", context_tokens=49), 0),
        (other + QUESTIONS[0], GREEDY, snapkv, 0),
        (CONTEXT, GREEDY, snapkv, 0),  # nothing would be left to compute
        (PROMPTS_OVER_IT[0], seeded[0], drawn, 0),
        (PROMPTS_OVER_IT[0], seeded[1], drawn, 0),
        (PROMPTS_OVER_IT[1], seeded[0], drawn, 50),
    ):
        assert cached(llm.generate(prompt, params, asked, use_tqdm=False)) == [expected]
    assert_all_free(llm)


def test_a_forked_context_is_left_as_it_is(llm, params):
    """Forks append behind a partly filled page that they share with the copy and with each other."""
    asked = compression("snapkv", 22, context_tokens=50)
    llm.reset_prefix_cache()
    run = serve(llm, PROMPTS_OVER_IT[0], GREEDY, asked)
    assert_greedy(run, forward(params, run.text, run.mask()))
    engine = llm.engine
    submissions = [
        engine.add(str(i), TokenizedPrompt(None, prompt), GREEDY, asked) for i, prompt in enumerate(PROMPTS_OVER_IT)
    ]
    kept = next(row for row in run.after if row.length == 50)
    while not all(each.num_generated_tokens for each in submissions):
        engine.step()
    for submission in submissions:
        request = submission.answers[0].request
        row = held(engine.runner.cache, request.row, request.num_computed)
        np.testing.assert_array_equal(row.live[..., :50], kept.live[..., :50])
        assert row.live[..., 50 : request.num_computed].all()
    while engine.has_unfinished:
        engine.step()
    assert cached([each.output() for each in submissions]) == [50, 50, 50]
    assert submissions[0].output().outputs[0].token_ids == run.output.outputs[0].token_ids
    assert_all_free(llm)


def test_a_context_longer_than_the_pool_is_shared(make_llm):
    """It is compressed between its chunks, and its figures are read while the copy that stays is taken."""
    context = np.random.default_rng(3).integers(3, VOCAB, 100).tolist()
    asked = compression("keydiff", 12, context_tokens=len(context))
    answers = []
    for caching in (False, True):
        options = {"methods": ["keydiff"], "num_pages": 4 * 24, "enable_prefix_caching": caching}
        llm = make_llm(**ENGINE | options | {"max_num_batched_tokens": 32})
        outputs = [llm.generate(context + question, GREEDY, asked, use_tqdm=False)[0] for question in QUESTIONS[:2]]
        assert cached(outputs) == [0, len(context) if caching else 0]
        first, second = (output.metrics for output in outputs)
        assert first.num_compressions > 1
        for told in ("kept_tokens", "kv_pages_before_compression", "kv_bytes_after_compression"):
            assert getattr(first, told) == getattr(second, told)
        answers.append(tokens(outputs))
        assert_all_free(llm)
    assert answers[0] == answers[1]
