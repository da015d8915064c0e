"""The scheduler on a simulated device: random traces, exact counts, and a test for each way such code goes wrong."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_simulation import FakeClock, answer_alone, config, ends, engine, request

from sparsejax.engine.requests.request import Status, derive_seed, expand
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.scheduling.scheduler import Scheduler
from sparsejax.errors import (
    DuplicateRequestError,
    EmptyPromptError,
    InvalidArgumentError,
    PromptTooLongError,
    SchedulingError,
)


@st.composite
def traces(draw):
    page_size, column = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 3]))
    limits = {
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(1, 24)),
        "max_prefill_seqs": draw(st.integers(1, 4)),
        "page_size": page_size,
        "entries_per_page_column": column,
        "num_free_entries": draw(st.integers(8, 40)) // page_size * column + draw(st.integers(0, column - 1)),
        "max_model_len": draw(st.integers(8, 64)),
        "max_resident_rows": draw(st.sampled_from([0, 1, 2, 8])),  # 0: no prefix caching
    }
    limits["max_mixed_tokens"] = draw(st.integers(1, limits["max_num_batched_tokens"]))
    needing = [{}, {}, {"prompt_logprobs": 1}, {"repetition_penalty": 1.5}, {"presence_penalty": 0.5}]
    jobs = draw(
        st.lists(
            st.tuples(
                st.integers(1, 24),  # prompt
                st.integers(1, 40),  # max_tokens
                st.integers(0, 16),  # arrives at step
                st.one_of(st.none(), st.none(), st.integers(0, 40)),  # cancelled so many steps later
                st.sampled_from([{"ignore_eos": False}, {"ignore_eos": True}]),
                st.sampled_from(needing),
                st.tuples(st.sampled_from([0, 0, 4, 9, 24]), st.integers(0, 1)),  # tokens shared with a family
            ),
            min_size=3,
            max_size=9,
        )
    )
    return limits, sorted(jobs, key=lambda job: job[2]), draw(st.integers(0, 2))


@settings(max_examples=250, deadline=None)
@given(traces())
def test_random_traces_keep_every_promise(trace):
    limits, jobs, lag = trace
    run = engine(lag, **limits)

    def refused(each, error):
        assert isinstance(error, PromptTooLongError)
        length = len(each.prompt_token_ids)
        assert length >= limits["max_model_len"] or length > run.scheduler.config.max_tokens_in_pool

    accepted = run.serve(
        (
            (request(str(number), prompt, most, shared=shared, family=family, **eos, **needs), arrival, cancel)
            for number, (prompt, most, arrival, cancel, eos, needs, (shared, family)) in enumerate(jobs)
        ),
        refused,
    )
    for each in accepted:
        alone = answer_alone(each)
        if each.finish_reason == "abort":
            assert each.output_token_ids == alone[: len(each.output_token_ids)]
        else:
            assert each.output_token_ids == alone
            assert each.finish_reason == ends(each, alone)
        assert len(each.prompt_token_ids) + each.max_tokens <= limits["max_model_len"]


@settings(max_examples=20, deadline=None)
@given(
    limits=st.fixed_dictionaries(
        {
            "max_num_batched_tokens": st.sampled_from([512, 700, 1024]),
            "max_mixed_tokens": st.sampled_from([300, 512]),
            "max_prefill_seqs": st.integers(1, 3),
            "num_free_entries": st.integers(22, 60),
            "max_resident_rows": st.sampled_from([0, 2]),
        }
    ),
    jobs=st.lists(st.tuples(st.integers(1, 640), st.integers(1, 80), st.integers(0, 9)), min_size=3, max_size=7),
    lag=st.integers(0, 1),
)
def test_chunks_that_are_trimmed_keep_every_promise(limits, jobs, lag):
    """Sizes at which chunks are trimmed, in pools where growth during a prefill matters."""
    run = engine(lag, max_num_seqs=5, page_size=32, max_model_len=704, **limits)
    accepted = []
    for number, (prompt, max_tokens, pause) in enumerate(sorted(jobs)[::-1]):
        each = request(str(number), prompt, max_tokens)
        run.add(each)
        accepted.append(each)
        for _ in range(pause):
            if run.scheduler.has_unfinished:
                run.step()
    run.run()
    assert all(each.output_token_ids == answer_alone(each) for each in accepted)


def test_a_chunk_is_trimmed_to_the_bucket_that_it_fills():
    run = engine(lag=0, max_num_batched_tokens=2048, page_size=32, num_free_entries=400, max_model_len=4096)
    run.add(request("alone", 1100, 8))
    assert [run.step().prefill[0].count for _ in range(3)] == [512, 512, 76], "not 948 tokens of padding"
    run.add(request("joins", 1100, 8))
    run.add(request("waits", 30, 8))
    plan = run.step()
    assert ([chunk.count for chunk in plan.prefill], len(plan.decode)) == ([1023], 1)
    plan = run.step()
    assert ([chunk.count for chunk in plan.prefill], len(plan.decode)) == ([77, 30], 1)
    run.run()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.integers(8, 14))
def test_preempted_equals_uninterrupted(lag, entries):
    run = engine(lag, num_free_entries=entries, max_num_seqs=4)
    jobs = [request(str(i), 6 + i, 24) for i in range(4)]
    for each in jobs:
        run.add(each)
    run.run()
    assert all(each.output_token_ids == answer_alone(each) for each in jobs)


def test_preemption_happens_and_takes_the_latest_arrival():
    run = engine(num_free_entries=8, max_model_len=40)
    jobs = [request(name, 8, 30) for name in "abc"]
    for each in jobs:
        run.add(each)
    run.run()
    assert run.scheduler.num_preemptions > 0
    assert jobs[0].num_preemptions == 0, "the oldest is never preempted"
    assert [each.request_id for each in run.ended] == sorted(each.request_id for each in run.ended)


# One test for each known defect of engines of this kind.


def test_a_preemption_loses_nobody_planned_in_the_same_step():
    run = engine(lag=0, num_free_entries=6, page_size=4)
    jobs = [request(name, 7, 12) for name in "abc"]
    for each in jobs:
        run.add(each)
    preempting = None
    while preempting is None:
        plan = run.step()
        preempting = plan if plan.preempted else None
    assert preempting.decode, "the survivors decode in the very step that preempts"
    assert len(run.alive) == run.scheduler.num_running + run.scheduler.num_waiting
    run.run()


def test_b_replay_covers_the_outputs_and_samples_none_of_them():
    run = engine(lag=0, num_free_entries=5, max_num_seqs=2)
    first, second = request("a", 7, 14), request("b", 7, 12)
    run.add(first)
    run.add(second)
    while not second.num_preemptions:
        run.step()
    known = list(second.output_token_ids)
    assert known
    while second.status is Status.WAITING:
        plan = run.step()
    chunk = plan.prefill[0]
    assert (chunk.start, chunk.count, chunk.is_last) == (0, 7 + len(known) - 1, True)
    assert second.output_token_ids == known
    assert second.num_unread == 0
    run.run()
    assert second.output_token_ids[: len(known)] == known


def test_c_unfinished_prefills_keep_their_order():
    run = engine(max_num_batched_tokens=5, max_num_seqs=4)
    for name, length in (("a", 12), ("b", 7), ("c", 9)):
        run.add(request(name, length, 2))
    seen = []
    for _ in range(6):
        seen += [(chunk.request.request_id, chunk.start, chunk.count) for chunk in run.step().prefill]
    assert seen == [
        ("a", 0, 5),
        ("a", 5, 5),
        ("a", 10, 2),
        ("b", 0, 3),
        ("b", 3, 4),
        # Whatever decodes takes its token off the five.
        ("c", 0, 4),
        ("c", 4, 5),
    ]


def test_d_admission_waits_instead_of_raising():
    run = engine(num_free_entries=4, page_size=4, max_model_len=17)
    big, late = request("big", 12, 4), request("late", 8, 2)
    run.add(big)
    run.add(late)
    plan = run.step()
    assert [chunk.request for chunk in plan.prefill] == [big]
    assert late.status is Status.WAITING
    run.run()
    assert late.output_token_ids == answer_alone(late)


def test_e_long_requests_are_not_overtaken_nor_starved():
    run = engine(lag=0, num_free_entries=10, page_size=4, max_num_seqs=2, max_model_len=60)
    run.add(request("running", 4, 30))
    run.step()
    long = request("long", 36, 2)
    run.add(long)
    for i in range(20):
        run.add(request(f"short{i}", 4, 2))
    started = []
    while long.row is None:
        started += [chunk.request.request_id for chunk in run.step().prefill]
    assert started == ["long"], "short prompts that would fit wait behind the long one"
    assert all(each.request_id != "long" for each in run.ended)
    run.run()


def test_f_admission_reserves_the_growth_of_running_requests():
    run = engine(lag=0, num_free_entries=9, page_size=1, max_num_batched_tokens=2, max_model_len=32)
    run.add(request("a", 2, 6))
    run.step()
    run.add(request("b", 6, 1))
    plan = run.step()
    # a holds 3 now; while b's three chunks run, a grows by 3: 3 + 3 + 6 > 9.
    assert not plan.prefill
    run.run()
    assert run.scheduler.num_preemptions == 0


def test_decode_goes_on_beside_a_long_prefill():
    run = engine(max_num_batched_tokens=4)
    run.add(request("a", 4, 9))
    run.step()
    run.add(request("b", 20, 1))
    for _ in range(5):
        plan = run.step()
        assert [each.request_id for each in plan.decode] == ["a"] or run.ended
        assert [chunk.request.request_id for chunk in plan.prefill] == ["b"]


def test_the_engine_must_read_results_before_a_preemption():
    scheduler = Scheduler(config(num_free_entries=2, max_model_len=8, page_size=4), FakeClock())
    jobs = [request("a", 4, 4), request("b", 3, 4)]
    for each in jobs:
        scheduler.add(each)
    scheduler.schedule()
    assert jobs[1].status is Status.WAITING, "four tokens and one more need a second page"
    scheduler = Scheduler(config(num_free_entries=2, max_model_len=8, page_size=4), FakeClock())
    jobs = [request("a", 2, 4), request("b", 2, 4)]
    for each in jobs:
        scheduler.add(each)
    scheduler.schedule()
    scheduler.schedule()
    scheduler.schedule()
    assert scheduler.must_preempt()
    with pytest.raises(SchedulingError, match="in flight"):
        scheduler.schedule()
    for _ in range(3):
        assert jobs[0].record(7)
        assert jobs[1].record(8)
    plan = scheduler.schedule()
    assert plan.preempted == [jobs[1]]
    assert plan.release == [2]
    assert plan.decode == [jobs[0]]


def test_surplus_token_of_an_ended_request_is_discarded():
    scheduler = Scheduler(config(), FakeClock())
    each = request("a", 4, 8)
    scheduler.add(each)
    scheduler.schedule()
    scheduler.schedule()  # one token read, another in flight
    assert each.record(5)
    free = scheduler.free_entries
    scheduler.finish(each, "stop", stop_reason=5)
    assert scheduler.free_entries == 64 == free + scheduler.entries_for(5)
    assert not each.record(6)
    assert each.output_token_ids == [5]
    assert (each.finish_reason, each.stop_reason) == ("stop", 5)
    assert scheduler.schedule().release == [1]
    assert scheduler.schedule().release == []
    with pytest.raises(SchedulingError, match="cannot finish"):
        scheduler.finish(each, "stop")


@pytest.mark.parametrize("state", [Status.WAITING, Status.PREFILLING, Status.RUNNING])
def test_cancel_in_any_state(state):
    scheduler = Scheduler(config(max_num_batched_tokens=4, max_num_seqs=1), FakeClock())
    if state is Status.WAITING:
        scheduler.add(request("ahead", 4, 8))
    each = request("x", 6, 8)
    scheduler.add(each)
    for _ in range({Status.WAITING: 1, Status.PREFILLING: 1, Status.RUNNING: 3}[state]):
        scheduler.schedule()
    assert each.status is state
    assert scheduler.cancel("x") is each
    assert each.finished
    assert each.finish_reason == "abort"
    assert scheduler.cancel("x") is None
    assert scheduler.cancel("never there") is None
    scheduler.cancel("ahead")
    assert scheduler.free_entries == 64
    assert not scheduler.has_unfinished
    again = request("x", 6, 8)
    scheduler.add(again)
    plan = scheduler.schedule()
    assert plan.release == [1]
    assert plan.prefill[0].request is again
    assert again.row == 1, "a released row may be used in the same plan"


def test_max_tokens_is_clipped_to_what_always_fits():
    scheduler = Scheduler(config(max_model_len=20, num_free_entries=3, page_size=4), FakeClock())
    by_pool, by_length = request("a", 10, 99), request("b", 3, 99)
    scheduler.add(by_pool)
    assert by_pool.max_tokens == 3, "10 + 3 - 1 tokens fill the pool of 12"
    scheduler.add(by_length)
    assert by_length.max_tokens == 10
    scheduler = Scheduler(config(max_model_len=20), FakeClock())
    by_length = request("b", 3, 99)
    scheduler.add(by_length)
    assert by_length.max_tokens == 17
    exact = request("c", 3, 5)
    scheduler.add(exact)
    assert exact.max_tokens == 5


def test_a_prompt_that_fills_the_pool_still_gets_its_token():
    run = engine(num_free_entries=3, page_size=4)
    each = request("a", 12, 9)
    run.add(each)
    run.run()
    assert len(each.output_token_ids) == 1


def test_refusals_change_nothing():
    scheduler = Scheduler(config(max_model_len=20, num_free_entries=4, page_size=4), FakeClock())
    scheduler.add(request("taken", 3))
    with pytest.raises(PromptTooLongError, match="max_model_len=20"):
        scheduler.add(request("a", 20))
    with pytest.raises(PromptTooLongError, match="holds 16"):
        scheduler.add(request("a", 17))
    with pytest.raises(EmptyPromptError, match="empty"):
        scheduler.add(request("a", 0))
    with pytest.raises(DuplicateRequestError, match="'taken'"):
        scheduler.add(request("taken", 3))
    with pytest.raises(InvalidArgumentError, match="page_size must be at least 1"):
        config(page_size=0)
    assert scheduler.num_waiting == 1


def test_times_are_the_clocks():
    clock = FakeClock()
    scheduler = Scheduler(config(max_num_seqs=1), clock)
    clock.now = 3.0
    first, second = request("a", 4, 2), request("b", 4, 2)
    second.arrival_time = 1.5
    scheduler.add(first)
    scheduler.add(second)
    clock.now = 5.0
    scheduler.schedule()
    assert (first.arrival_time, first.first_scheduled_time) == (3.0, 5.0)
    assert (second.arrival_time, second.first_scheduled_time) == (1.5, None)


def test_n_answers_are_n_requests_with_seeds_of_their_own():
    params = SamplingParams(n=3, seed=7)
    parts = expand("id", [1, 2], params, seed=99)
    alone = expand("id", [1, 2], SamplingParams(seed=7), seed=99)
    assert [part.request_id for part in parts] == ["id/0", "id/1", "id/2"]
    assert [part.index for part in parts] == [0, 1, 2]
    assert {part.parent_id for part in parts} == {"id"}
    assert alone[0].request_id == "id"
    assert parts[0].seed == alone[0].seed == 7
    assert len({part.seed for part in parts}) == 3
    assert expand("id", [1], SamplingParams(), seed=99)[0].seed == 99


@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_derived_seeds_are_32_bit_words(seed, number):
    assert 0 <= derive_seed(seed, number) < 2**32
    assert derive_seed(seed, 0) == seed


def test_a_long_prompt_holds_nobody_up():
    """While it is computed everybody decodes in every step, and no step is larger than the limit for such steps."""
    run = engine(max_num_batched_tokens=16, max_mixed_tokens=8, max_model_len=512, num_free_entries=256)
    for name in "abc":
        run.add(request(name, 3, 100))
    run.step()
    run.add(request("long", 203, 2))
    plans = [run.step() for _ in range(41)]
    assert [sum(chunk.count for chunk in plan.prefill) for plan in plans] == [5] * 40 + [3]
    assert all([each.request_id for each in plan.decode] == ["a", "b", "c"] for plan in plans)
    run.run()
