"""Every bad value is refused with an error that names the argument, what it got and what is allowed."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from sparsejax import methods
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.errors import InvalidArgumentError, SparsejaxError, UnknownArgumentError

BAD = [
    ("n", 0), ("n", 1.0), ("n", True), ("n", "2"),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", None),
    ("temperature", "hot"), ("temperature", True),
    ("top_k", -2), ("top_k", 1.5),
    ("top_p", 0.0), ("top_p", 1.01), ("top_p", math.nan),
    ("min_p", -0.1), ("min_p", 1.1),
    ("repetition_penalty", 0.0), ("repetition_penalty", 1e-3), ("repetition_penalty", 101),
    ("repetition_penalty", math.inf),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
    ("seed", -1), ("seed", 2**32), ("seed", 0.5),
    ("max_tokens", 0), ("max_tokens", None), ("max_tokens", 1.5),
    ("min_tokens", -1), ("min_tokens", 17),
    ("stop", ""), ("stop", [""]), ("stop", [1]), ("stop", 5), ("stop", "\udcff"),
    ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("stop_token_ids", "ab"),
    ("ignore_eos", 1), ("include_stop_str_in_output", None), ("skip_special_tokens", "yes"),
    ("logprobs", -1), ("logprobs", 21), ("logprobs", True), ("prompt_logprobs", 21),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_are_named(name, value):
    with pytest.raises(InvalidArgumentError, match=f"^{name} ") as caught:
        SamplingParams(**{name: value})
    shown = value[0] if isinstance(value, list) else value
    assert repr(shown) in str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, SparsejaxError)


def test_every_argument_is_accepted():
    params = SamplingParams(
        n=2, temperature=0, top_k=np.int64(5), top_p=np.float32(0.5), min_p=0.1, repetition_penalty=1.1,
        presence_penalty=-1, frequency_penalty=2, seed=2**32 - 1, max_tokens=5, min_tokens=5, stop=["a", "b", "a"],
        stop_token_ids=np.array([3, 4]), ignore_eos=True, include_stop_str_in_output=True, skip_special_tokens=False,
        logprobs=0, prompt_logprobs=20,
    )  # fmt: skip
    assert params.stop_strings == ("a", "b")
    assert params.stop_ids == (3, 4)
    assert isinstance(params.temperature, float)
    assert type(params.top_k) is int
    assert hash(params) == hash(dataclasses.replace(params))


def test_normalisation():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams().stop == ()
    assert SamplingParams().stop_token_ids == ()
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0) == SamplingParams()
    assert SamplingParams().max_tokens == 16


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"max_tokens": np.float32(4)}, "max_tokens must be a whole number"),
        ({"top_k": np.array([1, 2])}, "top_k must be a whole number"),
        ({"seed": np.arange(3)}, "seed must be a whole number"),
        ({"stop_token_ids": np.array([[1, 2]])}, "stop_token_ids"),
    ],
    ids=str,
)
def test_arrays_are_whole_numbers_only_if_they_are_one(argument, words):
    with pytest.raises(InvalidArgumentError, match=words):
        SamplingParams(**argument)
    assert SamplingParams(max_tokens=np.array(4)).max_tokens == 4


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(UnknownArgumentError, match=r"no argument 'temprature'. Did you mean 'temperature'\?") as caught:
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
    assert isinstance(caught.value, TypeError)
    with pytest.raises(UnknownArgumentError, match=r"Valid arguments: .*max_tokens.*top_p"):
        SamplingParams(xyzzy=1)  # type: ignore[call-arg]
    with pytest.raises(UnknownArgumentError, match=r"CompressionParams has no argument 'metod'. Did you mean 'method'"):
        CompressionParams(metod="full")  # type: ignore[call-arg]


def test_stop_ids_that_min_tokens_must_hold_back_are_limited():
    assert len(SamplingParams(stop_token_ids=range(50)).stop_ids) == 50
    with pytest.raises(InvalidArgumentError, match="stop_token_ids may have at most 16"):
        SamplingParams(stop_token_ids=range(17), min_tokens=1)


def test_methods():
    assert methods.available()[0] == "full"
    assert CompressionParams().method == "full"
    assert methods.get("full")() == methods.Full()
    for name in ("ful", "snap", None, ["full"]):
        with pytest.raises(UnknownArgumentError, match=r"method must be one of 'full', .*'snapkv'.*; got"):
            CompressionParams(method=name)  # type: ignore[arg-type]
    with pytest.raises(UnknownArgumentError, match=r"Did you mean 'full'\?"):
        CompressionParams(method="ful")
