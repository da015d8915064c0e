"""Prefix caching in the engine: the tokens are those of an engine without it, only computed less often."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import CONFIG, VOCAB

from sparsejax import SamplingParams
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.errors import InvalidArgumentError
from sparsejax.models import RopeConfig

RNG = np.random.default_rng(1)
SYSTEM = RNG.integers(3, VOCAB, 41).tolist()
PROMPTS = [
    SYSTEM[:shared] + RNG.integers(3, VOCAB, own).tolist() for shared, own in ((41, 5), (41, 9), (22, 7), (41, 1))
]
PROMPTS += [PROMPTS[0], SYSTEM[:30], RNG.integers(3, VOCAB, 18).tolist(), PROMPTS[1][:45]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PARAMS = [
    GREEDY,
    SamplingParams(temperature=1.0, seed=1, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, max_tokens=11, ignore_eos=True),
    SamplingParams(
        temperature=1.0, presence_penalty=0.5, frequency_penalty=0.7, seed=4, max_tokens=10, ignore_eos=True
    ),
    SamplingParams(temperature=0.7, top_k=5, seed=2, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.0, min_tokens=6, max_tokens=8),
    GREEDY,
    SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True),
]
SCARCE = 4 * 20  # pages: 19 table entries of 4 tokens


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm()


@pytest.fixture(scope="module")
def alone(make_llm):
    """What an engine without prefix caching gives, one prompt at a time. (As many rows: the same compiled steps.)"""
    off = make_llm(enable_prefix_caching=False, max_num_seqs=8)
    outputs = [off.generate(prompt, params, use_tqdm=False)[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    assert all(output.metrics.num_cached_tokens == 0 for output in outputs)
    assert off.engine.prefix_cache_stats.queries == 0
    assert off.engine.scheduler.free_entries == off.engine.scheduler.config.num_free_entries
    return [output.outputs[0].token_ids for output in outputs]


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def assert_all_free_after_reset(llm) -> None:
    llm.reset_prefix_cache()
    llm.engine.step()
    cache = llm.engine.runner.cache
    assert int(cache.free.count) == llm.engine.scheduler.free_entries == cache.layout.num_entries - 1
    assert not cache.table.length.any()
    assert not cache.free.references.any()
    assert llm.engine.prefix_cache_stats.resident_rows == 0


def prefilled(llm, monkeypatch) -> list[int]:
    """Counts, from now on, the tokens of each prefill step."""
    counts = []

    def counted(run):
        return lambda chunks, *decodes: (counts.append(sum(c.count for c in chunks)), run(chunks, *decodes))[1]

    for step in ("prefill", "mixed"):
        monkeypatch.setattr(llm.engine.runner, step, counted(getattr(llm.engine.runner, step)))
    return counts


def test_on_equals_off(llm, alone):
    for _ in range(2):
        assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == alone
    stats = llm.engine.prefix_cache_stats
    assert stats.queries == 16
    assert stats.hits >= 8
    assert stats.resident_rows > 0
    assert_all_free_after_reset(llm)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_traces_equal_off(make_llm, alone, data):
    """Scarce pages, shared prefixes, arrivals and cancellations at any time: survivors get their tokens."""
    llm = make_llm(num_pages=SCARCE)
    engine, pending, submissions, cancelled = llm.engine, list(range(len(PROMPTS))) * 2, {}, set()
    while pending or engine.has_unfinished:
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "cancel"]), label="action")
        if action == "add" and pending:
            i = pending.pop(0)
            name = f"{i}-{len(pending)}"
            submissions[name] = i, engine.add(name, TokenizedPrompt(None, PROMPTS[i]), PARAMS[i])
        elif action == "cancel" and submissions and len(cancelled) < 3:
            name = data.draw(st.sampled_from(sorted(submissions)), label="which")
            if not submissions[name][1].finished:
                engine.cancel(submissions[name][1])
                cancelled.add(name)
        else:
            engine.step()
    for name, (i, submission) in submissions.items():
        got = submission.output().outputs[0].token_ids
        assert got == (alone[i][: len(got)] if name in cancelled else alone[i])
    assert_all_free_after_reset(llm)


def test_replays_take_their_prefix_from_the_cache(make_llm, alone):
    llm = make_llm(num_pages=SCARCE)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert tokens(outputs) == alone
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert llm.engine.prefix_cache_stats.evictions > 0
    assert_all_free_after_reset(llm)


def test_a_shared_prompt_is_prefilled_once(make_llm, monkeypatch):
    llm = make_llm()
    counts = prefilled(llm, monkeypatch)
    prompts = [[*SYSTEM, 3 + i, 40, 41] for i in range(12)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.metrics.num_cached_tokens for output in outputs] == [0] + [41] * 11
    assert sum(counts) == 41 + 12 * 3
    assert_all_free_after_reset(llm)


def test_only_the_rest_of_a_known_text_is_computed(make_llm, monkeypatch):
    llm = make_llm()
    first = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]
    counts = prefilled(llm, monkeypatch)
    again = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]
    assert (again.metrics.num_cached_tokens, sum(counts)) == (len(PROMPTS[0]) - 1, 1)
    turn = [*PROMPTS[0], *first.outputs[0].token_ids, 5, 6, 7]
    answer = llm.generate(turn, GREEDY, use_tqdm=False)[0]
    assert answer.metrics.num_cached_tokens == len(turn) - 4, "all but the answer's last token and the new ones"
    llm.reset_prefix_cache()
    assert llm.generate(turn, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == answer.outputs[0].token_ids


def test_several_answers_share_their_prompt(llm):
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=6, n=3, ignore_eos=True)
    output = llm.generate(PROMPTS[6], params, use_tqdm=False)[0]
    assert output.metrics.num_cached_tokens == 2 * (len(PROMPTS[6]) - 1)
    assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1


def test_prompt_logprobs_are_complete_and_the_same(llm):
    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    first, again = (llm.generate(PROMPTS[2], params, use_tqdm=False)[0] for _ in range(2))
    assert again.metrics.num_cached_tokens == 0
    assert again.prompt_logprobs == first.prompt_logprobs
    assert len(again.prompt_logprobs) == len(PROMPTS[2])
    plain = llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)[0]
    assert plain.metrics.num_cached_tokens == len(PROMPTS[2]) - 1, "its row is cached for others"


def test_a_row_remembers_nothing_of_its_last_request(llm, alone):
    """Penalties count tokens by row: a forked row must not inherit the counts of whoever used it before."""
    for order in ((2, 3, 0), (3, 3, 2), (0, 3, 3)):
        for i in order:
            assert tokens(llm.generate(PROMPTS[i], PARAMS[i], use_tqdm=False)) == [alone[i]]


def test_dynamic_rope_shares_nothing(params):
    from dataclasses import replace

    from sparsejax import LLM

    rope = RopeConfig(kind="dynamic", factor=2.0, original_max_position_embeddings=64)
    llm = LLM.from_params(replace(CONFIG, rope=rope), params, max_num_seqs=4, page_size=4, num_pages=400)
    assert llm.engine.scheduler.config.max_resident_rows == 0


def test_configuration(make_llm):
    assert make_llm(max_resident_rows=3).engine.runner.layout.max_rows == 7
    assert make_llm(enable_prefix_caching=False).engine.runner.layout.max_rows == 4
    with pytest.raises(InvalidArgumentError, match="max_resident_rows"):
        make_llm(max_resident_rows=0)
    assert CompressionParams().method == "full", "the only method whose rows are shared: see prefix_cache.may_share"
