"""Log-probability entries, and metrics derived from times."""

from __future__ import annotations

import numpy as np
import pytest

from sparsejax.engine.requests.outputs import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    logprobs_of_token,
)

TOP_IDS = np.array([7, 3, 9, -1], np.int32)
TOP = np.array([-0.5, -1.5, -2.5, -np.inf], np.float32)


def test_the_token_comes_first_and_then_the_likeliest():
    entries = logprobs_of_token(5, -4.0, 12, TOP_IDS, TOP, 2, decode=lambda token: f"<{token}>")
    assert list(entries) == [5, 7, 3]
    assert entries[5] == Logprob(-4.0, 12, "<5>")
    assert entries[7] == Logprob(-0.5, 1, "<7>")
    assert entries[3] == Logprob(-1.5, 2, "<3>")


def test_a_likely_token_is_entered_once():
    entries = logprobs_of_token(3, -1.5, 2, TOP_IDS, TOP, 3)
    assert [(token, entry.rank) for token, entry in entries.items()] == [(3, 2), (7, 1), (9, 3)]
    assert entries[3].decoded_token is None


def test_zero_asks_for_the_token_alone_and_absent_rivals_are_left_out():
    assert list(logprobs_of_token(5, -4.0, 12, TOP_IDS, TOP, 0)) == [5]
    assert list(logprobs_of_token(7, -0.5, 1, TOP_IDS, TOP, 4)) == [7, 3, 9]


def test_entries_are_plain_python():
    entry = logprobs_of_token(np.int32(5), np.float32(-4), np.int32(12), TOP_IDS, TOP, 1)[5]
    assert type(entry.logprob) is float
    assert type(entry.rank) is int


def test_metrics():
    metrics = RequestMetrics(arrival_time=10.0)
    assert metrics.ttft is metrics.queue_time is metrics.e2e_time is metrics.tokens_per_second is None
    metrics = RequestMetrics(10.0, num_generated_tokens=9, first_scheduled_time=11.0, first_token_time=12.0,
                             finished_time=16.0)  # fmt: skip
    assert (metrics.queue_time, metrics.ttft, metrics.e2e_time) == (1.0, 2.0, 6.0)
    assert metrics.tokens_per_second == pytest.approx(8 / 4)
    one = RequestMetrics(0.0, num_generated_tokens=1, first_token_time=1.0, finished_time=1.0)
    assert one.tokens_per_second is None


def test_outputs_have_vllms_shape():
    answer = CompletionOutput(index=0, text="hi", token_ids=[1, 2])
    assert not answer.finished
    answer.finish_reason = "stop"
    assert answer.finished
    out = RequestOutput("id", "hello", [3], None, [answer], finished=True, metrics=RequestMetrics(0.0))
    assert (out.outputs[0].text, out.outputs[0].token_ids, out.outputs[0].stop_reason) == ("hi", [1, 2], None)
