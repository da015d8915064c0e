"""Parsing Hugging Face configs: what they say is taken over, what is not supported is refused by name."""

import pytest
import transformers

from sparsejax.errors import SparsejaxError
from sparsejax.models import ModelConfig, RopeConfig, UnsupportedModelError

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "eos_token_id": [7, 9],
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 32}
LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}


def test_llama_sizes_are_taken_over():
    config = ModelConfig.from_hf(LLAMA)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (3, 4, 2, 16)
    assert config.group_size == 2
    assert config.rope == RopeConfig(theta=500000.0)
    assert config.eos_token_ids == (7, 9)
    assert not (config.qkv_bias)
    assert not (config.o_bias)
    assert not (config.mlp_bias)
    assert not (config.qk_norm)
    assert not (config.tie_embeddings)
    assert hash(config) == hash(ModelConfig.from_hf(LLAMA))


def test_biases_and_norms_follow_the_architecture():
    llama = ModelConfig.from_hf({**LLAMA, "attention_bias": True, "mlp_bias": True})
    assert llama.qkv_bias
    assert llama.o_bias
    assert llama.mlp_bias
    assert not llama.qk_norm
    qwen2 = ModelConfig.from_hf(QWEN2)
    assert qwen2.qkv_bias
    assert not (qwen2.o_bias)
    assert not (qwen2.mlp_bias)
    assert not (qwen2.qk_norm)
    qwen3 = ModelConfig.from_hf(QWEN3)
    assert qwen3.qk_norm
    assert not (qwen3.qkv_bias)
    assert not (qwen3.o_bias)
    assert ModelConfig.from_hf({**QWEN3, "attention_bias": True}).o_bias


def test_absent_keys_mean_what_transformers_assumes():
    keys = ("rms_norm_eps", "rope_theta", "eos_token_id", "max_position_embeddings")
    config = ModelConfig.from_hf({key: value for key, value in LLAMA.items() if key not in keys})
    reference = transformers.LlamaConfig()
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.rope.theta == reference.rope_parameters["rope_theta"]
    assert config.eos_token_ids == (reference.eos_token_id,)
    assert config.max_position_embeddings == reference.max_position_embeddings


def test_an_explicit_null_means_none():
    config = ModelConfig.from_hf({**LLAMA, "eos_token_id": None, "num_key_value_heads": None, "head_dim": None})
    assert config.eos_token_ids == ()
    assert config.num_kv_heads == config.num_heads
    assert config.head_dim == 16


def test_both_spellings_of_rope_scaling_read_alike():
    new = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3_ROPE}
    old = {**LLAMA, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}}
    oldest = {**LLAMA, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE}}
    expected = RopeConfig(kind="llama3", theta=500000.0, **LLAMA3_ROPE)
    assert [ModelConfig.from_hf(config).rope for config in (new, old, oldest)] == [expected] * 3


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths():
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 2048, "factor": None}
    rope = ModelConfig.from_hf({**LLAMA, "rope_scaling": scaling}).rope
    assert (rope.factor, rope.original_max_position_embeddings) == (4.0, 2048)


def test_a_beta_of_zero_is_none_as_in_transformers():
    scaling = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": 0.0}
    rope = ModelConfig.from_hf({**LLAMA, "rope_scaling": scaling}).rope
    assert (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}])
def test_no_scaling(scaling):
    assert ModelConfig.from_hf({**LLAMA, "rope_scaling": scaling}).rope.kind == "default"


@pytest.mark.parametrize(
    ("base", "changes", "named"),
    [
        (LLAMA, {"model_type": "mistral"}, ["mistral", "llama", "qwen2", "qwen3"]),
        (LLAMA, {"model_type": None}, ["model_type", "llama"]),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForCausalLM", "SequenceClassification"]),
        (LLAMA, {"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        (LLAMA, {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1]}},
            ["longrope", "yarn"],
        ),
        (LLAMA, {"rope_scaling": {"type": "su"}}, ["rope_type", "su"]),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, ["linear", "factor"]),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "high_freq_factor"]),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["layer type"]),
        (LLAMA, {"sliding_window": 4096}, ["sliding", "4096"]),
        (QWEN2, {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1}, ["sliding", "512"]),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": 0}, ["sliding", "4096"]),
        (QWEN3, {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, ["sliding_attention"]),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, ["quantized", "awq"]),
        (LLAMA, {"hidden_size": None}, ["hidden_size"]),
        (LLAMA, {"compression_config": {"quant_method": "compressed-tensors"}}, ["quantized", "compressed-tensors"]),
        (QWEN2, {"is_causal": False}, ["is_causal"]),
        (LLAMA, {"num_attention_heads": 3}, ["num_attention_heads", "num_key_value_heads"]),
        (LLAMA, {"num_key_value_heads": "2"}, ["num_key_value_heads", "'2'"]),
        (LLAMA, {"hidden_size": 66}, ["hidden_size", "num_attention_heads", "66"]),
        (LLAMA, {"layer_types": 5}, ["layer_types", "3 layers"]),
        (LLAMA, {"layer_types": ["full_attention"]}, ["layer_types", "3 layers"]),
        (LLAMA, {"layer_types": [None, ["x"], "full_attention"]}, ["None", "x"]),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": "a"}, ["max_window_layers", "'a'"]),
        (LLAMA, {"tie_word_embeddings": "false"}, ["tie_word_embeddings", "'false'"]),
        (LLAMA, {"attention_bias": "false"}, ["attention_bias"]),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}, ["truncate"]),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, ["factor must be positive"]),
        (LLAMA, {"head_dim": 15}, ["head_dim", "15"]),
        (LLAMA, {"vocab_size": "many"}, ["vocab_size", "many"]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(base, changes, named):
    with pytest.raises(UnsupportedModelError) as error:
        ModelConfig.from_hf({**base, **changes})
    assert isinstance(error.value, SparsejaxError)
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        (QWEN2, {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1}),  # as Qwen2.5 ships
        (QWEN2, {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 3}),  # no layer left for it
        (QWEN3, {"layer_types": ["full_attention"] * 3}),
        (LLAMA, {"sliding_window": None}),
        (QWEN2, {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        (LLAMA, {"hidden_act": "swish"}),
        (LLAMA, {"architectures": None}),
    ],
)
def test_options_that_change_nothing_are_accepted(base, changes):
    assert ModelConfig.from_hf({**base, **changes}).num_layers == 3


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "eos_token_id": None},
        {**LLAMA, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
        {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
        {**LLAMA, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        QWEN2,
        {**QWEN3, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ],
)
def test_to_hf_is_read_back_alike_by_us_and_by_transformers(config):
    ours = ModelConfig.from_hf(config)
    written = ours.to_hf()
    assert ModelConfig.from_hf(written) == ours
    theirs = transformers.AutoConfig.for_model(**written)
    assert ModelConfig.from_hf(theirs.to_dict()) == ours


def test_to_hf_refuses_what_the_architecture_cannot_be():
    config = ModelConfig.from_hf(QWEN2)
    with pytest.raises(UnsupportedModelError, match="qk_norm"):
        ModelConfig(**{**vars(config), "qk_norm": True}).to_hf()


@pytest.mark.parametrize(("name", "value"), [("num_attention_heads", 0), ("hidden_size", "256"), ("vocab_size", True)])
def test_a_size_that_is_no_size_is_named(name, value):
    sizes = {
        "num_attention_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 99,
    }
    with pytest.raises(UnsupportedModelError, match=f"{name} must be a positive whole number"):
        ModelConfig.from_hf({"model_type": "llama", **sizes, name: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
        ({"architectures": [1]}, "must name LlamaForCausalLM, got 1"),
        ({"quantization_config": "gptq"}, "quant_method 'gptq'"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a positive number, got 'tiny'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them, got 'x'"),
        ({"eos_token_id": [1, -1]}, "eos_token_id must be a token id"),
        ({"rope_scaling": "linear"}, "RoPE parameters must be a dictionary, got 'linear'"),
        ({"rope_scaling": [1]}, "RoPE parameters must be a dictionary"),
        ({"rope_theta": "big"}, "rope_theta must be a finite number, got 'big'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": [1, 2]}}, "factor must be a finite number"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, "factor must be a finite number"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}},
            "needs original_max_position_embeddings",
        ),
        ({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_theta must be above 1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1.0}}, "beta_fast must be positive"),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor must be positive and below high_freq_factor",
        ),
    ],
)
def test_a_malformed_config_is_named(changes, words):
    with pytest.raises(UnsupportedModelError, match=words):
        ModelConfig.from_hf({**LLAMA, **changes})
