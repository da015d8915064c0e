"""When an answer ends, why, and what is in its text then."""

from __future__ import annotations

import pytest

from sparsejax.engine.requests.detokenizer import Detokenizer
from sparsejax.engine.requests.request import Request
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.requests.stopping import Stop, check_stop, detokenizer_for

EOS = 0


def decode(ids) -> str:
    """Token 1 is "a", 2 is "b", ...; the end token is silent, as special tokens are."""
    return "".join(chr(96 + token) for token in ids if token != EOS)


def run(answer, *, text: bool = True, **params) -> tuple[Request, Detokenizer | None, Stop | None]:
    """Feeds the tokens one by one until the answer ends."""
    request = Request("id", [20, 21], SamplingParams(**{"max_tokens": 50, **params}))
    detokenizer = detokenizer_for(request, decode) if text else None
    for token in answer:
        request.num_dispatched_outputs += 1
        request.record(token)
        stop = check_stop(request, token, eos_token_ids=(EOS, 99), detokenizer=detokenizer)
        if stop is not None:
            return request, detokenizer, stop
    return request, detokenizer, None


ANSWER = [1, 2, 3, EOS, 4, 5, 6]  # "abc", end, "def"


@pytest.mark.parametrize(
    ("params", "tokens", "text", "stop"),
    [
        ({}, 4, "abc", Stop("stop", None)),
        ({"ignore_eos": True}, 7, "abcdef", None),
        ({"ignore_eos": True, "max_tokens": 6}, 6, "abcde", Stop("length")),
        ({"max_tokens": 4}, 4, "abc", Stop("stop", None)),
        ({"min_tokens": 3}, 4, "abc", Stop("stop", None)),
        ({"min_tokens": 4}, 7, "abcdef", None),
        ({"stop_token_ids": [2]}, 2, "a", Stop("stop", 2)),
        ({"stop_token_ids": [2], "include_stop_str_in_output": True}, 2, "ab", Stop("stop", 2)),
        ({"stop_token_ids": [2, 3], "min_tokens": 2}, 3, "ab", Stop("stop", 3)),
        ({"stop_token_ids": [0], "ignore_eos": True}, 4, "abc", Stop("stop", 0)),
        ({"stop": "bc"}, 3, "a", Stop("stop", "bc")),
        ({"stop": "bc", "include_stop_str_in_output": True}, 3, "abc", Stop("stop", "bc")),
        ({"stop": ["xyz", "c"]}, 3, "ab", Stop("stop", "c")),
        ({"stop": ["cz"]}, 4, "abc", Stop("stop", None)),
        ({"stop": "b", "max_tokens": 2}, 2, "a", Stop("stop", "b")),
        ({"stop": "b", "stop_token_ids": [2]}, 2, "a", Stop("stop", 2)),
        ({"stop": "bc", "min_tokens": 3, "ignore_eos": True}, 7, "abcdef", None),
        ({"stop": "cd", "min_tokens": 3, "ignore_eos": True}, 5, "ab", Stop("stop", "cd")),
        ({"stop": "cx", "max_tokens": 3}, 3, "abc", Stop("length")),
    ],
)
def test_how_answers_end(params, tokens, text, stop):
    request, detokenizer, found = run(ANSWER, **params)
    assert detokenizer is not None
    if found is None:
        detokenizer.finish()
    assert found == stop
    assert request.output_token_ids == ANSWER[:tokens], "the token that ends the answer is one of its tokens"
    assert detokenizer.text == text


def test_without_text_tokens_still_end_answers():
    assert run(ANSWER, text=False)[2] == Stop("stop")
    assert run(ANSWER, text=False, stop_token_ids=[2])[2] == Stop("stop", 2)
    assert run(ANSWER, text=False, max_tokens=2)[2] == Stop("length")


def test_the_clipped_limit_counts():
    request = Request("id", [20], SamplingParams(max_tokens=50))
    request.max_tokens = 1
    request.num_dispatched_outputs = 1
    request.record(7)
    assert check_stop(request, 7, eos_token_ids=()) == Stop("length")
