"""A step that fails reaches its caller as an exception; requests that others wait for are replayed, to the same end."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from tiny_engine import CONFIG, ENGINE, VOCAB

from sparsejax import LLM, CompressionParams, SamplingParams
from sparsejax.engine import engine as engine_module
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.errors import DuplicateRequestError, NotFiniteError, OutOfMemoryError
from sparsejax.methods import Method, registry

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


def test_a_cache_that_finds_no_room_says_so(monkeypatch, llm, expected):
    def no_room():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")

    llm.reset_prefix_cache()
    llm.engine.drain()
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "_init", no_room)
        with pytest.raises(OutOfMemoryError, match=r"while allocating a KV cache of \d+\.\d GiB"):
            llm.engine.runner.reset()
    llm.engine.runner.reset()
    assert llm.generate(PROMPTS[1], PARAMS[1], use_tqdm=False)[0].outputs[0].token_ids == expected[1]


def test_an_interrupted_call_leaves_a_stream_unharmed(monkeypatch, llm, expected):
    stream = llm.stream(PROMPTS[2], PARAMS[2])
    parts = [next(stream), next(stream)]
    fail_at(monkeypatch, llm, "decode", 2, KeyboardInterrupt(), lost=False)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[:2], PARAMS[:2], use_tqdm=False)
    parts += stream
    assert [token for part in parts for token in part.outputs[0].token_ids] == expected[2]
    assert not llm.engine.scheduler.has_unfinished


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_end_their_request_with_an_error(params, temperature):
    poison = VOCAB - 1
    llm = LLM.from_params(CONFIG, {**params, "embed": params["embed"].at[poison].set(np.nan)}, **ENGINE)
    sampling = SamplingParams(temperature=temperature, max_tokens=4, ignore_eos=True, seed=1, logprobs=1)
    healthy = llm.generate(PROMPTS[0], sampling, use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(NotFiniteError, match=r"request .* NaN or infinite after 0 generated tokens"):
        llm.generate([*PROMPTS[0], poison], sampling, use_tqdm=False)
    assert llm.generate(PROMPTS[0], sampling, use_tqdm=False)[0].outputs[0].token_ids == healthy
    engine = llm.engine
    bad = engine.add("bad", TokenizedPrompt(None, [poison]), sampling)
    with pytest.raises(NotFiniteError, match="bad"):
        run_all(engine)
    assert bad.finished
    assert bad.output().outputs[0].finish_reason == "abort"
    good = engine.add("good", TokenizedPrompt(None, PROMPTS[0]), sampling)
    run_all(engine)
    assert good.output().outputs[0].token_ids == healthy
    llm.reset_prefix_cache()
    assert engine.scheduler.free_entries == engine.runner.layout.num_entries - 1


@dataclass(frozen=True)
class Broken(Method):
    """A method of somebody's own, with a mistake in it."""

    name: ClassVar[str] = "broken"
    summary: ClassVar[str] = "Never works."

    def layer_scores(self, layer):
        raise ZeroDivisionError("a mistake")


def test_a_method_that_fails_ends_its_own_request_only(monkeypatch, make_llm, expected):
    monkeypatch.setitem(registry._METHODS, "broken", Broken)
    llm = make_llm(methods=["full", "broken"])
    engine = llm.engine
    good = engine.add("good", TokenizedPrompt(None, PROMPTS[0]), PARAMS[0])
    bad = engine.add(
        "bad", TokenizedPrompt(None, PROMPTS[1]), PARAMS[0], CompressionParams(method="broken", budget_tokens=8)
    )
    with pytest.raises(ZeroDivisionError, match="a mistake") as error:
        run_all(engine)
    assert any("'bad'" in note for note in error.value.__notes__)
    assert bad.output().outputs[0].finish_reason == "abort"
    run_all(engine)
    assert good.output().outputs[0].token_ids == expected[0]
    llm.reset_prefix_cache()
    assert engine.scheduler.free_entries == engine.runner.layout.num_entries - 1


class Letters:
    """Token i is character i + 65; `error` is raised where `fails` says so, an interrupt once."""

    eos_token_id, all_special_ids = 2, ()

    def __init__(self, error):
        self.fails, self.error = None, error

    def encode(self, text, **_):
        return [ord(letter) - 65 for letter in text]

    def decode(self, ids, *, skip_special_tokens):
        if self.fails is not None and self.fails(ids):
            self.fails = self.fails if isinstance(self.error, Exception) else None
            raise self.error
        return "".join(chr(65 + token) for token in ids)


@pytest.mark.parametrize("number", [0, 4, 9])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("no such token")])
def test_a_token_whose_text_fails_is_not_lost(params, expected, error, number):
    """An interrupt is made good by a replay; an error that would come again ends its request."""
    tokenizer = Letters(error)
    llm = LLM.from_params(CONFIG, params, tokenizer=tokenizer, **(ENGINE | {"skip_tokenizer_init": False}))
    engine, (first, other) = llm.engine, expected[:2]
    sampling = [dataclasses.replace(each, stop="never", logprobs=1) for each in PARAMS[:2]]
    runs = [engine.add(str(i), TokenizedPrompt(None, PROMPTS[i]), sampling[i]) for i in range(2)]
    taken = runs[0].answers[0].request.output_token_ids
    tokenizer.fails = lambda ids: len(taken) == number + 1 and ids[-1] == first[number]
    with pytest.raises(type(error)):
        run_all(engine)
    run_all(engine)
    outputs = [run.output().outputs[0] for run in runs]
    assert outputs[1].token_ids == other
    assert outputs[1].text == "".join(chr(65 + token) for token in other)
    expected_tokens = first if isinstance(error, KeyboardInterrupt) else first[:number]
    assert outputs[0].token_ids == expected_tokens
    assert outputs[0].text == "".join(chr(65 + token) for token in expected_tokens)
    assert len(outputs[0].logprobs) == len(expected_tokens)
    assert outputs[0].finish_reason == ("length" if isinstance(error, KeyboardInterrupt) else "abort")


def test_an_id_is_taken_until_all_of_its_answers_have_ended(llm):
    engine, several = llm.engine, SamplingParams(n=2, max_tokens=2, seed=1)
    submission = engine.add("x", TokenizedPrompt(None, PROMPTS[0]), several)
    with pytest.raises(DuplicateRequestError, match="'x'"):
        engine.add("x", TokenizedPrompt(None, PROMPTS[0]), PARAMS[0])
    run_all(engine)
    assert submission.finished
    engine.cancel(engine.add("x", TokenizedPrompt(None, PROMPTS[0]), PARAMS[0]))
    engine.cancel(engine.add("x", TokenizedPrompt(None, PROMPTS[0]), several))
    assert not engine.has_unfinished


HOST_CODE = [
    str(Path(engine_module.__file__).parent / f"{name}.py")
    for name in (
        "engine", "in_flight", "requests/request", "scheduling/scheduler", "scheduling/rows", "scheduling/blocks",
        "scheduling/prefix_cache", "scheduling/prefix_tree", "scheduling/contexts",
    )
]  # fmt: skip


class InterruptAt:
    """Raises KeyboardInterrupt at the n-th line that the engine's host code runs in the block; None: counts them."""

    def __init__(self, number: int | None, files: list[str] | None = None):
        self.number, self.count = number, 0
        self.files = HOST_CODE if files is None else files

    def _line(self, frame, event, argument):
        del frame, argument
        if event == "line":
            self.count += 1
            if self.count == self.number:
                raise KeyboardInterrupt
        return self._line

    def __enter__(self):
        files = set(self.files)
        sys.settrace(lambda frame, event, argument: self._line if frame.f_code.co_filename in files else None)
        return self

    def __exit__(self, *_):
        sys.settrace(None)


def test_an_interrupt_at_any_line_of_a_step_loses_nothing(llm):
    """Requests that share a prefix, one of which is a resident's."""
    engine, shared = llm.engine, PROMPTS[1][:12]
    prompts = [shared + PROMPTS[0], shared + PROMPTS[1][12:32], shared + PROMPTS[2]]
    params = [dataclasses.replace(each, max_tokens=3) for each in PARAMS]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    def serve(number):
        llm.reset_prefix_cache()
        llm.generate(shared, params[0], use_tqdm=False)
        submissions = [
            engine.add(f"{number}-{i}", TokenizedPrompt(None, prompt), params[i]) for i, prompt in enumerate(prompts)
        ]
        with InterruptAt(number) as interrupt, contextlib.suppress(KeyboardInterrupt):
            run_all(engine)
        waiting = [each.order for each in engine.scheduler._waiting]
        assert waiting == sorted(waiting)
        run_all(engine)
        assert [each.output().outputs[0].token_ids for each in submissions] == expected
        llm.reset_prefix_cache()
        assert engine.scheduler.free_entries == engine.runner.layout.num_entries - 1
        assert not engine._answers
        assert not engine._submitted
        return interrupt.count

    lines = serve(None)
    assert lines > 1000
    for number in np.random.default_rng(0).choice(lines, 40, replace=False) + 1:
        assert serve(int(number)) == number


def test_a_fault_is_told_to_its_owner(params):
    """Another call's step may meet it."""
    poison = VOCAB - 1
    llm = LLM.from_params(CONFIG, {**params, "embed": params["embed"].at[poison].set(np.nan)}, **ENGINE)
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    expected = llm.generate(PROMPTS[0], sampling, use_tqdm=False)[0].outputs[0].token_ids
    good, bad = llm.stream(PROMPTS[0], sampling), llm.stream([poison], sampling)
    parts = [next(good)]
    with pytest.raises(NotFiniteError):
        next(bad)
    parts += good
    assert [token for part in parts for token in part.outputs[0].token_ids] == expected
    submission = llm.engine.add("bad", TokenizedPrompt(None, [poison]), sampling)
    assert llm.generate(PROMPTS[0], sampling, use_tqdm=False)[0].outputs[0].token_ids == expected
    assert isinstance(submission.error, NotFiniteError)


@pytest.mark.parametrize("place", ["engine", "scheduling.scheduler"])
def test_an_interrupt_while_prompts_are_queued_leaves_none_behind(llm, expected, place):
    module = sys.modules[f"sparsejax.engine.{place}"].__file__
    for number in range(20, 60, 3):
        with InterruptAt(number, [module]) as interrupt, contextlib.suppress(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert interrupt.count == number
        assert not llm.engine.scheduler.has_unfinished
        assert not llm.engine._answers
        assert not llm.engine._submitted
    assert [each.outputs[0].token_ids for each in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected
