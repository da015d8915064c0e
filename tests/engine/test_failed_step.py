"""A step that fails reaches its caller as an exception; requests that others wait for are replayed, to the same end."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny_engine import VOCAB

from sparsejax import SamplingParams
from sparsejax.engine.inputs import TokenizedPrompt
from sparsejax.errors import OutOfMemoryError

RNG = np.random.default_rng(4)
PROMPTS = [RNG.integers(3, VOCAB, size).tolist() for size in (5, 45, 9)]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=8, max_tokens=10, ignore_eos=True, presence_penalty=0.5),
    SamplingParams(temperature=0.9, seed=9, max_tokens=12, ignore_eos=True, top_k=9),
]


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm()


@pytest.fixture(scope="module")
def expected(llm):
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


def fail_at(monkeypatch, llm, step: str, call: int, error: BaseException, *, lost: bool) -> None:
    """The step's `call`-th run raises; `lost`: after it has taken the donated cache."""
    run, calls = getattr(llm.engine.runner, step), iter(range(1, 1000))

    def failing(*work):
        if next(calls) != call:
            return run(*work)
        if lost:
            run(*work)
            jax.tree.map(lambda x: x.delete(), (llm.engine.runner.cache, llm.engine.runner.state))
        raise error

    monkeypatch.setattr(llm.engine.runner, step, failing)


def run_all(engine) -> None:
    while engine.has_unfinished:
        engine.step()


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize(("step", "call"), [("prefill", 1), ("mixed", 1), ("decode", 1), ("decode", 5)])
def test_requests_survive_a_step_that_fails(monkeypatch, llm, expected, step, call, lost):
    llm.reset_prefix_cache()  # what a former case left would spare the prefills that are to fail
    engine = llm.engine
    submissions = [
        engine.add(f"survivor-{i}", TokenizedPrompt(None, prompt), params)
        for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    fail_at(monkeypatch, llm, step, call, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room"), lost=lost)
    with pytest.raises(OutOfMemoryError, match="while running a step"):
        run_all(engine)
    assert engine.scheduler.free_entries == engine.runner.layout.num_entries - 1
    run_all(engine)
    assert [submission.output().outputs[0].token_ids for submission in submissions] == expected
    assert all(submission.output().outputs[0].finish_reason == "length" for submission in submissions)


def test_an_interrupted_call_leaves_a_stream_unharmed(monkeypatch, llm, expected):
    stream = llm.stream(PROMPTS[2], PARAMS[2])
    parts = [next(stream), next(stream)]
    fail_at(monkeypatch, llm, "decode", 2, KeyboardInterrupt(), lost=False)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[:2], PARAMS[:2], use_tqdm=False)
    parts += stream
    assert [token for part in parts for token in part.outputs[0].token_ids] == expected[2]
    assert not llm.engine.scheduler.has_unfinished
