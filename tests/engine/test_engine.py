"""The engine as a whole: whatever else happens to a request, its tokens are those it would get alone."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import CONFIG, ENGINE, VOCAB

from serve.generate import generate
from sparsejax import LLM, CompressionParams, SamplingParams
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.errors import InvalidArgumentError, PromptTooLongError, UnknownArgumentError
from sparsejax.models import Decoder, dense_causal_attend

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, VOCAB, size).tolist() for size in (5, 3, 50, 21, 1, 33, 12)]
SCARCE = 4 * 20  # pages: 19 table entries of 4 tokens, for prompts of up to 50 tokens
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
MIXED = [
    GREEDY,
    SamplingParams(temperature=1.0, seed=1, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.7, top_k=5, seed=2, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.3, top_p=0.8, min_p=0.02, seed=3, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, max_tokens=11, ignore_eos=True),
    SamplingParams(
        temperature=1.0, presence_penalty=0.5, frequency_penalty=0.7, seed=4, max_tokens=10, ignore_eos=True
    ),
    SamplingParams(temperature=0.0, min_tokens=6, max_tokens=8),
]


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def assert_all_free(llm) -> None:
    cache = llm.engine.runner.cache
    llm.engine.reset_prefix_cache()
    llm.engine.runner.release(llm.engine.scheduler.schedule().release)
    assert int(llm.engine.runner.cache.free.count) == cache.layout.num_entries - 1
    assert llm.engine.scheduler.free_entries == cache.layout.num_entries - 1
    assert not llm.engine.has_unfinished


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm()


@pytest.fixture(scope="module")
def alone(llm):
    """What each prompt gets with each parameter set when nothing else runs."""
    return [
        tokens(llm.generate(prompt, params, use_tqdm=False))[0] for prompt, params in zip(PROMPTS, MIXED, strict=True)
    ]


def test_alone_equals_batched(llm, alone):
    assert tokens(llm.generate(PROMPTS, MIXED, use_tqdm=False)) == alone
    assert_all_free(llm)


def test_engine_equals_jitted_loop(params, alone):
    assert generate(CONFIG, params, PROMPTS, MIXED) == alone


def test_chunked_equals_one_shot(make_llm, alone):
    assert tokens(make_llm(max_num_batched_tokens=7).generate(PROMPTS, MIXED, use_tqdm=False)) == alone


@pytest.mark.parametrize(("page_size", "granularity"), [(1, "shared"), (32, "per_layer"), (4, "per_head")])
def test_layout_does_not_change_tokens(make_llm, llm, page_size, granularity):
    other = make_llm(page_size=page_size, num_pages=None, table_granularity=granularity)
    expected = tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False))
    assert tokens(other.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
    again = other.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert tokens(again) == expected, "with prefixes from the cache"
    assert sum(output.metrics.num_cached_tokens for output in again) > 0
    assert_all_free(other)


def test_preempted_equals_uninterrupted(make_llm, alone):
    llm = make_llm(num_pages=SCARCE)
    outputs = llm.generate(PROMPTS, MIXED, use_tqdm=False)
    assert tokens(outputs) == alone
    assert sum(output.metrics.num_preemptions for output in outputs) > 0
    assert_all_free(llm)


def test_cancelled_requests_harm_nobody(llm, alone):
    engine = llm.engine
    submissions = [
        engine.add(f"cancel-{i}", TokenizedPrompt(None, prompt), params)
        for i, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True))
    ]
    for step in range(40):
        engine.step()
        if step < 3:
            engine.cancel(submissions[2 * step])
    for i, submission in enumerate(submissions):
        answer = submission.output().outputs[0]
        assert submission.finished
        if i in (0, 2, 4):
            assert answer.finish_reason == "abort"
            assert answer.token_ids == alone[i][: len(answer.token_ids)]
        else:
            assert answer.token_ids == alone[i]
    assert_all_free(llm)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_arrivals_and_cancellations(make_llm, alone, data):
    """Scarce pages, arrivals at any time, cancellations at any time: survivors get their tokens, nothing leaks."""
    llm = make_llm(num_pages=SCARCE)
    engine, pending, submissions, cancelled = llm.engine, list(range(len(PROMPTS))), {}, set()
    while pending or engine.has_unfinished:
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "cancel"]), label="action")
        if action == "add" and pending:
            i = pending.pop(0)
            submissions[i] = engine.add(str(i), TokenizedPrompt(None, PROMPTS[i]), MIXED[i])
        elif action == "cancel" and submissions and len(cancelled) < 2:
            i = data.draw(st.sampled_from(sorted(submissions)), label="which")
            if not submissions[i].finished:
                engine.cancel(submissions[i])
                cancelled.add(i)
        else:
            engine.step()
    for i, submission in submissions.items():
        got = submission.output().outputs[0].token_ids
        assert got == (alone[i][: len(got)] if i in cancelled else alone[i])
    assert_all_free(llm)


@pytest.mark.parametrize(("limit", "mixed_limit"), [(32, 32), (32, 5)])
def test_decodes_ride_with_chunks(monkeypatch, make_llm, alone, limit, mixed_limit):
    """Requests that come one by one are prefilled in the very steps in which others decode, if there is padding."""
    llm = make_llm(max_num_batched_tokens=limit, max_mixed_tokens=mixed_limit, enable_prefix_caching=False)
    engine, steps = llm.engine, []
    for name in ("prefill", "decode", "mixed"):
        run = getattr(engine.runner, name)
        monkeypatch.setattr(engine.runner, name, lambda *work, name=name, run=run: steps.append(name) or run(*work))
    submissions = []
    for i, (prompt, params) in enumerate(zip(PROMPTS, MIXED, strict=True)):
        submissions.append(engine.add(str(i), TokenizedPrompt(None, prompt), params))
        engine.step()
    while engine.has_unfinished:
        engine.step()
    assert [submission.output().outputs[0].token_ids for submission in submissions] == alone
    assert steps[0] == "prefill"
    assert steps.count("mixed") >= 3
    assert_all_free(llm)


def test_logprobs_are_the_same_beside_decodes(make_llm):
    """Whoever decodes beside it, a chunk gets the log-probabilities of its prompt; nobody else gets any."""
    engine = make_llm(enable_prefix_caching=False).engine
    asking = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logprobs=2, prompt_logprobs=2)

    def serve(others: int) -> list:
        submissions = [engine.add(str(i), TokenizedPrompt(None, PROMPTS[i]), GREEDY) for i in range(others)]
        while submissions and not all(each.num_generated_tokens for each in submissions):
            engine.step()
        submissions.append(engine.add("asking", TokenizedPrompt(None, PROMPTS[3]), asking))
        while engine.has_unfinished:
            engine.step()
        return [each.output() for each in submissions]

    (expected,), (first, second, got) = serve(0), serve(2)
    assert tokens([got]) == tokens([expected])
    for ours, theirs in (
        (got.prompt_logprobs[1:], expected.prompt_logprobs[1:]),
        (got.outputs[0].logprobs, expected.outputs[0].logprobs),
    ):
        assert len(ours) == len(theirs)
        for mine, alone in zip(ours, theirs, strict=True):
            assert {t: e.logprob for t, e in mine.items()} == pytest.approx(
                {t: e.logprob for t, e in alone.items()}, abs=1e-4
            )
    assert all(each.prompt_logprobs is None and each.outputs[0].logprobs is None for each in (first, second))


def test_an_id_that_is_used_again_gets_nothing_of_the_request_before(make_llm):
    """Whose last step was in flight when it was cancelled."""
    engine = make_llm(enable_prefix_caching=False).engine
    asking = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, prompt_logprobs=0)

    def serve(*prompts: list[int]) -> list:
        for prompt in prompts[:-1]:
            given_up = engine.add("id", TokenizedPrompt(None, prompt), asking)
            engine.step()
            engine.cancel(given_up)
        submission = engine.add("id", TokenizedPrompt(None, prompts[-1]), asking)
        while engine.has_unfinished:
            engine.step()
        return [next(iter(entry)) for entry in submission.output().prompt_logprobs[1:]]

    assert serve(PROMPTS[0], PROMPTS[1]) == PROMPTS[1][1:]
    assert serve(PROMPTS[0], PROMPTS[0][:3]) == PROMPTS[0][1:3]


def test_same_seed_same_tokens_and_n(llm):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=8, n=3, ignore_eos=True)
    first = llm.generate(PROMPTS[0], params, use_tqdm=False)[0]
    again = llm.generate([PROMPTS[1], PROMPTS[0]], [GREEDY, params], use_tqdm=False)[1]
    assert [a.token_ids for a in first.outputs] == [a.token_ids for a in again.outputs]
    assert [a.index for a in first.outputs] == [0, 1, 2]
    assert len({tuple(a.token_ids) for a in first.outputs}) > 1
    assert first.metrics.num_generated_tokens == 24


def test_end_tokens_end_exactly_where_they_should(llm, alone):
    whole = alone[0]
    stop = whole[4]
    cut = whole[: whole.index(stop) + 1]
    out = llm.generate(
        PROMPTS[0], SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, stop_token_ids=[stop])
    )
    assert out[0].outputs[0].token_ids == cut
    assert (out[0].outputs[0].finish_reason, out[0].outputs[0].stop_reason) == ("stop", stop)
    later = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, stop_token_ids=[stop], min_tokens=7)
    assert len(llm.generate(PROMPTS[0], later)[0].outputs[0].token_ids) >= 7
    assert llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].finish_reason == "length"
    assert_all_free(llm)


def dense_logprobs(params, text: list[int]) -> np.ndarray:
    """log softmax of the logits at every position of a text, by dense attention without a cache: [T, V]."""
    attend = dense_causal_attend(1, CONFIG.head_dim**-0.5)
    index = jnp.arange(len(text), dtype=jnp.int32)
    logits, _ = Decoder(CONFIG, jnp.float32).apply(
        {"params": params}, jnp.asarray(text, jnp.int32), index, None, attend
    )
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("chunk", [32, 7])
def test_logprobs_are_those_of_the_dense_model(make_llm, params, chunk):
    llm = make_llm(max_num_batched_tokens=chunk)
    want = SamplingParams(temperature=1.0, seed=1, max_tokens=5, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    plain = llm.generate(PROMPTS[2], SamplingParams(temperature=1.0, seed=1, max_tokens=5, ignore_eos=True))[0].outputs[
        0
    ]
    output = llm.generate([PROMPTS[2], PROMPTS[0]], [want, GREEDY], use_tqdm=False)[0]
    answer = output.outputs[0]
    assert answer.token_ids == plain.token_ids
    text = PROMPTS[2] + answer.token_ids
    expected = dense_logprobs(params, text)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(PROMPTS[2])
    entries = [*output.prompt_logprobs[1:], *answer.logprobs]
    for position, entry in enumerate(entries):
        token, row = text[position + 1], expected[position]
        for rival, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[rival], abs=2e-4)
        assert entry[token].rank == 1 + (row > row[token] + 1e-6).sum()
        assert max(entry, key=lambda t: entry[t].logprob) == row.argmax()
    assert answer.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(answer.logprobs, answer.token_ids, strict=True))
    )


def test_nothing_compiles_after_warm_up(monkeypatch, make_llm):
    llm = make_llm(warmup=True, max_num_seqs=2, max_num_batched_tokens=16)
    before = llm.engine.runner.compilations
    served, run = set(), llm.engine.runner.steps.mixed
    steps = dataclasses.replace(llm.engine.runner.steps, mixed=lambda *work: served.add(work[-1]) or run(*work))
    monkeypatch.setattr(llm.engine.runner, "steps", steps)
    asked = [*MIXED[:-1], SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1, max_tokens=4)]
    llm.generate(PROMPTS, asked, use_tqdm=False)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert llm.engine.runner.compilations == before
    assert all(before[step] > 0 for step in ("prefill", "decode", "mixed"))
    assert {options.plain for options in served} == {True, False}, "steps were mixed in several variants"
    assert_all_free(llm)


def test_steps_hold_no_copy_of_the_pool(make_llm):
    """The compiled steps update the pools in place: their scratch is far smaller than one pool."""
    llm = make_llm(num_pages=4 * 3000, max_num_seqs=200)
    runner = llm.engine.runner
    pool = runner.cache.pool.k.nbytes
    batch = runner._pack([], size=16)
    analyses = []
    from sparsejax.engine.programs.steps import StepOptions

    rows = jnp.zeros(2, jnp.int32)
    steps = runner.steps
    for step, work in ((steps.prefill, batch), (steps.decode, rows), (steps.mixed, (batch, rows))):
        lowered = step.lower(runner.params, runner.cache, runner.state, work, StepOptions(implementation="xla"))
        analyses.append(lowered.compile().memory_analysis())
    lanes = [jnp.zeros(8, jnp.int32)] * 3
    analyses.append(runner.steps.fork.lower(runner.cache, None, *lanes, "xla").compile().memory_analysis())
    for analysis in analyses:
        assert analysis.alias_size_in_bytes >= 2 * pool
        assert analysis.temp_size_in_bytes < pool


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ([[]], InvalidArgumentError, "empty"),
        ([[1, VOCAB]], InvalidArgumentError, f"0 to {VOCAB - 1}"),
        ([[1, 2.5]], InvalidArgumentError, "token ids"),
        (["text"], InvalidArgumentError, "tokenizer"),
        ([[3] * 128], PromptTooLongError, "max_model_len=128"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_runs(llm, prompts, error, words):
    with pytest.raises(error, match=words):
        llm.generate([PROMPTS[0], *prompts], GREEDY)
    assert_all_free(llm)


def test_a_prompt_that_no_pool_holds_is_refused(make_llm):
    with pytest.raises(PromptTooLongError, match="num_pages"):
        make_llm(num_pages=4 * 5).generate(PROMPTS[2], GREEDY)


def test_bad_parameters_are_named(llm, make_llm):
    with pytest.raises(InvalidArgumentError, match="2 items for 1"):
        llm.generate(PROMPTS[0], [GREEDY, GREEDY])
    with pytest.raises(InvalidArgumentError, match="sampling_params"):
        llm.generate(PROMPTS[0], {"temperature": 0})
    with pytest.raises(InvalidArgumentError, match="stop strings"):
        llm.generate(PROMPTS[0], SamplingParams(stop="x"))
    with pytest.raises(
        InvalidArgumentError, match=f"stop_token_ids with id {VOCAB}; this model's ids are 0 to {VOCAB - 1}"
    ):
        llm.generate([[1]], SamplingParams(stop_token_ids=[1, VOCAB]))
    with pytest.raises(UnknownArgumentError, match="max_num_seqs"):
        make_llm(max_num_seq=3)
    with pytest.raises(InvalidArgumentError, match="at most 128"):
        make_llm(max_model_len=129)
    with pytest.raises(InvalidArgumentError, match="at most max_num_batched_tokens=32, got 33"):
        make_llm(max_mixed_tokens=33)
    with pytest.raises(InvalidArgumentError, match="power of two"):
        make_llm(page_size=3)
    with pytest.raises(UnknownArgumentError, match="full"):
        CompressionParams(method="ful")


def test_stream_yields_what_generate_returns(llm, alone):
    parts = list(llm.stream(PROMPTS[3], MIXED[3]))
    assert [token for part in parts for token in part.outputs[0].token_ids] == alone[3]
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    assert len(parts) > 2
    assert parts[-1].outputs[0].finish_reason == "length"


def test_leaving_a_stream_cancels_it(llm):
    for _ in llm.stream(PROMPTS[3], GREEDY):
        break
    assert not llm.engine.scheduler.has_unfinished
    llm.engine.step()
    assert_all_free(llm)


def test_metrics(llm):
    output = llm.generate([PROMPTS[3]], GREEDY, use_tqdm=False)[0]
    metrics = output.metrics
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (len(PROMPTS[3]), 10)
    assert 0 <= metrics.queue_time <= metrics.ttft <= metrics.e2e_time
    cached = len(PROMPTS[3]) + 9  # the last token never enters the cache
    pages = -(-cached // 4) * CONFIG.num_layers * CONFIG.num_kv_heads
    assert metrics.kv_bytes == pages * 4 * CONFIG.head_dim * 2 * 4


def test_a_method_can_be_had_once_nobody_waits(make_llm):
    """After an answer that ended early a step is still on its way, which nobody waits for."""
    llm, compressed = make_llm(methods=None), CompressionParams(method="streaming_llm", budget_tokens=6)
    wild = SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0)
    first = llm.generate([PROMPTS[1]], wild, use_tqdm=False)[0].outputs[0].token_ids
    stop = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, stop_token_ids=range(CONFIG.vocab_size))
    assert llm.generate([PROMPTS[1]], stop, use_tqdm=False)[0].outputs[0].finish_reason == "stop"
    assert llm.engine.has_unfinished
    llm.generate([PROMPTS[1]], stop, compressed, use_tqdm=False)
    for _ in llm.stream(PROMPTS[1], wild, compressed):
        break
    llm.generate(
        [PROMPTS[1]], stop, CompressionParams(method="snapkv", budget_tokens=6, window_tokens=2), use_tqdm=False
    )
    # Seeds go on where they were.
    assert llm.generate([PROMPTS[1]], wild, use_tqdm=False)[0].outputs[0].token_ids != first


def test_bad_engine_arguments_of_params_in_hand(make_llm, params):
    with pytest.raises(InvalidArgumentError, match="float32"):
        make_llm(dtype="bfloat16")
    with pytest.raises(InvalidArgumentError, match="at least one name"):
        make_llm(methods=[])
    with pytest.raises(InvalidArgumentError, match="at least one name"):
        make_llm(methods="full")
    many = dataclasses.replace(CONFIG, eos_token_ids=tuple(range(20)))
    with pytest.raises(InvalidArgumentError, match="20 end tokens"):
        LLM.from_params(many, params, **ENGINE)


def test_stream_checks_its_parameters(llm):
    with pytest.raises(InvalidArgumentError, match="sampling_params"):
        next(llm.stream(PROMPTS[0], {"temperature": 0}))
    with pytest.raises(InvalidArgumentError, match="n must be 1"):
        next(llm.stream(PROMPTS[0], SamplingParams(n=2)))
