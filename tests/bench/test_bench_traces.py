"""Traces: the built-in ones against an independent reading of their definition, the random ones by their properties."""

import json

import numpy as np
import pytest

from sparsejax.bench import traces
from sparsejax.bench.traces import Trace, TraceRequest
from sparsejax.errors import InvalidArgumentError


def test_mix600_is_what_it_is_defined_to_be():
    rng = np.random.default_rng(0)
    inputs = [int(min(max(x, 16.0), 8192.0)) for x in rng.lognormal(6.2, 1.0, 600)]
    outputs = rng.integers(16, 513, 600)
    trace = traces.load("mix600")
    assert [request.input_tokens for request in trace.requests] == inputs
    assert [request.output_tokens for request in trace.requests] == list(outputs)
    assert trace.input_tokens == sum(inputs)
    assert trace.output_tokens == int(outputs.sum())
    assert {request.arrival for request in trace.requests} == {0.0}


@pytest.mark.parametrize(
    ("name", "requests", "inputs", "outputs"),
    [("512x1024x256", 512, 1024, 256), ("24x32k", 24, 32000, 1024), ("3x5x7", 3, 5, 7)],
)
def test_equal_requests(name, requests, inputs, outputs):
    trace = traces.load(name)
    assert trace.name == name
    assert len(trace) == requests
    assert {(r.arrival, r.input_tokens, r.output_tokens) for r in trace.requests} == {(0.0, inputs, outputs)}
    assert trace.longest == inputs + outputs


def test_itl32k_is_one_long_prompt_behind_eight_that_decode():
    *running, long = traces.load("itl32k").requests
    assert {(r.arrival, r.input_tokens) for r in running} == {(0.0, 1024)}
    assert len(running) == 8
    assert (long.arrival > 0, long.input_tokens) == (True, 32000)


def test_prompts_are_random_repeatable_and_distinct():
    first, second, *_ = traces.load("3x400x7").requests
    prompt = first.prompt(64)
    assert prompt == first.prompt(64)
    assert prompt != second.prompt(64)
    assert len(prompt) == 400
    assert len(set(prompt)) > 55
    assert set(prompt) <= set(range(64))


def test_prefix64x8k_shares_a_prompt_and_nothing_else():
    trace = traces.load("prefix64x8k")
    assert len(trace) == 64
    prompts = [request.prompt(1000) for request in trace.requests[::20]]
    assert {len(prompt) for prompt in prompts} == {8192 + 128}
    assert all(prompt[:8192] == prompts[0][:8192] for prompt in prompts)
    assert len({tuple(prompt[8192:]) for prompt in prompts}) == len(prompts)


def test_random_lengths_and_arrivals():
    trace = traces.generate("random", requests=500, input_len=100, output_len=40, rate=10.0, seed=3)
    inputs = np.array([request.input_tokens for request in trace.requests])
    assert inputs.min() >= 50
    assert inputs.max() <= 150
    assert len(set(inputs)) > 50
    arrivals = np.array([request.arrival for request in trace.requests])
    assert (np.diff(arrivals) >= 0).all()
    assert 1 / np.diff(arrivals).mean() == pytest.approx(10.0, rel=0.2)
    assert trace == traces.generate("random", requests=500, input_len=100, output_len=40, rate=10.0, seed=3)
    assert trace != traces.generate("random", requests=500, input_len=100, output_len=40, rate=10.0, seed=4)


def test_lognormal_lengths():
    trace = traces.generate("lognormal", requests=2000, input_len=300, output_len=40)
    logs = np.log([request.input_tokens for request in trace.requests])
    assert np.median(logs) == pytest.approx(np.log(300), abs=0.1)
    assert logs.std() == pytest.approx(1.0, abs=0.1)
    equal = traces.generate("lognormal", requests=5, input_len=300, output_len=40, spread=0.0)
    assert {(r.input_tokens, r.output_tokens) for r in equal.requests} == {(300, 40)}


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "mine.jsonl"
    trace = Trace("mine", (TraceRequest(0.5, 3, 2, prompt_token_ids=(5, 6, 7)), TraceRequest(0.0, 9, 1, seed=4)))
    assert [request.arrival for request in trace.requests] == [0.0, 0.5]
    traces.write_jsonl(trace, path)
    assert traces.load(str(path)) == trace
    assert trace.requests[1].prompt(64) == [5, 6, 7]


def test_jsonl_defaults(tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2], "output_tokens": 3}\n\n{"input_tokens": 9, "output_tokens": 1}\n')
    first, second = traces.read_jsonl(path).requests
    assert (first.arrival, first.input_tokens) == (0.0, 2)
    assert second.prompt(64) == second.prompt(64)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"input_tokens": 4}, "output_tokens"),
        ({"input_tokens": 4, "output_tokens": 0}, "output_tokens must be"),
        ({"input_tokens": 4, "output_tokens": 1, "arival": 0}, "arrival"),
        ({"input_tokens": 4, "output_tokens": 1, "arrival": -1}, "arrival"),
        ({"input_tokens": 4, "output_tokens": 1, "arrival": float("inf")}, "arrival must be a finite number"),
        ({"input_tokens": 4, "output_tokens": 1, "arrival": "0"}, "arrival must be a finite number"),
        ({"input_tokens": True, "output_tokens": 1}, "input_tokens must be"),
        ({"input_tokens": 4, "output_tokens": 1, "prompt_token_ids": [1]}, "length of prompt_token_ids"),
        ({"output_tokens": 1, "prompt_token_ids": ["a"]}, "whole numbers"),
        ({"output_tokens": 1, "prompt_token_ids": 5}, "must be a list"),
        ([1], "object"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"input_tokens": 1, "output_tokens": 1}\n' + json.dumps(line) + "\n")
    with pytest.raises(InvalidArgumentError, match=f"line 2.*{message}"):
        traces.read_jsonl(path)


def test_prompts_of_another_vocabulary_are_named():
    with pytest.raises(InvalidArgumentError, match="below 256"):
        TraceRequest(0.0, 2, 1, prompt_token_ids=(1, 256)).prompt(256)


def test_bad_requests_for_traces():
    with pytest.raises(InvalidArgumentError, match="mix600"):
        traces.load("mix60")
    with pytest.raises(InvalidArgumentError, match="rate"):
        traces.generate("random", rate=0.0)
    with pytest.raises(InvalidArgumentError, match="spread"):
        traces.generate("random", spread=1.5)
    with pytest.raises(InvalidArgumentError, match="requests"):
        traces.generate("random", requests=0)
    with pytest.raises(InvalidArgumentError, match="no requests"):
        Trace("empty", ())
