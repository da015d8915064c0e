"""The engine and the requests that the tests of eviction share, so that they share what is compiled."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from tiny_engine import VOCAB

from sparsejax import LLM, CompressionParams, SamplingParams, methods
from sparsejax.engine.scheduling.scheduler import Scheduler

SMALL_CHUNKS = {"max_num_batched_tokens": 32, "max_mixed_tokens": 32}  # for `limited`
METHODS = tuple(name for name in methods.available() if methods.get(name).family == "evict")
STEPPING = tuple(name for name in METHODS if methods.get(name).evicts_per_step)
STRATEGIES = ("reuse", "free_block", "sparse_copy", "no_op")
# 256 tokens a step, because compactor's chunks are multiples of 128 and decodes may take half of a step.
ENGINE = {"methods": METHODS, "max_num_batched_tokens": 256}

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(3, VOCAB, size).tolist() for size in (60, 45, 21, 64, 50, 9)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, seed=1)
WATCHED = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True, seed=1, logprobs=20)


def limited(llm: LLM, **limits: int) -> LLM:
    """Gives an engine that has done nothing yet a pool of fewer free entries, or smaller chunks, by the names of
    `SchedulerConfig`: what was compiled for the larger ones serves these, too."""
    engine = llm.engine
    engine.scheduler = Scheduler(dataclasses.replace(engine.scheduler.config, **limits))
    cache, free = engine.runner.cache, engine.scheduler.config.num_free_entries
    count = np.asarray(free, np.int32)
    engine.runner.cache = dataclasses.replace(cache, free=dataclasses.replace(cache.free, count=jax.device_put(count)))
    return llm


def compression(method: str, budget: int | None = 24, **options) -> CompressionParams:
    """Parameters that suit texts of some tens of tokens."""
    policy = methods.get(method)
    defaults = {}
    if policy.default_window_tokens:
        defaults["window_tokens"] = 8
    if method == "compactor":
        defaults |= {"chunk_size": 128, "sink_tokens": 2, "recent_tokens": 4}
    if method == "kvzip":
        defaults["chunk_tokens"] = 32
    return CompressionParams(method=method, budget_tokens=budget, **defaults | options)


def name_of(asked: CompressionParams) -> str:
    """A test's id."""
    given = ("strategy", "num_per_evict", "interval_tokens", "context_tokens")
    return "-".join([asked.method, *(f"{name}={getattr(asked, name)}" for name in given if getattr(asked, name))])


def tokens(outputs) -> list[list[int]]:
    """Of the first answers."""
    return [output.outputs[0].token_ids for output in outputs]


def assert_all_free(llm) -> None:
    """Nothing is held, by requests or for reuse; host and device agree."""
    engine = llm.engine
    assert not engine.has_unfinished
    engine.reset_prefix_cache()
    engine.runner.release(engine.scheduler.schedule().release)
    cache = engine.runner.cache
    assert int(cache.free.count) == engine.scheduler.free_entries == engine.scheduler.config.num_free_entries
    assert not np.asarray(cache.table.length).any()
    assert not np.asarray(cache.free.references).any()


def run(llm, requests, params: SamplingParams | list[SamplingParams] = GREEDY):
    """The outputs of requests (prompt, compression) in one batch."""
    return llm.generate([prompt for prompt, _ in requests], params, [asked for _, asked in requests], use_tqdm=False)


def one_by_one(llm, requests, params: SamplingParams = GREEDY) -> list[list[int]]:
    """The tokens of each request alone."""
    return [tokens(run(llm, [each], params))[0] for each in requests]


def finish(engine) -> None:
    while engine.has_unfinished:
        engine.step()
