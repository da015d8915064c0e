"""Compression under the scheduler on a simulated device: exact counts, the same points whatever the load, replays."""

from __future__ import annotations

import pytest
from compression_simulation import Params, Policy, Rule, alone, engine, request
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import methods
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.errors import InvalidArgumentError, PromptTooLongError, SchedulingError


@st.composite
def compressions(draw):
    kind = draw(st.sampled_from(["full", "once", "interval", "per_step", "context"]))
    if kind == "full":
        return None
    budget = draw(st.one_of(st.integers(1, 10), st.sampled_from([0.3, 0.6])))
    budgets = {"keep_fraction": budget} if isinstance(budget, float) else {"budget_tokens": budget}
    common = {
        **budgets,
        "policy": Policy(between_chunks=draw(st.booleans()), chunk_alignment=draw(st.sampled_from([1, 1, 3, 9]))),
        "rule": draw(st.sampled_from([Rule(pooled=False), Rule(), Rule(whole_pages=True)])),
    }
    if kind == "interval":
        return Params(once=False, interval=draw(st.integers(1, 7)), **common)
    if kind == "per_step":
        count = draw(st.integers(1, budget)) if isinstance(budget, int) else 1
        strategy = draw(st.sampled_from(["reuse", "free_block", "sparse_copy", "no_op"]))
        common["rule"] = Rule(pooled=False)
        return Params(once=False, per_step=True, evict_strategy=strategy, evict_count=count, **common)
    if kind == "context":
        return Params(context_tokens=draw(st.sampled_from([4, 9, 13])), **common)
    return Params(**common)


@st.composite
def traces(draw):
    page_size, tables = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    limits = {
        "max_num_seqs": draw(st.integers(1, 5)),
        "max_num_batched_tokens": draw(st.integers(6, 24)),
        "max_prefill_seqs": draw(st.integers(1, 4)),
        "page_size": page_size,
        "entries_per_page_column": tables,
        "num_free_entries": draw(st.integers(10, 40)) // page_size * tables + draw(st.integers(0, tables - 1)),
        "max_model_len": draw(st.integers(20, 64)),
        "max_resident_rows": draw(st.sampled_from([0, 1, 4])),
    }
    limits["max_mixed_tokens"] = draw(st.integers(6, limits["max_num_batched_tokens"]))
    kinds = draw(st.lists(compressions(), min_size=1, max_size=3))
    jobs = draw(
        st.lists(
            st.tuples(
                st.integers(1, 40),  # prompt
                st.integers(1, 30),  # max_tokens
                st.integers(0, 16),  # arrives at step
                st.one_of(st.none(), st.none(), st.integers(0, 40)),  # cancelled so many steps later
                st.booleans(),  # ignores the end token
                st.sampled_from(kinds),
                st.sampled_from([0, 9, 24]),  # tokens shared with the others
            ),
            min_size=2,
            max_size=8,
        )
    )
    return limits, sorted(jobs, key=lambda job: job[2]), draw(st.integers(0, 2))


@settings(max_examples=400, deadline=None)
@given(traces())
def test_random_traces_keep_every_promise(trace):
    limits, jobs, lag = trace
    run = engine(lag, **limits)
    accepted = run.serve(
        (
            (request(str(number), prompt, most, shared=shared, compression=asked, ignore_eos=ignore), arrival, cancel)
            for number, (prompt, most, arrival, cancel, ignore, asked, shared) in enumerate(jobs)
        ),
        lambda each, error: None,  # too long, or not to be cut where it must be
    )
    for each in accepted:
        answer, points = alone(each, **limits)
        if each.finish_reason == "abort":
            assert each.output_token_ids == answer[: len(each.output_token_ids)]
        else:
            assert each.output_token_ids == answer
            behind = [point for point in points if point > each.num_reused]
            # A token more may have been decoded before the last one was read.
            seen = run.compressed[each.request_id]
            assert seen[: len(behind)] == behind
            assert len(seen) <= len(behind) + 2


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_many_questions_over_one_compressed_context(data):
    """Whoever computes a context, whoever takes it over, whatever is evicted or cancelled meanwhile: same answers."""
    page_size = data.draw(st.sampled_from([1, 2, 4]))
    limits = {
        "max_num_seqs": data.draw(st.integers(1, 4)),
        "max_num_batched_tokens": data.draw(st.integers(4, 30)),
        "page_size": page_size,
        "entries_per_page_column": data.draw(st.sampled_from([1, 4])),
        "max_resident_rows": data.draw(st.integers(1, 4)),
        "max_model_len": 96,
    }
    limits["num_free_entries"] = data.draw(st.integers(24, 60)) // page_size * limits["entries_per_page_column"]
    context = data.draw(st.sampled_from([16, 48]))  # one that fits the pool, or one that hardly does
    kinds = [
        Params(
            context_tokens=context,
            budget_tokens=data.draw(st.integers(2, 12)),
            policy=Policy(uses_seed=data.draw(st.booleans()), between_chunks=data.draw(st.booleans())),
        )
        for _ in range(2)
    ]
    run = engine(data.draw(st.integers(0, 2)), **limits)
    accepted = []
    for number in range(data.draw(st.integers(3, 10))):
        length = context + data.draw(st.integers(-2, 10))
        compression = data.draw(st.sampled_from([*kinds, None]))
        each = request(str(number), length, data.draw(st.integers(1, 8)), shared=context + 2, compression=compression)
        each.seed = number % 2
        try:
            run.add(each)
        except PromptTooLongError:
            continue
        accepted.append(each)
        for _ in range(data.draw(st.integers(0, 6))):
            if run.scheduler.has_unfinished:
                run.step()
        if data.draw(st.integers(0, 9)) == 0:
            run.cancel(each.request_id)
    run.run()
    for each in accepted:
        answer, _ = alone(each, **limits)
        ended = len(each.output_token_ids) if each.finish_reason == "abort" else None
        assert each.output_token_ids == answer[:ended]


@pytest.mark.parametrize("context_tokens", [None, 150])
@pytest.mark.parametrize("method", [name for name in methods.available() if methods.get(name).family == "evict"])
def test_every_method_is_scheduled_as_its_parameters_say(method, context_tokens):
    compression = CompressionParams(method=method, budget_tokens=80, context_tokens=context_tokens)
    limits = {"max_num_batched_tokens": 512, "max_model_len": 1024, "page_size": 8, "entries_per_page_column": 4}
    run = engine(num_free_entries=70 * 4, max_resident_rows=2, **limits)
    jobs = [request(str(i), 200 + i, 60, shared=160, compression=compression) for i in range(4)]
    for each in jobs:
        run.add(each)
    run.run()
    for each in jobs:
        answer, points = alone(each, num_free_entries=70 * 4, **limits)
        assert each.output_token_ids == answer
        # Who evicts per step does so from the end of the prompt on, and compresses only before.
        at_end = [] if compression.per_step else [len(each.prompt_token_ids)]
        assert points[:1] == (at_end if context_tokens is None else [context_tokens])
    shares = context_tokens is not None and compression.once and not compression.policy.uses_seed
    assert [each.num_cached_tokens for each in jobs[1:]] == [150 if shares else 0] * 3


ONE_CONTEXT = Params(context_tokens=16, budget_tokens=5)


def questions(count, *, length=20, compression=ONE_CONTEXT, **params):
    return [request(f"q{i}", length + i, shared=16, compression=compression, **params) for i in range(count)]


def test_a_context_is_computed_and_compressed_once():
    run = engine(max_resident_rows=2, num_free_entries=200, max_num_batched_tokens=64)
    jobs = questions(4)
    for each in jobs:
        run.add(each)
    run.run()
    assert run.snapshots == 1
    assert [each.num_cached_tokens for each in jobs] == [0, 16, 16, 16]
    assert run.prefilled == 20 + 5 + 6 + 7
    late = questions(1, length=30)[0]
    late.compression = Params(context_tokens=16, budget_tokens=6)
    run.add(late)
    run.run()
    assert late.num_cached_tokens == 0, "another budget is another row"


@pytest.mark.parametrize(
    ("compression", "params", "length"),
    [
        (Params(context_tokens=16, budget_tokens=5, once=False, interval=8), {}, 20),
        (Params(context_tokens=16, budget_tokens=16), {}, 20),  # not compressed at all
        (Params(context_tokens=16, budget_tokens=5), {}, 16),  # the context is the whole prompt
        (Params(context_tokens=16, budget_tokens=5), {"prompt_logprobs": 1}, 20),
    ],
)
def test_what_cannot_be_taken_over_is_computed(compression, params, length):
    run = engine(max_resident_rows=2, num_free_entries=200, max_num_batched_tokens=64)
    first, second = (request(name, length, shared=16, compression=compression, **params) for name in "ab")
    for each in (first, second):
        run.add(each)
        run.run()
    assert second.num_cached_tokens == 0


def test_seeds_tell_contexts_apart_where_the_method_draws():
    compression = Params(context_tokens=16, budget_tokens=5, policy=Policy(uses_seed=True))
    run = engine(max_resident_rows=4, num_free_entries=200, max_num_batched_tokens=64)
    jobs = questions(3, compression=compression)
    for each, seed in zip(jobs, (1, 2, 1), strict=True):
        each.seed = seed
        run.add(each)
    run.run()
    assert [each.num_cached_tokens for each in jobs] == [0, 0, 16]


def test_copies_of_contexts_give_way_to_requests():
    limits = {"page_size": 4, "num_free_entries": 6 * 4, "entries_per_page_column": 4, "max_model_len": 32}
    compression = Params(context_tokens=16, budget_tokens=9, rule=Rule(pooled=False))
    run = engine(max_resident_rows=1, max_num_batched_tokens=64, max_num_seqs=1, **limits)
    jobs = [request(name, 18, 2, shared=16, compression=compression) for name in "ab"]
    for each in (jobs[0], request("hog", 18, 2), jobs[1]):
        run.add(each)
        run.run_to_end_of(each)
    assert run.snapshots == 2
    assert jobs[1].num_cached_tokens == 0
    assert run.scheduler.prefix_cache_stats.evictions == 2, "the copy, then the row of the one that took its room"
    run.run()


def test_a_preempted_request_that_evicts_replays_by_decoding():
    compression = Params(budget_tokens=4, once=False, interval=5, rule=Rule(pooled=False))
    run = engine(lag=1, num_free_entries=7, page_size=4, max_num_seqs=2, max_model_len=48)
    jobs = [request("dense", 8, 18), request("a", 8, 20, compression=compression)]
    for each in jobs:
        run.add(each)
    run.run()
    assert jobs[1].num_preemptions
    assert run.forced > 0
    assert jobs[1].output_token_ids == alone(jobs[1], num_free_entries=7, page_size=4, max_model_len=48)[0]


def test_a_preempted_request_that_compressed_once_replays_by_prefill():
    compression = Params(budget_tokens=4, rule=Rule(pooled=False))
    run = engine(lag=1, num_free_entries=7, page_size=4, max_num_seqs=2, max_model_len=48)
    jobs = [request("dense", 8, 18), request("a", 8, 20, compression=compression)]
    for each in jobs:
        run.add(each)
    run.run()
    assert jobs[1].num_preemptions
    assert run.forced == 0
    assert jobs[1].output_token_ids == alone(jobs[1], num_free_entries=7, page_size=4, max_model_len=48)[0]


def test_pages_are_free_for_others_once_the_compression_is_read():
    compression = Params(budget_tokens=4, rule=Rule(pooled=False))
    run = engine(lag=1, num_free_entries=10, page_size=4, max_num_batched_tokens=64)
    jobs = [request(name, 24, 8, compression=compression) for name in "abc"]
    for each in jobs:
        run.add(each)
    run.step()
    assert run.scheduler.free_entries == 4, "counted as it was before, until it is read"
    plans = [run.step() for _ in range(3)]
    assert any(chunk.request is jobs[1] for plan in plans for chunk in plan.prefill)
    assert jobs[0].row is not None, "both run in a pool that holds one prompt"
    run.run()
    assert not any(each.num_preemptions for each in jobs)


def test_a_prompt_longer_than_the_pool():
    limits = {"num_free_entries": 8, "page_size": 4, "max_model_len": 128, "max_num_batched_tokens": 16}
    between = Params(budget_tokens=8, policy=Policy(between_chunks=True), rule=Rule(pooled=False))
    run = engine(**limits)
    each = request("long", 100, 12, compression=between)
    run.add(each)
    run.run()
    assert len(each.output_token_ids) == 12
    assert run.compressed["long"] == [*range(16, 100, 16), 100]
    with pytest.raises(PromptTooLongError, match="does not compress between the chunks"):
        run.add(request("b", 100, compression=Params(budget_tokens=8)))
    with pytest.raises(PromptTooLongError, match="Lower the budget"):
        run.add(request("c", 100, compression=Params(budget_tokens=32, policy=Policy(between_chunks=True))))


def test_a_context_longer_than_the_pool_is_shared():
    """Older figures, of before its last compression, come in when the copy that is kept has been taken."""
    limits = {"num_free_entries": 12, "page_size": 4, "max_model_len": 128, "max_num_batched_tokens": 16}
    limits["max_resident_rows"] = 2
    for lag in range(3):
        run = engine(lag, **limits)
        between = Params(
            budget_tokens=8, context_tokens=100, policy=Policy(between_chunks=True), rule=Rule(pooled=False)
        )
        for name in "ab":
            run.add(request(name, 104, 4, shared=100, compression=between))
        run.run()
        assert run.snapshots == 1
        assert run.compressed["a"] == [*range(16, 100, 16), 100]
        assert run.compressed["b"] == []


def test_chunks_shrink_where_budget_and_chunk_do_not_fit_together():
    limits = {"num_free_entries": 8, "page_size": 4, "max_model_len": 128, "max_num_batched_tokens": 30}
    policy = Policy(between_chunks=True, chunk_alignment=3)
    each = request("long", 60, 4, compression=Params(budget_tokens=16, policy=policy, rule=Rule(pooled=False)))
    run = engine(**limits)
    run.add(each)
    # 16 tokens kept and 12 more take 7 of 8 entries, with one to spare for what is not known exactly.
    assert each.footprint.schedule.stride == 12
    run.run()
    assert run.compressed["long"] == [24, 36, 48, 60], "12 tokens are within the budget"


def test_a_prompt_that_fits_is_compressed_once_however_it_is_cut():
    policy = Policy(between_chunks=True)
    for tokens in (4, 7, 64):
        run = engine(num_free_entries=20, max_num_batched_tokens=tokens)
        run.add(request("a", 40, 3, compression=Params(budget_tokens=8, policy=policy)))
        run.run()
        assert run.compressed["a"] == [40]


def test_points_follow_from_the_request():
    def points(prompt, max_tokens=4, **params):
        run = engine(num_free_entries=200, max_num_batched_tokens=64)
        run.add(request("a", prompt, max_tokens, compression=Params(**params)))
        run.run()
        return run.compressed["a"]

    assert points(20, budget_tokens=20) == []
    assert points(20, budget_tokens=19) == [20]
    assert points(20, keep_fraction=0.5) == [20]
    assert points(20, budget_tokens=5, context_tokens=12) == [12]
    assert points(20, budget_tokens=5, context_tokens=30) == [20]
    assert points(20, 12, budget_tokens=5, once=False, interval=4) == [20, 24, 28]
    assert points(20, 12, budget_tokens=27, once=False, interval=4) == [28]
    assert points(20, 12, budget_tokens=5, once=False, interval=4, context_tokens=12) == [12, 24, 28]


@pytest.mark.parametrize("strategy", ["reuse", "free_block", "sparse_copy", "no_op"])
def test_per_step_eviction_names_every_row_from_its_first_eviction_on(strategy):
    params = Params(budget_tokens=8, once=False, per_step=True, evict_strategy=strategy, rule=Rule(pooled=False))
    run = engine(lag=0, num_free_entries=40, max_num_batched_tokens=64)
    long, short = request("long", 20, 6, compression=params), request("short", 5, 9, compression=params)
    run.add(long)
    run.add(short)
    plans = [run.step() for _ in range(6)]
    entries = [[(each.request.request_id, each.text_length, each.bulk) for each in plan.evict] for plan in plans]
    assert entries[0] == [("long", 20, True)]
    assert entries[1] == [("long", 21, False)]
    assert entries[4:] == [
        [("long", 24, False), ("short", 9, False)],
        [("long", 25, False), ("short", 10, False)],
    ] or entries[5] == [("short", 10, False)]
    assert not any(plan.compress for plan in plans)
    run.run()


def test_residents_give_way_to_the_copies_of_an_eviction():
    run = engine(lag=0, num_free_entries=12, page_size=4, max_num_batched_tokens=64, max_resident_rows=1)
    dense = request("dense", 26, 3)
    run.add(dense)
    run.run_to_end_of(dense)
    assert run.scheduler.free_entries == 5
    copying = Params(budget_tokens=8, once=False, per_step=True, evict_strategy="sparse_copy", rule=Rule(pooled=False))
    run.add(request("a", 16, 3, compression=copying))
    run.step()  # four pages, and two for the copies: one more than is free
    assert run.scheduler.prefix_cache_stats.evictions == 1
    run.run()


def test_answers_of_a_bounded_cache_may_be_longer_than_the_pool():
    bounded = Params(budget_tokens=8, once=False, per_step=True, rule=Rule(pooled=False))
    run = engine(num_free_entries=6, page_size=4, max_model_len=128)
    each = request("a", 10, 100, compression=bounded)
    run.add(each)
    assert each.max_tokens == 100
    run.run()
    growing = [
        request(name, 10, 100, compression=compression)
        for name, compression in (
            ("dense", None),
            ("once", Params(budget_tokens=8, rule=Rule(pooled=False))),
            ("no_op", Params(budget_tokens=8, once=False, per_step=True, evict_strategy="no_op", rule=Rule(False))),
            ("interval", Params(budget_tokens=8, once=False, interval=4, rule=Rule(False))),
        )
    ]
    for each in growing:
        run.add(each)
    # 24 slots: 10 and 15 - 1; 8 and 13 - 1 with a page to spare; as dense; without end.
    assert [each.max_tokens for each in growing] == [15, 13, 15, 100]
    run.run()


def test_texts_that_must_be_cut_where_the_method_cannot_are_refused():
    run = engine(max_num_batched_tokens=16, num_free_entries=200)
    compression = Params(budget_tokens=4, policy=Policy(chunk_alignment=13))
    with pytest.raises(InvalidArgumentError, match=r"room for 12.*max_mixed_tokens to 26"):
        run.add(request("a", 13, compression=compression))
    # Behind its context, too, where the rest of the prompt is recorded for compressions to come.
    behind = Params(budget_tokens=4, context_tokens=10, once=False, interval=4, policy=Policy(chunk_alignment=13))
    with pytest.raises(InvalidArgumentError, match="room for 12"):
        run.add(request("e", 60, compression=behind))
    jobs = [request("b", 12, 20, compression=compression), request("c", 12, compression=compression)]
    jobs.append(request("d", 40, compression=Params(budget_tokens=4, policy=Policy(chunk_alignment=8))))
    for each in jobs:
        run.add(each)
    run.run()
    assert [run.compressed[name] for name in "bcd"] == [[12], [12], [40]]


def test_the_caller_must_have_compressed_rows_measured():
    run = engine(num_free_entries=20)
    run.add(request("a", 12, compression=Params(budget_tokens=4)))
    plan = run.scheduler.schedule()
    assert plan.compress
    with pytest.raises(SchedulingError, match="measured"):
        run.scheduler.settle(plan.balance)
