"""Options of a compressor: what is refused, and what a published config means."""

import pytest

from sparsejax.compressor import CompressorConfig, CompressorConfigError, CompressorMismatchError
from sparsejax.models import ModelConfig

SIZES = {"num_layers": 2, "kv_dim": 64}


def config(**options):
    return CompressorConfig(**{**SIZES, "kv_compressed_size": 16, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_compressed_size": 0}, "kv_compressed_size must be a whole number of at least 1, got 0"),
        ({"kv_compressed_size": 16.0}, "kv_compressed_size must be a whole number"),
        ({"neighbors": True}, "neighbors must be a whole number"),
        ({"sink_tokens": -1}, "sink_tokens must be a whole number of at least 0"),
        ({"kv_dim": 63}, "kv_dim must be even"),
        ({"down_type": "conv"}, "down_type must be one of linear, mlp_gelu, mlp_swiglu; got 'conv'"),
        ({"up_type": "auto"}, "up_type must be one of"),
        ({"references": "last"}, "references must be one of cluster, e2e"),
        ({"cluster_metric": "l1"}, "cluster_metric must be one of l2, dot, cosine"),
        ({"ref_mode": "last"}, "ref_mode must be one of avg, first"),
        ({"cluster_ratio": 0.0}, "cluster_ratio must be above 0"),
        ({"cluster_ratio": 1.5}, "cluster_ratio must be above 0 and at most 1, got 1.5"),
        ({"cluster_temp": 0.0}, "cluster_temp must be positive"),
        ({"split_kv": True}, 'split_kv needs references="e2e"'),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(CompressorConfigError) as error:
        config(**options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("ratio", "step"), [(1.0, 1), (0.5, 2), (0.3, 3), (0.25, 4), (0.1, 10), (0.05, 20), (1 / 49, 49)]
)
def test_step_is_the_whole_part_of_the_inverse_ratio(ratio, step):
    assert config(cluster_ratio=ratio).step == step


def test_equal_compressors_have_equal_configurations():
    assert config(down_type="mlp_gelu") == config(down_type="mlp_gelu", down_intermediate_size=(64 + 16) // 2)
    assert config(down_intermediate_size=99) == config()


@pytest.mark.parametrize(
    "made",
    [
        config(),
        config(down_type="mlp_swiglu", down_intermediate_size=48, up_type="mlp_gelu", bias=True, neighbors=3),
        config(cluster_metric="cosine", cluster_on_kv=False, cluster_soft_assignment=True, cluster_temp=2.5),
        config(references="e2e", chunk_size=4, ref_mode="first", split_kv=True, sink_tokens=3),
    ],
)
def test_from_hf_inverts_to_hf(made):
    assert CompressorConfig.from_hf(made.to_hf(), **SIZES) == made


def test_published_configs_mean_what_they_meant():
    # A key that is left out has the value that the class of the first release gave it; K stood in seq_chunk_size.
    found = CompressorConfig.from_hf({"kv_compressed_size": 256, "seq_chunk_size": 4, "ref_mode": "last"}, **SIZES)
    assert (found.down_type, found.down_intermediate_size, found.bias) == ("mlp_gelu", 2048, True)
    assert (found.references, found.neighbors, found.step) == ("cluster", 4, 10)
    recipe = {
        "kv_compressed_size": 256,
        "seq_chunk_size": 1,
        "deltakv_k_neighbors": 4,
        "use_nonlinear_compressor": True,
        "compressor_down_type": "swiglu",
        "compressor_down_intermediate_size": 3072,
        "compressor_up_type": "linear",
        "compressor_intermediate_size": 2048,
        "compressor_linear_bias": False,
    }
    found = CompressorConfig.from_hf(recipe, **SIZES)
    assert (found.down_type, found.down_intermediate_size, found.up_type) == ("mlp_swiglu", 3072, "linear")
    assert (found.neighbors, found.bias) == (4, False)
    renamed = {"deltakv_latent_dim": 32, "deltakv_neighbor_count": 8, "deltakv_center_ratio": 0.2}
    found = CompressorConfig.from_hf({**renamed, "use_nonlinear_compressor": False}, **SIZES)
    assert (found.kv_compressed_size, found.neighbors, found.cluster_ratio) == (32, 8, 0.2)
    assert (found.down_type, found.up_type) == ("linear", "linear")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"recon_mode": "delta_in_origin"}, "recon_mode must be 'delta_in_latent'"),
        ({"layer_chunk_size": 2}, "layer_chunk_size must be 1, got 2"),
        ({"collect_kv_before_rope": False}, "collect_kv_before_rope must be True"),
        ({"stride_alpha": 0.5}, "stride_alpha must be 0.0"),
        ({"kv_compressed_size": 64, "deltakv_latent_dim": 32}, "contradicts itself"),
        ({"compressor_down_type": "conv"}, "compressor_down_type must be one of auto"),
    ],
)
def test_what_no_implementation_has_is_refused(fields, words):
    with pytest.raises(CompressorConfigError) as error:
        CompressorConfig.from_hf(fields, **SIZES)
    assert words in str(error.value)


def test_a_compressor_for_another_model_is_refused_with_both_named():
    model = ModelConfig(
        architecture="qwen2",
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
    )
    with pytest.raises(CompressorMismatchError) as error:
        config().require_model(model, where="The compressor in x")
    message = str(error.value)
    assert "The compressor in x is for 2 layers with 64 key and value numbers" in message
    assert "qwen2, 1 KV heads of 32" in message
    assert "3 layers with 64" in message
    CompressorConfig(num_layers=3, kv_dim=64, kv_compressed_size=1).require_model(model)
