"""What is compiled at warm-up covers every call that requests can cause."""

from __future__ import annotations

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from sparsejax import CompressionParams, SamplingParams
from sparsejax.cache import CacheLayout
from sparsejax.engine.execution.eviction_batches import (
    EvictionShapes,
    compress_calls,
    evict_calls,
    idle_compress_calls,
    idle_evict_calls,
)
from sparsejax.engine.requests.compression_schedule import CompressionSchedule
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Compress, Evict

LONGEST = 1500
SHAPES = EvictionShapes(
    layout=CacheLayout(
        num_layers=2,
        num_kv_heads=2,
        head_dim=8,
        num_pages=64,
        max_rows=4,
        max_slots=LONGEST,
        page_size=4,
        granularity="per_head",
        dtype=jnp.float32,
        with_score=True,
        with_position=True,
    ),
    num_query_heads=4,
    compress_rows=4,
    evict_rows=(1, 2, 4),
    implementation=None,
)
BUDGETS = ({"budget_tokens": 300}, {"keep_fraction": 0.3}, {"keep_fraction": 0.9}, {"keep_fraction": 1.0})


def request(params: CompressionParams, length: int) -> Request:
    footprint = SimpleNamespace(schedule=CompressionSchedule(params, length))
    return Request(f"of {length}", [5] * length, SamplingParams(), params, footprint=footprint)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_warm_up_covers_every_compression(budget):
    params = CompressionParams(method="snapkv", **budget)
    known = {(spec, batch.rows.shape) for spec, batch in idle_compress_calls(params, SHAPES)}
    for length in range(40, LONGEST, 7):
        if length <= params.budget(length):
            continue
        entry = Compress(request(params, length), length, params.budget(length), held=length)
        for entries in ([entry], [entry] * 3):
            for _, spec, batch in compress_calls(entries, SHAPES, moment_slots={}):
                assert (spec, batch.rows.shape) in known, length


@pytest.mark.parametrize(
    ("params", "places"),
    [
        (CompressionParams(method="keydiff", budget_tokens=20), range(40, LONGEST, 24)),  # prompts that exceed the pool
        (CompressionParams(method="streaming_llm", budget_tokens=20), range(40, LONGEST, 24)),
        (CompressionParams(method="streaming_llm", budget_tokens=20, context_tokens=40), [40]),
    ],
    ids=str,
)
def test_warm_up_covers_compressions_between_chunks_and_behind_contexts(params, places):
    known = {(spec, batch.rows.shape) for spec, batch in idle_compress_calls(params, SHAPES)}
    for number, length in enumerate(places):
        held = params.budget(length) + 24 if number else length  # only what was never compressed holds all of its text
        entry = Compress(request(params, LONGEST), length, params.budget(length), held)
        for _, spec, batch in compress_calls([entry], SHAPES, moment_slots={}):
            assert (spec, batch.rows.shape) in known, length


def test_warm_up_compiles_no_compression_that_cannot_be():
    fits = (40, 60)  # tokens, for which the pool has room
    assert not list(idle_compress_calls(CompressionParams(method="random", budget_tokens=20), SHAPES, texts=fits))
    once = CompressionParams(method="keydiff", budget_tokens=20)
    assert all(spec.in_text_order for spec, _ in idle_compress_calls(once, SHAPES, texts=fits))


@pytest.mark.parametrize("strategy", ["reuse", "no_op"])
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_warm_up_covers_every_eviction(budget, strategy):
    params = CompressionParams(method="random", strategy=strategy, **budget)
    known = {(spec, batch.numbers.shape) for spec, batch in idle_evict_calls(params, SHAPES)}
    for length in range(40, LONGEST, 7):
        for bulk in (False, True):
            entry = Evict(request(params, 40), length, params.budget(length), held=length, bulk=bulk)
            for _, spec, batch in evict_calls([entry], SHAPES):
                assert (spec, batch.numbers.shape) in known, length


def test_a_budget_of_a_power_of_two_is_not_served_with_slots_for_twice_as_many():
    params = CompressionParams(method="random", strategy="reuse", budget_tokens=1024, num_per_evict=3)
    entry = Evict(request(params, 40), 1400, 1024, held=1024)
    assert evict_calls([entry], SHAPES)[0][1].max_slots == 1024 + SHAPES.layout.page_size


def test_a_window_beyond_all_texts_is_all_of_the_text():
    params = CompressionParams(method="kv_compress", keep_fraction=0.5, window_tokens=2**40)
    entry = Compress(request(params, 40), text_length=40, budget=20, held=40)
    ((_, _, batch),) = compress_calls([entry], SHAPES, moment_slots={})
    assert batch.window[0] == 40
