"""Eviction under load: whatever runs beside a request, its tokens are those it would get alone; and pages come back."""

from __future__ import annotations

import numpy as np
import pytest
from eviction_cases import (
    ENGINE,
    GREEDY,
    METHODS,
    PROMPTS,
    SMALL_CHUNKS,
    STEPPING,
    STRATEGIES,
    assert_all_free,
    compression,
    finish,
    limited,
    name_of,
    one_by_one,
    run,
    tokens,
)
from eviction_oracle import assert_greedy, forward, serve
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import CONFIG, VOCAB

from sparsejax import CompressionParams, SamplingParams, methods
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.errors import InvalidArgumentError, PromptTooLongError

SCARCE = SMALL_CHUNKS | {"num_free_entries": 4 * 23}  # 23 table columns of 4 tokens, for prompts of up to 110
FULL = CompressionParams()
LONG_PROMPT = np.random.default_rng(3).integers(3, VOCAB, 110).tolist()
# Every method, with budgets and strategies that differ; dense requests between them.
REQUESTS = [
    (PROMPTS[0], compression("snapkv")),
    (PROMPTS[3], FULL),
    (PROMPTS[1], compression("h2o", 16)),
    (PROMPTS[0], compression("kv_compress", interval_tokens=3)),
    (PROMPTS[4], compression("compactor", 30)),
    (PROMPTS[3], compression("h2o", strategy="no_op")),
    (PROMPTS[2], compression("snapkv", 12)),
    (PROMPTS[0], compression("random", strategy="free_block")),
    (PROMPTS[5], FULL),
    (PROMPTS[1], compression("kvzip", 20)),
    (PROMPTS[4], compression("expected_attention")),
    (PROMPTS[1], compression("h2o", strategy="sparse_copy", num_per_evict=2)),
    (PROMPTS[0], compression("keydiff", 20, interval_tokens=4)),
    (PROMPTS[4], compression("streaming_llm", 16)),
    (PROMPTS[3], compression("criticalkv", None, keep_fraction=0.5)),
    (PROMPTS[1], compression("pyramidkv", 20)),
    (PROMPTS[0], compression("h2o", interval_tokens=4, context_tokens=40)),
    (PROMPTS[0], compression("snapkv", context_tokens=50)),
]


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm(**ENGINE)


@pytest.fixture(scope="module")
def alone(llm):
    return one_by_one(llm, REQUESTS)


def test_requests_name_every_method():
    assert {asked.method for _, asked in REQUESTS} == {"full", *METHODS}


def test_alone_equals_batched(llm, alone):
    assert len({tuple(alone[i]) for i in (0, 3, 7, 12)}) == 4, "one prompt, four answers: eviction shows"
    assert tokens(run(llm, REQUESTS)) == alone
    backwards = run(llm, REQUESTS[::-1])
    assert tokens(backwards)[::-1] == alone
    assert_all_free(llm)


def test_chunked_equals_one_shot(make_llm, alone):
    chunked = limited(make_llm(**ENGINE), **SMALL_CHUNKS)
    some = [i for i, (_, asked) in enumerate(REQUESTS) if asked.policy.chunk_alignment == 1]
    assert one_by_one(chunked, [REQUESTS[i] for i in some]) == [alone[i] for i in some]
    assert_all_free(chunked)


def test_page_size_does_not_change_tokens(make_llm, alone):
    """Of methods that choose tokens, not pages."""
    some = [0, 2]
    assert [REQUESTS[i][1].method for i in some] == ["snapkv", "h2o"]
    other = make_llm(**ENGINE, page_size=1, num_pages=4 * 512)
    assert one_by_one(other, [REQUESTS[i] for i in some]) == [alone[i] for i in some]
    assert_all_free(other)


@pytest.mark.parametrize("fails_at", [3, 8])
def test_replayed_equals_uninterrupted(monkeypatch, llm, alone, fails_at):
    """A step that fails makes all running requests start over; those that evict while decoding decode it all again."""
    engine, calls = llm.engine, 0
    decode = engine.runner.decode

    def failing(*work):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise ConnectionError
        return decode(*work)

    monkeypatch.setattr(engine.runner, "decode", failing)
    for first in range(0, len(REQUESTS), 4):
        calls = 0
        submissions = [
            engine.add(str(i), TokenizedPrompt(None, prompt), GREEDY, asked)
            for i, (prompt, asked) in enumerate(REQUESTS[first : first + 4])
        ]
        with pytest.raises(ConnectionError):
            finish(engine)
        finish(engine)
        outputs = [submission.output() for submission in submissions]
        assert sum(output.metrics.num_preemptions for output in outputs) >= len(submissions) - 1
        assert tokens(outputs) == alone[first : first + 4]
    assert_all_free(llm)


def test_strategies_give_the_same_tokens(llm):
    for method, strategies in (("h2o", STRATEGIES), ("random", ("reuse", "free_block"))):
        asked = [(PROMPTS[0], compression(method, strategy=strategy)) for strategy in strategies]
        first, *others = tokens(run(llm, asked))
        assert others == [first] * len(others), method
    assert_all_free(llm)


@pytest.fixture(scope="module")
def scarce(make_llm):
    return limited(make_llm(**ENGINE), **SCARCE)


LONGER = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, seed=1)
SCARCE_REQUESTS = [
    (PROMPTS[2], FULL),
    (PROMPTS[0], compression("snapkv")),
    (PROMPTS[1], compression("h2o", strategy="reuse")),
    (PROMPTS[2], compression("kv_compress", 16, interval_tokens=3)),
    (PROMPTS[1], compression("h2o", strategy="no_op")),
    (PROMPTS[2], compression("h2o", 12, strategy="free_block")),
    (LONG_PROMPT, compression("h2o")),
    (PROMPTS[1], compression("h2o", strategy="sparse_copy")),
    (PROMPTS[1], FULL),
    (LONG_PROMPT, compression("kv_compress", interval_tokens=5)),
    (PROMPTS[3], compression("snapkv", context_tokens=60)),
]


@pytest.fixture(scope="module")
def scarce_alone(scarce):
    return one_by_one(scarce, SCARCE_REQUESTS, LONGER)


def test_scarce_pages_do_not_change_tokens(scarce, scarce_alone):
    assert tokens(run(scarce, SCARCE_REQUESTS, LONGER)) == scarce_alone
    assert_all_free(scarce)


PREEMPTED = [
    compression("snapkv", 12),
    compression("kv_compress", 12, interval_tokens=3),
    *(compression("h2o", 12, strategy=strategy) for strategy in STRATEGIES),
    compression("h2o", 12, num_per_evict=2),
]


@pytest.mark.parametrize("asked", PREEMPTED, ids=name_of)
def test_preempted_equals_uninterrupted(scarce, asked):
    """A dense request that came before grows until the other has to give its pages back."""
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, seed=1)
    alone = one_by_one(scarce, [(PROMPTS[2], asked)], params)
    greedy = [SamplingParams(temperature=0.0, max_tokens=46, ignore_eos=True), params]
    dense, evicted = run(scarce, [(PROMPTS[1], FULL), (PROMPTS[2], asked)], greedy)
    assert (dense.metrics.num_preemptions, evicted.metrics.num_preemptions) == (0, 1)
    pool = scarce.engine.runner.layout.bytes_of(scarce.engine.scheduler.config.num_free_entries)
    assert 0 < evicted.metrics.kv_bytes <= pool
    assert tokens([evicted]) == alone
    assert_all_free(scarce)


def test_compressed_prompts_run_together_where_dense_ones_cannot(scarce):
    """The pool holds 23 columns, a prompt of 60 tokens takes 15, or 6 once 24 tokens are kept."""

    def most_decoding(asked) -> int:
        engine, most = scarce.engine, 0
        submissions = [
            engine.add(str(i), TokenizedPrompt(None, PROMPTS[0][i:] + PROMPTS[0][:i]), LONGER, asked) for i in range(3)
        ]
        while engine.has_unfinished:
            engine.step()
            most = max(most, sum(each.num_generated_tokens > 0 and not each.finished for each in submissions))
        assert_all_free(scarce)
        return most

    assert most_decoding(FULL) == 1
    assert most_decoding(compression("snapkv")) >= 2
    assert most_decoding(compression("kv_compress", interval_tokens=8)) >= 2


@pytest.mark.parametrize("method", ["h2o", "kv_compress", "keydiff", "snapkv", "kvzip"])
def test_prompts_longer_than_the_pool(scarce, params, method):
    policy = methods.get(method)
    asked = compression(method)
    if policy.between_chunks:
        served = serve(scarce, LONG_PROMPT, GREEDY, asked)
        assert served.output.metrics.num_compressions >= 2
        assert_greedy(served, forward(params, served.text, served.mask()))
    else:
        with pytest.raises(PromptTooLongError, match=r"110 tokens.*holds 92.*does not compress between the chunks"):
            scarce.generate(LONG_PROMPT, GREEDY, asked, use_tqdm=False)
    assert_all_free(scarce)


@pytest.mark.parametrize("method", STEPPING)
def test_strategies_agree_about_prompts_longer_than_the_pool(scarce, method):
    first, *others = run(scarce, [(LONG_PROMPT, compression(method, 16, strategy=each)) for each in STRATEGIES])
    assert first.metrics.num_compressions > 2
    assert [each.metrics.num_compressions for each in others] == [first.metrics.num_compressions] * len(others)
    assert tokens(others) == tokens([first]) * len(others)
    assert_all_free(scarce)


def test_no_more_is_evicted_at_once_than_is_kept(llm):
    asked = compression("h2o", None, keep_fraction=0.25, sink_tokens=2, recent_tokens=4, num_per_evict=12)
    llm.generate(LONG_PROMPT[:67], GREEDY, asked, use_tqdm=False)  # 17 are kept, and 1 comes
    with pytest.raises(
        InvalidArgumentError, match=r"num_per_evict .* at most 11, .* of 64 tokens, .* the 16 that .* got 12"
    ):
        llm.generate(LONG_PROMPT[:64], GREEDY, asked, use_tqdm=False)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in STEPPING])
def test_pages_come_back_and_are_counted(llm, method):
    engine, prompt, budget = llm.engine, PROMPTS[0], 24
    submission = engine.add("one", TokenizedPrompt(None, prompt), GREEDY, compression(method, budget))
    request, cache = submission.answers[0].request, engine.runner.cache
    total, tables = cache.layout.num_entries - 1, CONFIG.num_layers * CONFIG.num_kv_heads
    while engine.has_unfinished and submission.num_generated_tokens < 2:
        engine.step()
    cache = engine.runner.cache
    free, lengths = int(cache.free.count), np.asarray(cache.table.length[:, request.row])
    while engine.has_unfinished:
        engine.step()
    metrics = submission.output().metrics
    kept = np.asarray(metrics.kept_tokens)
    assert kept.shape == (CONFIG.num_layers, CONFIG.num_kv_heads)
    bytes_of_page = 2 * 4 * CONFIG.head_dim * 4
    assert metrics.kv_pages_before_compression == tables * -(-len(prompt) // 4)
    assert metrics.kv_pages_after_compression == (-(-kept // 4)).sum()
    assert metrics.kv_bytes_before_compression == metrics.kv_pages_before_compression * bytes_of_page
    assert metrics.kv_bytes_after_compression == metrics.kv_pages_after_compression * bytes_of_page
    assert metrics.kv_bytes == metrics.kv_bytes_before_compression
    assert metrics.num_compressions == 1
    assert metrics.compression_seconds > 0
    assert kept.sum() <= tables * budget + (3 * tables if method == "kv_compress" else 0)
    assert kept.sum() >= tables * (budget - 3)
    grown = lengths - kept
    assert grown.min() == grown.max() >= 1, "every head has grown by the tokens decoded since"
    assert total - free == (-(-lengths // 4)).sum()
    assert_all_free(llm)


@pytest.mark.parametrize("method", STEPPING)
@pytest.mark.parametrize("length", [40, 20], ids=["prompt over budget", "answer over budget"])
def test_tokens_kept_by_evictions_at_every_step_are_told(llm, method, length):
    engine, asked = llm.engine, compression(method, 24, num_per_evict=3)
    seen = []
    engine.eviction_observer = lambda entries, report: seen.append((np.array(report.live[:, 0]), report.active[0]))
    try:
        metrics = run(llm, [(LONG_PROMPT[:length], asked)], SamplingParams(temperature=0.0, max_tokens=12))[0].metrics
    finally:
        engine.eviction_observer = None
    assert metrics.num_compressions == (length > 24)
    evicting = [live for (live, active), (_, before) in zip(seen[1:], seen, strict=False) if active < before]
    assert evicting, "something is evicted while it decodes"
    assert metrics.kept_tokens == evicting[-1].tolist()
    assert evicting[-1].min() == evicting[-1].max() == 24 - 3 + 1


def test_bytes_before_are_measured_also_behind_another_compression(llm):
    """What a row holds when it is compressed again within two steps."""
    asked = CompressionParams(method="streaming_llm", keep_fraction=0.1, recent_tokens=1, context_tokens=30)
    metrics = run(llm, [(LONG_PROMPT[:56], asked)])[0].metrics
    assert metrics.num_compressions == 2
    bytes_of_column = CONFIG.num_layers * CONFIG.num_kv_heads * 2 * 4 * CONFIG.head_dim * 4
    held = -(-(5 + 26) // 4) * bytes_of_column  # 5 of the first 30 tokens, and the other 26
    assert (metrics.kv_bytes_before_compression, metrics.kv_bytes) == (held, held)


def test_a_pool_that_hardly_holds_whole_pages_clips_the_answer(make_llm):
    """kv_compress may fill all pages that its budget takes: they are counted so, or a step would find too few."""
    llm = make_llm(**(ENGINE | {"num_pages": CONFIG.num_layers * CONFIG.num_kv_heads * 4 + 1, "max_num_seqs": 2}))
    asked = CompressionParams(method="kv_compress", budget_tokens=14, window_tokens=4, compress_once=True)
    output = run(llm, [(LONG_PROMPT[:16], asked)], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))[0]
    assert 1 <= len(output.outputs[0].token_ids) < 8
    assert output.outputs[0].finish_reason == "length"
    assert_all_free(llm)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_random_arrivals_and_cancellations(make_llm, scarce_alone, data):
    """Scarce pages, all kinds of eviction, arrivals and cancellations at any time: survivors get their tokens."""
    scarce = limited(make_llm(**ENGINE), **SCARCE)
    pending = data.draw(st.permutations(range(len(SCARCE_REQUESTS))), label="order")[:7]
    engine, submissions, cancelled = scarce.engine, {}, set()
    while pending or engine.has_unfinished:
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "cancel"]), label="action")
        if action == "add" and pending:
            i = pending.pop(0)
            prompt, asked = SCARCE_REQUESTS[i]
            submissions[i] = engine.add(str(i), TokenizedPrompt(None, prompt), LONGER, asked)
        elif action == "cancel" and submissions and len(cancelled) < 2:
            i = data.draw(st.sampled_from(sorted(submissions)), label="which")
            if not submissions[i].finished:
                engine.cancel(submissions[i])
                cancelled.add(i)
        else:
            engine.step()
    for i, submission in submissions.items():
        got = submission.output().outputs[0].token_ids
        assert got == (scarce_alone[i][: len(got)] if i in cancelled else scarce_alone[i])
    assert_all_free(scarce)


def test_a_copy_of_a_compressed_row_does_not_fill_the_holes_of_who_had_its_row_before(make_llm):
    engine = limited(make_llm(**ENGINE), **SCARCE).engine
    for batch in ((3, 2), (10,)):  # the copy of a context takes the row whose request evicted into holes
        for i in batch:
            prompt, asked = SCARCE_REQUESTS[i]
            engine.add(str(i), TokenizedPrompt(None, prompt), LONGER, asked)
        finish(engine)  # raises if host and device count differently
    assert engine.scheduler.prefix_cache_stats.resident_rows == 1


@pytest.mark.parametrize(
    ("asked", "seqs"),
    [(compression("kvzip", context_tokens=40, chunk_tokens=2048), 2), (compression("h2o"), 1)],
    ids=["kvzip", "h2o"],
)
def test_nothing_compiles_after_warm_up(make_llm, asked, seqs):
    """Of what a request with the default compression can need; no other test has compiled it before."""
    llm = make_llm(
        default_compression=asked, warmup="greedy", max_num_seqs=seqs, max_prefill_seqs=seqs, max_num_batched_tokens=16
    )
    before = llm.engine.runner.compilations
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert sum(output.metrics.num_compressions for output in outputs) >= 3
    again = llm.generate([PROMPTS[0], PROMPTS[0][:40] + PROMPTS[1]], GREEDY, use_tqdm=False)
    assert again[1].metrics.num_cached_tokens == (asked.context_tokens or 0)
    assert llm.engine.runner.compilations == before
    assert_all_free(llm)
