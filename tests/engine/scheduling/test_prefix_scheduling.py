"""Prefix caching on a simulated device: what is computed, what is kept, what is given up first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import answer_alone, engine, request

from sparsejax.engine.requests.request import Status


def run_one(run, each):
    run.add(each)
    run.run_to_end_of(each)
    return each


def test_a_shared_prompt_is_prefilled_once():
    run = engine(max_resident_rows=4, num_free_entries=200, max_num_seqs=16, max_prefill_seqs=16)
    jobs = [request(str(i), 43 + i, shared=40) for i in range(16)]
    for each in jobs:
        run.add(each)
    run.run()
    cached = [each.num_cached_tokens for each in jobs]
    assert cached[0] == 0
    assert all(40 <= count <= 42 for count in cached[1:]), "their own tokens may happen to agree too"
    assert run.prefilled == sum(43 + i for i in range(16)) - sum(cached)
    assert all(each.output_token_ids == answer_alone(each) for each in jobs)


def test_a_request_waits_for_a_prefill_under_way_only_if_that_saves_much():
    run = engine(max_resident_rows=4, max_num_batched_tokens=64)
    first, other, same = request("a", 20, shared=8), request("b", 40, shared=8), request("c", 21, shared=16)
    for each in (first, other, same):
        run.add(each)
    plan = run.step()
    assert [(chunk.request, chunk.start) for chunk in plan.prefill] == [(first, 0), (other, 0)]
    assert same.status is Status.WAITING, "8 of its 21 tokens are being computed"
    plan = run.step()
    assert [(chunk.request, chunk.start) for chunk in plan.prefill] == [(same, 8)]


def test_nobody_overtakes_the_one_that_waits():
    run = engine(max_resident_rows=4, max_num_batched_tokens=64)
    run.add(request("a", 20, shared=16))
    run.add(request("b", 21, shared=16))
    run.add(request("c", 5))
    assert [chunk.request.request_id for chunk in run.step().prefill] == ["a"]
    assert [chunk.request.request_id for chunk in run.step().prefill] == ["b", "c"]


def test_waiting_ends_when_the_prefill_is_cancelled():
    run = engine(max_resident_rows=4, max_num_batched_tokens=8)
    run.add(request("a", 40, shared=40))
    late = request("b", 41, shared=40)
    run.step()
    run.add(late)
    run.step()
    run.cancel("a")
    plan = run.step()
    assert [(chunk.request, chunk.start) for chunk in plan.prefill] == [(late, 16)], "what was computed is kept"
    run.run()
    assert late.output_token_ids == answer_alone(late)


def test_a_conversation_goes_on_where_it_stopped():
    run = engine(max_resident_rows=4)
    first = run_one(run, request("a", 11, 7))
    again = request("b", 1, 3)
    again.prompt_token_ids = [*first.tokens, 1, 2, 3]
    run_one(run, again)
    assert again.num_cached_tokens == 11 + 7 - 1, "the last token of an answer never enters the cache"
    assert run.scheduler.prefix_cache_stats.resident_rows == 1, "the longer text makes the shorter one superfluous"
    same = run_one(run, request("c", 11, 7))
    assert same.num_cached_tokens == 10, "the last token's logits are needed"
    assert run.scheduler.prefix_cache_stats.resident_rows == 1, "its text was there already"


def test_the_least_recently_used_goes_first_and_only_when_needed():
    run = engine(max_resident_rows=2, max_num_seqs=1, num_free_entries=64)
    for length in (8, 9, 10):
        run_one(run, request(str(length), length, 1))
    assert run.scheduler.prefix_cache_stats.resident_rows == 3, "the running request's own row may stay too"
    run_one(run, request("8 again", 8, 1))
    assert run.scheduler.prefix_cache_stats.evictions == 1, "three rows are full: 8, 9 and 10; 8 was oldest"
    assert run_one(run, request("10 again", 10, 1)).num_cached_tokens == 9
    assert run_one(run, request("9 again", 9, 1)).num_cached_tokens == 0


def test_the_oldest_text_gives_up_its_end_before_its_beginning():
    run = engine(max_resident_rows=3, max_num_seqs=1, page_size=4, num_free_entries=12, max_model_len=48)
    run_one(run, request("a", 32, 1))
    run_one(run, request("b", 20, 1))
    stats = run.scheduler.prefix_cache_stats
    assert (stats.resident_rows, stats.evictions) == (2, 1), "half of a's 8 pages are enough"
    assert stats.resident_entries == 4 + 5
    again = run_one(run, request("a again", 32, 1))
    assert again.num_cached_tokens == 16
    assert again.output_token_ids == answer_alone(again)
    assert run_one(run, request("b again", 20, 1)).num_cached_tokens == 8, "b was the oldest then, and cut in turn"


def test_a_text_whose_beginning_another_row_holds_goes_whole():
    run = engine(max_resident_rows=3, max_num_seqs=1, page_size=4, num_free_entries=14, max_model_len=48)
    run_one(run, request("a", 32, 1, shared=20))
    run_one(run, request("b", 30, 1, shared=20))
    run_one(run, request("c", 16, 1))
    stats = run.scheduler.prefix_cache_stats
    assert (stats.resident_rows, stats.evictions) == (2, 1)


def test_a_resident_row_that_fills_the_pool_gives_way():
    run = engine(max_resident_rows=2, num_free_entries=4, page_size=4, max_model_len=40)
    run_one(run, request("a", 14, 3, shared=9))
    assert run.scheduler.free_entries == 0
    each = run_one(run, request("b", 13, 3, shared=9))
    assert each.num_cached_tokens == 8, "with no room for a copy of the partial page, whole pages are shared"
    assert each.num_preemptions == 0
    assert each.output_token_ids == answer_alone(each)


@pytest.mark.parametrize(
    ("needs", "cached"),
    [({"prompt_logprobs": 1}, 0), ({"repetition_penalty": 1.2}, 0), ({"presence_penalty": 0.5}, 11), ({}, 11)],
)
def test_requests_that_must_see_their_whole_prompt_compute_it(needs, cached):
    run = engine(max_resident_rows=2)
    run_one(run, request("a", 12))
    each = run_one(run, request("b", 12, **needs))
    assert each.num_cached_tokens == cached
    assert run_one(run, request("c", 12)).num_cached_tokens == 11


def test_a_lost_device_is_started_over():
    run = engine(lag=0, max_resident_rows=4)
    run_one(run, request("old", 12))
    jobs = [request("a", 20, 12, shared=16), request("b", 22, 12, shared=16), request("c", 25, 12, shared=16)]
    for each in jobs:
        run.add(each)
    for _ in range(3):
        run.step()
    run.scheduler.restart()
    run.device.rows.clear()
    assert run.scheduler.free_entries == run.scheduler.config.num_free_entries
    assert run.scheduler.prefix_cache_stats.resident_rows == run.scheduler.num_running == 0
    run.run()
    assert all(each.output_token_ids == answer_alone(each) for each in jobs)


def test_without_prefix_caching_nothing_stays():
    run = engine()
    for name in "ab":
        each = run_one(run, request(name, 12))
        assert (each.num_cached_tokens, run.scheduler.prefix_cache_stats.queries) == (0, 0)
    assert run.scheduler.free_entries == run.scheduler.config.num_free_entries


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_resident_rows_stand_in_nobodys_way(data):
    """Where no prefix is shared, every plan is the one that is made without prefix caching."""
    limits = {
        "max_num_seqs": data.draw(st.integers(1, 4)),
        "max_num_batched_tokens": data.draw(st.integers(4, 20)),
        "num_free_entries": data.draw(st.integers(8, 20)),
        "page_size": data.draw(st.sampled_from([1, 4])),
        "max_model_len": 48,
    }
    runs = [engine(max_resident_rows=rows, **limits) for rows in (0, data.draw(st.integers(1, 6)))]
    most = min(30, runs[0].scheduler.config.max_tokens_in_pool)
    for number in range(8):
        length, max_tokens = data.draw(st.integers(1, most)), data.draw(st.integers(1, 20))
        for run in runs:
            each = request(str(number), length, max_tokens)
            each.prompt_token_ids = [100 + number, *each.prompt_token_ids[1:]]
            run.add(each)
        for _ in range(data.draw(st.integers(0, 8))):
            assert step(runs[0]) == step(runs[1])
    while any(run.scheduler.has_unfinished for run in runs):
        assert step(runs[0]) == step(runs[1])


def step(run):
    if not run.scheduler.has_unfinished:
        return None
    plan = run.step()
    chunks = [(chunk.request.request_id, chunk.start, chunk.count) for chunk in plan.prefill]
    return chunks, *([each.request_id for each in part] for part in (plan.decode, plan.preempted))


def test_statistics():
    run = engine(max_resident_rows=2)
    run_one(run, request("a", 16, 1))
    run_one(run, request("b", 18, 1, shared=0))
    run_one(run, request("c", 16, 1))
    stats = run.scheduler.prefix_cache_stats
    assert (stats.queries, stats.queried_tokens, stats.hits, stats.hit_tokens) == (3, 50, 1, 15)
    assert (stats.resident_rows, stats.resident_entries, stats.evictions) == (2, 4 + 5, 0)
    assert stats.hit_rate == pytest.approx(0.3)
