"""What `LLM(...)` accepts, and how it says what it does not."""

from __future__ import annotations

from dataclasses import fields

import pytest

from sparsejax.config import EngineConfig
from sparsejax.errors import InvalidArgumentError, UnknownArgumentError


def test_defaults_are_valid_and_documented():
    config = EngineConfig()
    assert EngineConfig.from_kwargs() == config
    assert EngineConfig.__doc__ is not None
    for field in fields(EngineConfig):
        assert f"{field.name}:" in EngineConfig.__doc__, f"{field.name} has no description"


def test_lists_of_methods_become_tuples():
    assert EngineConfig.from_kwargs(methods=["full"]).methods == ("full",)


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("max_model_len", 0, "positive whole number, got 0"),
        ("max_num_seqs", 2.0, "positive whole number, got 2.0"),
        ("max_num_batched_tokens", True, "positive whole number, got True"),
        ("max_mixed_tokens", 0, "positive whole number, got 0"),
        ("max_prefill_seqs", -1, "positive whole number, got -1"),
        ("num_pages", "7", "positive whole number, got '7'"),
        ("page_size", 24, "power of two.*got 24"),
        ("page_size", 0, "power of two"),
        ("gpu_memory_utilization", 0, r"number in \(0, 1\], got 0"),
        ("gpu_memory_utilization", 1.5, r"in \(0, 1\], got 1.5"),
        ("gpu_memory_utilization", "90%", r"in \(0, 1\], got '90%'"),
        ("dtype", "float64", "auto, float32, bfloat16, float16; got 'float64'"),
        ("table_granularity", "per_token", "shared, per_layer, per_head"),
        ("implementation", "cuda", "triton, xla"),
        ("warmup", "all", "False, True, greedy"),
        ("tensor_parallel_size", 2, "not available yet, got 2"),
        ("methods", ["ful"], "must be one of full, .*; got 'ful'"),
        ("default_compression", "full", "CompressionParams, got 'full'"),
        ("seed", -1, "whole number.*got -1"),
        ("seed", True, "whole number.*got True"),
        ("page_size", True, "power of two"),
        ("gpu_memory_utilization", True, r"in \(0, 1\], got True"),
        ("skip_tokenizer_init", "yes", "True or False, got 'yes'"),
        ("enable_prefix_caching", 2, "True or False, got 2"),
        ("methods", 5, "a list of at least one name, got 5"),
        ("full_attention_layers", 5, "a list of layers, numbered from 0, got 5"),
        ("full_attention_layers", [0, -1], "a list of layers, numbered from 0"),
        ("max_num_seq", 3, "Did you mean 'max_num_seqs'"),
    ],
)
def test_bad_arguments_are_named(argument, value, words):
    error = UnknownArgumentError if argument == "max_num_seq" else InvalidArgumentError
    with pytest.raises(error, match=f"{argument}.*{words}"):
        EngineConfig.from_kwargs(**{argument: value})
