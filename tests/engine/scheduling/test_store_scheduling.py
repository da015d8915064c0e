"""Counting and admission of an engine that stores requests compressed: host logic alone."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import CompressionParams, SamplingParams
from sparsejax.cache import Entries
from sparsejax.compressor import StoreGeometry
from sparsejax.engine.requests.request import Request, Status
from sparsejax.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from sparsejax.engine.scheduling.store_limits import StoreLimits, cell_size, minus, within
from sparsejax.errors import InvalidArgumentError, PromptTooLongError

PAGE = 4
GEOMETRY = StoreGeometry(sinks=3, step=4, recent=4)
DELTA, DENSE = CompressionParams(method="deltakv"), CompressionParams()


def make_scheduler(entries: Entries, **changes: int) -> Scheduler:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_mixed_tokens": 16, "max_prefill_seqs": 4} | changes
    return Scheduler(
        SchedulerConfig(
            page_size=PAGE,
            num_free_entries=entries.full,
            entries_per_page_column=1,
            max_model_len=100,
            store=StoreLimits(GEOMETRY, entries, PAGE, cell_size(limits["max_mixed_tokens"])),
            **limits,
        )
    )


def make_request(name: object, length: int, outputs: int, compression: CompressionParams) -> Request:
    return Request(str(name), [1] * length, SamplingParams(max_tokens=outputs, ignore_eos=True), compression)


def held(lengths: list[tuple[int, bool]], limits: StoreLimits) -> Entries:
    """Entries of rows, token by token, as the device allocates them."""
    total = [0, 0, 0]
    for length, compressed in lengths:
        pages = [-(-length // PAGE)] * 2 + [0]
        if compressed and length:
            history = GEOMETRY.history(length)
            centers = sum(bool(GEOMETRY.is_center(p)) for p in range(history))
            pages = [pages[0], -(-centers // PAGE) + GEOMETRY.ring // PAGE, -(-(history - centers) // PAGE)]
        total = [one + other for one, other in zip(total, pages, strict=True)]
    return Entries(*total)


@settings(max_examples=60, deadline=None)
@given(
    jobs=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 25), st.booleans()), min_size=1, max_size=8),
    slack=st.tuples(*[st.integers(0, 20)] * 3),
)
def test_counts_are_exact_and_nobody_who_has_begun_lacks_a_page(jobs, slack):
    unlimited = StoreLimits(GEOMETRY, Entries(10**6, 10**6, 10**6), PAGE, 8)
    peaks = [unlimited.held(length + outputs - 1, compressed=delta) for length, outputs, delta in jobs]
    entries = Entries(*(max(column) + more for column, more in zip(zip(*peaks, strict=True), slack, strict=True)))
    scheduler = make_scheduler(entries)
    requests = [make_request(i, *job[:2], DELTA if job[2] else DENSE) for i, job in enumerate(jobs)]
    for request in requests:
        scheduler.add(request)
        assert request.max_tokens == request.params.max_tokens, "alone it fits"
    while scheduler.has_unfinished:
        assert not scheduler.must_preempt()
        plan = scheduler.schedule()
        for chunk in plan.prefill:
            if chunk.request.compression.compresses:
                assert len(plan.prefill) == 1
                assert chunk.start % 8 == 0
                assert chunk.count == 8 or chunk.is_last
        due = [each.request for each in plan.rings]
        assert due == [r for r in plan.decode if r.compression.compresses and GEOMETRY.due(r.num_computed)]
        active = [(r.num_computed, r.compression.compresses) for r in requests if r.row is not None]
        assert scheduler.settle(plan.balance) == minus(entries, held(active, unlimited))
        assert within(Entries(0, 0, 0), scheduler.free_entries)
        for request in requests:
            while request.num_unread and request.status is not Status.FINISHED:
                request.record(7)
                if len(request.output_token_ids) == request.max_tokens:
                    scheduler.finish(request, "length")
    assert scheduler.num_preemptions == 0
    assert scheduler.free_entries == scheduler.available_entries == entries


def test_a_request_waits_until_all_that_it_may_hold_is_unclaimed():
    one = StoreLimits(GEOMETRY, Entries(10**6, 10**6, 10**6), PAGE, 8).held(49, compressed=True)
    scheduler = make_scheduler(Entries(*(2 * count - 1 for count in one)))
    first, second = (make_request(i, 30, 20, DELTA) for i in range(2))
    scheduler.add(first)
    scheduler.add(second)
    for _ in range(6):
        scheduler.schedule()
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    scheduler.cancel("0")
    scheduler.schedule()
    assert second.status is Status.PREFILLING


def test_what_does_not_fit_is_refused_or_clipped():
    scheduler = make_scheduler(Entries(10, 6, 10))
    with pytest.raises(PromptTooLongError, match="the KV cache holds 40"):
        scheduler.check(make_request("a", 41, 1, DELTA))
    with pytest.raises(PromptTooLongError, match="the KV cache holds 24"):
        scheduler.check(make_request("b", 25, 1, DENSE))
    with pytest.raises(InvalidArgumentError, match="needs another cache"):
        scheduler.check(make_request("c", 5, 1, CompressionParams(method="random", budget_tokens=3)))
    request = make_request("d", 30, 50, DELTA)
    scheduler.add(request)
    assert request.max_tokens == 11


@pytest.mark.parametrize(("tokens", "cell"), [(1, 1), (2, 1), (16, 8), (100, 32), (2048, 1024)])
def test_every_step_has_room_for_a_cell(tokens, cell):
    assert cell_size(tokens) == cell


@given(sinks=st.integers(0, 6), step=st.integers(1, 7), recent=st.integers(1, 9))
def test_where_tokens_are_follows_from_the_length(sinks, step, recent):
    geometry, compressed = StoreGeometry(sinks, step, recent), 0
    for length in range(1, 80):
        due = length - sinks - compressed >= 2 * recent
        assert geometry.history_at_query(length) == min(length, sinks) + compressed
        compressed += recent if due else 0
        assert geometry.due(length) == due
        history = min(length, sinks) + compressed
        assert geometry.history(length) == history
        kinds = [bool(geometry.is_center(p)) for p in range(history)]
        assert geometry.centers(length) == sum(kinds)
        assert geometry.latents(length) == history - sum(kinds)
        assert [geometry.center_ordinals(p) for p in range(history) if kinds[p]] == list(range(sum(kinds)))
        assert [geometry.latent_ordinals(p) for p in range(history) if not kinds[p]] == list(
            range(history - sum(kinds))
        )
        assert length - history <= geometry.ring - 1
