"""What `LLM(...)` accepts, and how it says what it does not."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from sparsejax.config import EngineConfig
from sparsejax.errors import InvalidArgumentError, UnknownArgumentError


def test_defaults_are_valid_and_documented():
    config = EngineConfig()
    assert EngineConfig.from_kwargs() == config
    assert EngineConfig.__doc__ is not None
    for field in fields(EngineConfig):
        assert f"{field.name}:" in EngineConfig.__doc__, f"{field.name} has no description"


def test_values_are_normalised():
    config = EngineConfig(methods=["full"], full_attention_layers="4,0", seed=np.int64(3), page_size=np.int32(16))
    assert (config.methods, config.full_attention_layers, config.seed, config.page_size) == (("full",), (0, 4), 3, 16)
    assert hash(config) == hash(EngineConfig(methods=("full",), full_attention_layers=(0, 4), seed=3, page_size=16))


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("max_model_len", 0, "whole number of at least 1, got 0"),
        ("max_num_seqs", 2.0, "whole number of at least 1, got 2.0"),
        ("max_num_batched_tokens", True, "whole number of at least 1, got True"),
        ("max_mixed_tokens", 0, "whole number of at least 1, got 0"),
        ("max_prefill_seqs", -1, "whole number of at least 1, got -1"),
        ("num_pages", "7", "whole number of at least 1, got '7'"),
        ("page_size", None, "whole number of at least 1, got None"),
        ("page_size", 24, "power of two.*got 24"),
        ("page_size", 0, "whole number of at least 1"),
        ("gpu_memory_utilization", 0, r"number in \(0, 1\], got 0"),
        ("gpu_memory_utilization", 1.5, r"in \(0, 1\], got 1.5"),
        ("gpu_memory_utilization", "90%", r"in \(0, 1\], got '90%'"),
        ("dtype", "float64", "'auto', 'float32', 'bfloat16', 'float16'; got 'float64'"),
        ("table_granularity", "per_token", "'shared', 'per_layer', 'per_head'"),
        ("implementation", "cuda", "'triton', 'xla'"),
        ("warmup", "all", "False, True or 'greedy'"),
        ("tensor_parallel_size", 2, "not available yet, got 2"),
        ("methods", ["ful"], "must be one of .*'full', .*; got 'ful'"),
        ("default_compression", "full", "CompressionParams, got 'full'"),
        ("seed", -1, "whole number.*got -1"),
        ("seed", True, "whole number.*got True"),
        ("page_size", True, "whole number"),
        ("gpu_memory_utilization", True, r"in \(0, 1\], got True"),
        ("skip_tokenizer_init", "yes", "True or False, got 'yes'"),
        ("enable_prefix_caching", 2, "True or False, got 2"),
        ("methods", 5, "a list of at least one name, got 5"),
        ("full_attention_layers", 5, "layer numbers, .*got 5"),
        ("full_attention_layers", [0, -1], "layer numbers"),
        ("full_attention_layers", [1], "layer 0 among them"),
        ("dense_cache_fraction", 1, "less than 1"),
        ("dense_cache_fraction", -0.1, "number in"),
        ("max_num_seq", 3, "Did you mean 'max_num_seqs'"),
    ],
)
def test_bad_arguments_are_named(argument, value, words):
    error = UnknownArgumentError if argument == "max_num_seq" else InvalidArgumentError
    with pytest.raises(error, match=f"{argument}.*{words}"):
        EngineConfig.from_kwargs(**{argument: value})
