"""Eviction in the engine equals its definition: the dense model whose queries see exactly what was kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from eviction_cases import (
    ENGINE,
    METHODS,
    PROMPTS,
    SMALL_CHUNKS,
    STRATEGIES,
    WATCHED,
    assert_all_free,
    compression,
    limited,
    name_of,
)
from eviction_oracle import GROUP, HEADS, LAYERS, LONGEST, Forward, assert_logprobs, forward, held, serve
from tiny_engine import CONFIG

PROMPT = PROMPTS[0]
LENGTH = len(PROMPT)


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm(**ENGINE)


@pytest.fixture(scope="module")
def chunked(make_llm):
    """Prompts in chunks of 32 tokens; for methods whose chunks need no alignment."""
    return limited(make_llm(**ENGINE), **SMALL_CHUNKS)


@pytest.fixture(scope="module")
def dense_output(llm):
    return llm.generate(PROMPT, WATCHED, use_tqdm=False)[0].outputs[0]


@pytest.fixture(scope="module")
def dense(params) -> Forward:
    return forward(params, PROMPT)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_holds_everything_changes_nothing(llm, dense_output, method):
    output = llm.generate(PROMPT, WATCHED, compression(method, budget=LENGTH + WATCHED.max_tokens), use_tqdm=False)[0]
    answer = output.outputs[0]
    assert answer.token_ids == dense_output.token_ids
    assert answer.logprobs == dense_output.logprobs, "bit by bit"
    assert (output.metrics.num_compressions, output.metrics.kept_tokens) == (0, None)


LOGIT_CASES = [
    *(compression(method) for method in METHODS),
    *(compression("h2o", strategy=strategy) for strategy in STRATEGIES[1:]),
    compression("h2o", num_per_evict=3),
    compression("h2o", interval_tokens=4),
    compression("kv_compress", interval_tokens=3),
    compression("keydiff", context_tokens=40),
    compression("snapkv", context_tokens=40),
    compression("kvzip", context_tokens=40),
    compression("h2o", context_tokens=40, interval_tokens=4),
    compression("h2o", context_tokens=40),
]


@pytest.mark.parametrize("asked", LOGIT_CASES, ids=name_of)
def test_logits_are_those_of_the_dense_model_over_what_was_kept(llm, params, asked):
    run = serve(llm, PROMPT, WATCHED, asked)
    last = run.after[-1]
    assert last.live.sum() < LAYERS * HEADS * last.length
    seen = run.before[last.length - 1]
    assert seen.live.any(-1).all(), "every head keeps something"
    assert_logprobs(run, forward(params, run.text, run.mask()))
    assert_all_free(llm)


@pytest.fixture
def recorded(monkeypatch):
    """Has an engine note what a row held, and its queries' moments, right before each compression."""

    def watch(llm) -> list:
        noted, runner = [], llm.engine.runner
        compress = runner.steps.compress

        def noting(params, cache, record, batch, spec):
            moments = None
            if record.moments is not None:
                slot = batch.moment_slot[0]
                moments = np.asarray(record.moments[:, slot]), float(record.counts[slot])
            noted.append((held(cache, int(batch.rows[0]), int(batch.text_length[0])), moments))
            return compress(params, cache, record, batch, spec)

        monkeypatch.setattr(runner, "steps", dataclasses.replace(runner.steps, compress=noting))
        return noted

    return watch


def block_mass(dense: Forward, block: int = 128) -> np.ndarray:
    """f64[L, H, LONGEST]: what each key gets in attention without a causal mask, scale 1, inside blocks."""
    mass = np.zeros((LAYERS, HEADS, LONGEST))
    for start in range(0, LENGTH, block):
        place = slice(start, min(start + block, LENGTH))
        logits = np.einsum("lqhd,lkhd->lhqk", dense.q[:, place], np.repeat(dense.k, GROUP, axis=2)[:, place])
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        mass[..., place] = p.sum(2).reshape(LAYERS, HEADS, GROUP, -1).sum(2)
    return mass


def reconstruction_max(params, chunk: int, lead_in: int) -> np.ndarray:
    """f64[L, H, LONGEST]: the most that a query gives each token of the prompt while it is repeated part by part."""
    most = np.zeros((LAYERS, HEADS, LONGEST))
    for start in range(0, LENGTH, chunk):
        again = PROMPT[max(start - lead_in, 0) : start + chunk]
        p = forward(params, [*PROMPT, *again]).p[:, :, LENGTH : LENGTH + len(again)]
        most = np.maximum(most, p.max(2).reshape(LAYERS, HEADS, GROUP, LONGEST).max(2))
    return most


SCORES = {
    "snapkv": lambda params, dense: dense.mass(range(LENGTH - 8, LENGTH)),
    "kv_compress": lambda params, dense: dense.mass(range(LENGTH - 8, LENGTH), power=2),
    "kv_compress-full_range": lambda params, dense: dense.mass(range(LENGTH), power=2),
    "h2o": lambda params, dense: dense.mass(range(LENGTH)),
    "h2o-prefill_window": lambda params, dense: dense.mass(range(LENGTH - 5, LENGTH)),
    "compactor": lambda params, dense: block_mass(dense),
    "kvzip": lambda params, dense: reconstruction_max(params, chunk=32, lead_in=8),
}
ASKED = {
    "snapkv": compression("snapkv"),
    "kv_compress": compression("kv_compress"),
    "kv_compress-full_range": compression("kv_compress", full_range=True),
    "h2o": compression("h2o", compress_once=True),
    "h2o-prefill_window": compression("h2o", compress_once=True, prefill_window=5),
    "compactor": compression("compactor"),
    "kvzip": compression("kvzip", lead_in_tokens=8),
}


@pytest.mark.parametrize("case", SCORES)
def test_prompts_record_the_dense_models_attention(llm, chunked, recorded, params, dense, case):
    expected = SCORES[case](params, dense)[..., :LENGTH]
    assert expected.std(-1).min() > 1e-3, "scores tell tokens apart"
    for engine in (llm,) if case == "compactor" else (llm, chunked):
        noted = recorded(engine)
        serve(engine, PROMPT, WATCHED, ASKED[case])
        assert noted[0][0].length == LENGTH
        np.testing.assert_allclose(noted[0][0].score[..., :LENGTH], expected, rtol=2e-4, atol=1e-5)


def test_prompts_record_moments_of_queries_before_rope(llm, chunked, recorded, dense):
    half = CONFIG.head_dim // 2
    angle = np.arange(LONGEST)[:, None] * CONFIG.rope.theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = dense.q[..., :half], dense.q[..., half:]
    q = np.concatenate([a * cos + b * sin, b * cos - a * sin], -1)[:, 4:LENGTH]  # the first four are left out
    for engine in (llm, chunked):
        noted = recorded(engine)
        serve(engine, PROMPT, WATCHED, compression("expected_attention"))
        moments, count = noted[0][1]
        assert count == LENGTH - 4
        np.testing.assert_allclose(moments[..., -1, :], q.sum(1), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(moments[..., :-1, :], np.einsum("lthi,lthj->lhij", q, q), rtol=1e-3, atol=1e-3)


DECODE_CASES = [
    compression("h2o"),
    compression("h2o", strategy="no_op", num_per_evict=3),
    compression("h2o", interval_tokens=4),
    compression("kv_compress", interval_tokens=3),
]


@pytest.mark.parametrize("asked", DECODE_CASES, ids=name_of)
def test_decode_steps_add_to_the_scores(llm, params, asked):
    """At any time the score of what is still held is the sum over all queries so far, seen over what was held then."""
    run = serve(llm, PROMPT, WATCHED, asked)
    whole = forward(params, run.text, run.mask())
    assert len(run.after) >= WATCHED.max_tokens
    first, power = LENGTH - (asked.window or LENGTH), {"h2o": 1, "kv_compress": 2}[asked.method]
    for row in run.after:
        expected = whole.mass(range(first, row.length), power=power)
        np.testing.assert_allclose(row.score[row.live], expected[row.live], rtol=5e-4, atol=2e-5)


@pytest.mark.parametrize("asked", [compression("h2o"), compression("h2o", sink_tokens=2, num_per_evict=3)], ids=name_of)
def test_every_step_evicts_the_lightest_unprotected_tokens(llm, params, asked):
    run = serve(llm, PROMPT, WATCHED, asked)
    whole = forward(params, run.text, run.mask())
    budget, count = asked.budget_tokens, asked.num_per_evict or 1
    position = np.arange(LONGEST)
    live, length, evictions = np.zeros((LAYERS, HEADS, LONGEST), bool), 0, 0
    for row in run.after:
        live[..., length : row.length] = True
        length = row.length
        scores = whole.mass(range(row.length))
        kept = (position < asked.sinks) | (position >= row.length - asked.recent(row.length))
        for layer in range(LAYERS):
            for head in range(HEADS):
                mine = live[layer, head]
                if mine.sum() > budget:
                    lightest = sorted((mine & ~kept).nonzero()[0], key=lambda at: scores[layer, head, at])
                    mine[lightest[: mine.sum() - (budget - count + 1)]] = False
                    evictions += 1
        np.testing.assert_array_equal(row.live, live)
    assert evictions > LAYERS * HEADS * 2
