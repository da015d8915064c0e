"""Selection in the engine equals its definition: the dense model whose decoded queries see exactly what was chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from eviction_cases import (
    PROMPTS,
    SMALL_CHUNKS,
    WATCHED,
    assert_all_free,
    compression,
    finish,
    limited,
    name_of,
    one_by_one,
    run,
    tokens,
)
from eviction_oracle import GROUP, HEADS, LONGEST, Forward, Run, assert_logprobs, causal, forward
from tiny_engine import VOCAB

from sparsejax import CompressionParams, SamplingParams
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.errors import InvalidArgumentError

PAGE = 4
PROMPT = PROMPTS[0]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
FULL = CompressionParams()


def omnikv(top_tokens, **options) -> CompressionParams:
    """Layer 0 of two chooses for layer 1."""
    given = {"sink_tokens": 2, "recent_tokens": 4, "full_attention_layers": (0,)} | options
    return CompressionParams(method="omnikv", top_tokens=top_tokens, **given)


def quest(top_tokens, **options) -> CompressionParams:
    """Layer 1 of two chooses pages."""
    given = {"sink_tokens": 2, "recent_tokens": 4, "dense_layers": 1} | options
    return CompressionParams(method="quest", top_tokens=top_tokens, **given)


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm(methods=["full", "omnikv", "quest"], max_num_batched_tokens=64)


def seen(asked: CompressionParams, dense: Forward, position: int) -> np.ndarray:
    """bool[H, LONGEST]: what layer 1 reads for the query at a position, by the definition of the method."""
    length, top = position + 1, asked.policy.top_tokens
    sinks, last = asked.sinks, max(length - max(asked.recent_window, 1), asked.sinks)
    if isinstance(top, float):
        top = math.ceil(np.float32(top) * np.float32(last - sinks))
    mask = np.zeros((HEADS, LONGEST), bool)
    mask[:, :length] = True
    if asked.method == "omnikv":
        p = dense.p[0, :, position, sinks:last]
        most = (p / p.sum(-1, keepdims=True)).max(0)
        mask[:, sinks + np.argsort(-most, kind="stable")[min(top, last - sinks) :]] = False
        return mask
    first_page, last_page = -(-sinks // PAGE), max(last // PAGE, -(-sinks // PAGE))
    for head in range(HEADS):
        q = dense.q[1, position, head * GROUP : (head + 1) * GROUP]
        keys = [dense.k[1, page * PAGE : page * PAGE + PAGE, head] for page in range(first_page, last_page)]
        bounds = [np.maximum(q * k.min(0), q * k.max(0)).sum(-1).max() for k in keys]
        for rank in np.argsort(-np.asarray(bounds), kind="stable")[-(-top // PAGE) :]:
            page = first_page + rank
            mask[head, page * PAGE : page * PAGE + PAGE] = False
    return mask


CASES = [
    omnikv(8),
    omnikv(0.25),
    omnikv(1, sink_tokens=0, recent_tokens=0),
    omnikv(8, context_tokens=50),
    quest(8),
    quest(0.25, sink_tokens=0),
    quest(9, context_tokens=57),
]


@pytest.mark.parametrize("asked", CASES, ids=name_of)
def test_logits_are_those_of_the_dense_model_over_what_was_chosen(llm, params, asked):
    output = llm.generate(PROMPT, WATCHED, asked, use_tqdm=False)[0]
    served = Run(output)
    dense, mask = forward(params, served.text), causal()
    for position in range(asked.prefilled(len(PROMPT)), len(served.text)):
        mask[1, :, position] = seen(asked, dense, position)
    read = mask[1, :, asked.prefilled(len(PROMPT)) : len(served.text) - 1].sum(-1)
    assert read.max() < len(PROMPT)
    assert_logprobs(served, forward(params, served.text, mask))
    lengths = np.arange(asked.prefilled(len(PROMPT)) + 1, len(served.text))
    np.testing.assert_allclose(output.metrics.read_tokens, (lengths.mean() + read.mean()) / 2)
    assert output.metrics.kept_tokens is None
    assert_all_free(llm)


@pytest.mark.parametrize("asked", [omnikv(2048), quest(2048)], ids=name_of)
def test_choosing_everything_is_dense(llm, asked):
    dense, chosen = (llm.generate(PROMPTS[:2], WATCHED, each, use_tqdm=False) for each in (FULL, asked))
    for one, other in zip(dense, chosen, strict=True):
        assert other.outputs[0].token_ids == one.outputs[0].token_ids
        for mine, theirs in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert mine.keys() == theirs.keys()
            np.testing.assert_allclose(
                [mine[each].logprob for each in mine], [theirs[each].logprob for each in mine], rtol=1e-5, atol=1e-5
            )
        assert other.metrics.read_tokens == one.metrics.read_tokens


REQUESTS = [
    (PROMPTS[0], omnikv(8)),
    (PROMPTS[3], FULL),
    (PROMPTS[1], quest(8)),
    (PROMPTS[0], omnikv(0.5)),
    (PROMPTS[4], omnikv(3, sink_tokens=0, recent_tokens=1)),
    (PROMPTS[0], quest(0.2)),
    (PROMPTS[5], omnikv(20)),
    (PROMPTS[2], omnikv(4, context_tokens=9)),
]


@pytest.fixture(scope="module")
def alone(llm):
    return one_by_one(llm, REQUESTS)


def test_alone_equals_batched(llm, alone):
    assert len({tuple(alone[i]) for i in (0, 3, 5)}) == 3, "one prompt, three answers: selection shows"
    assert tokens(run(llm, REQUESTS)) == alone
    assert tokens(run(llm, REQUESTS[::-1]))[::-1] == alone
    assert tokens(run(llm, [REQUESTS[0]] * 4)) == [alone[0]] * 4
    assert_all_free(llm)


def test_chunked_equals_one_shot(make_llm, alone):
    chunked = limited(make_llm(methods=["full", "omnikv", "quest"], max_num_batched_tokens=64), **SMALL_CHUNKS)
    assert one_by_one(chunked, REQUESTS) == alone
    assert_all_free(chunked)


def test_beside_requests_that_evict(make_llm, alone):
    """Their tables are one a head, and their rows have dead slots."""
    llm = make_llm(methods=["full", "omnikv", "h2o"], max_num_batched_tokens=64)
    evicting = (PROMPTS[1], compression("h2o", strategy="no_op"))
    (apart,) = one_by_one(llm, [evicting])
    assert tokens(run(llm, [REQUESTS[0], evicting, REQUESTS[1]])) == [alone[0], apart, alone[1]]
    assert_all_free(llm)


def test_replayed_equals_uninterrupted(monkeypatch, llm, alone):
    """A step that fails makes all running requests start over; those that select decode their outputs again."""
    engine, calls = llm.engine, 0
    decode = engine.runner.decode

    def failing(*work):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise ConnectionError
        return decode(*work)

    monkeypatch.setattr(engine.runner, "decode", failing)
    submissions = [
        engine.add(str(i), TokenizedPrompt(None, prompt), GREEDY, asked) for i, (prompt, asked) in enumerate(REQUESTS)
    ]
    with pytest.raises(ConnectionError):
        finish(engine)
    finish(engine)
    outputs = [submission.output() for submission in submissions]
    assert sum(output.metrics.num_preemptions for output in outputs) >= 3
    assert tokens(outputs) == alone
    assert_all_free(llm)


def test_preempted_equals_uninterrupted(make_llm):
    """A dense request that came before grows until the others have to give their pages back."""
    llm = limited(make_llm(methods=["full", "omnikv", "quest"], max_num_batched_tokens=64), num_free_entries=23)
    longer = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    for asked in (omnikv(8), quest(8)):
        (expected,) = one_by_one(llm, [(PROMPTS[2], asked)], longer)
        dense, other = run(llm, [(PROMPTS[1], FULL), (PROMPTS[2], asked)], longer)
        assert (dense.metrics.num_preemptions, other.metrics.num_preemptions) == (0, 1)
        assert tokens([other]) == [expected]
        assert_all_free(llm)


def test_prompts_are_shared_and_what_was_decoded_is_not(llm, alone):
    llm.reset_prefix_cache()
    first = run(llm, [REQUESTS[3]])[0]
    assert first.metrics.num_cached_tokens == 0
    again, other = run(llm, [REQUESTS[0]])[0], run(llm, [(PROMPT, FULL)])[0]
    assert again.metrics.num_cached_tokens == other.metrics.num_cached_tokens == len(PROMPT) - 1
    assert tokens([again]) == [alone[0]]
    longer = [*PROMPT, *tokens([first])[0], 5, 6]
    turn = run(llm, [(longer, omnikv(8))])[0]
    assert turn.metrics.num_cached_tokens >= len(PROMPT)
    llm.reset_prefix_cache()
    assert tokens(run(llm, [(longer, omnikv(8))])) == tokens([turn])
    llm.reset_prefix_cache()
    run(llm, [REQUESTS[3]])
    assert run(llm, [(longer, omnikv(8))])[0].metrics.num_cached_tokens <= len(PROMPT)


def test_serving_compiles_nothing_after_a_warm_up(make_llm):
    llm = make_llm(methods=["full", "omnikv"], default_compression=omnikv(8), warmup="greedy", max_num_seqs=2)
    before = llm.engine.runner.compilations
    requests = [(prompt, omnikv(top)) for prompt, top in zip(PROMPTS, (3, 0.1, 40, 8, 2048, 1), strict=True)]
    run(llm, [*requests, (PROMPTS[0], FULL), *requests])
    assert llm.engine.runner.compilations == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (omnikv(8, full_attention_layers=(0, 2)), "full_attention_layers has layer 2; this model's layers are 0 to 1"),
        (quest(8, dense_layers=2), "dense_layers must be less than 2"),
    ],
)
def test_layers_must_be_the_models(llm, asked, message):
    with pytest.raises(InvalidArgumentError, match=message):
        llm.generate(PROMPT, GREEDY, asked, use_tqdm=False)
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize("wanted", [{"repetition_penalty": 1.1}, {"prompt_logprobs": 0}])
def test_what_needs_the_whole_prompt_in_chunks_is_refused_where_it_is_decoded(llm, wanted):
    with pytest.raises(InvalidArgumentError, match=f"where {min(wanted)} is not available"):
        llm.generate(PROMPT, SamplingParams(**wanted), omnikv(8, context_tokens=20), use_tqdm=False)


def test_penalties_count_what_was_generated(llm):
    """Forced tokens of the prompt are none of it."""
    prompt = [*range(3, 30), 7, 7, 7]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, presence_penalty=2.0, frequency_penalty=2.0)
    whole, decoded = (run(llm, [(prompt, omnikv(2048, context_tokens=context))], params)[0] for context in (None, 25))
    assert tokens([whole]) == tokens([decoded])
    assert max(tokens([whole])[0]) < VOCAB
