"""Compressor checkpoints in both layouts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparsejax.checkpoint import (
    CheckpointError,
    OutputExistsError,
    TensorMismatchError,
    load_compressor,
    read_compressor_config,
    save_compressor,
)
from sparsejax.compressor import CompressorConfig, CompressorMismatchError, init_params
from sparsejax.errors import SparsejaxError
from sparsejax.models import ModelConfig

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
)


def made(**options):
    config = CompressorConfig(num_layers=2, kv_dim=12, kv_compressed_size=4, **options)
    return config, jax.tree.map(lambda leaf: leaf + 1, init_params(config, jax.random.key(0)))


SORTS = {
    "linear": {},
    "biased": {"bias": True, "down_type": "mlp_gelu", "up_type": "mlp_gelu", "up_intermediate_size": 7},
    "recipe": {"down_type": "mlp_swiglu", "down_intermediate_size": 5, "neighbors": 3, "cluster_ratio": 0.25},
    "split": {"split_kv": True, "references": "e2e", "chunk_size": 4, "bias": True},
}


@pytest.mark.parametrize("layout", ["huggingface", "orbax"])
@pytest.mark.parametrize("sort", SORTS)
def test_what_is_saved_loads(tmp_path, sort, layout):
    config, params = made(**SORTS[sort])
    folder = save_compressor(tmp_path / "c", config, params, model=MODEL, layout=layout)
    assert read_compressor_config(folder) == config
    found, loaded = load_compressor(folder, model=MODEL)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(OutputExistsError):
        save_compressor(folder, config, params, model=MODEL)


def test_published_names_and_orientation(tmp_path):
    config, params = made(**SORTS["recipe"])
    tensors = load_file(save_compressor(tmp_path / "c", config, params, model=MODEL) / "model.safetensors")
    name = "model.layers.1.self_attn.compress_"
    assert {key: value.shape for key, value in tensors.items() if key.startswith(name)} == {
        f"{name}down.w12.weight": (10, 12),
        f"{name}down.w3.weight": (4, 5),
        f"{name}up.weight": (12, 4),
    }
    np.testing.assert_array_equal(tensors[f"{name}down.w12.weight"].T, params["layers_1"]["down"]["gate_up"]["kernel"])
    raw = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (raw["kv_compressed_size"], raw["deltakv_k_neighbors"], raw["hidden_size"]) == (4, 3, 16)
    config, params = made(**SORTS["biased"])
    tensors = load_file(save_compressor(tmp_path / "b", config, params, model=MODEL) / "model.safetensors")
    name = "model.layers.0.self_attn.compress_down."
    names = {key.removeprefix(name) for key in tensors if key.startswith(name)}
    assert names == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_tensors_say_what_an_old_config_leaves_out(tmp_path):
    config, params = made(**SORTS["recipe"])
    folder = save_compressor(tmp_path / "c", config, params, model=MODEL, dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps({"seq_chunk_size": 3, "cluster_ratio": 0.25, "num_sink_tokens": 16}))
    found, loaded = load_compressor(folder, dtype=jnp.bfloat16)
    assert found == config
    assert loaded["layers_0"]["up"]["out"]["kernel"].dtype == jnp.bfloat16


def test_names_may_have_a_wrapper_in_front(tmp_path):
    config, params = made()
    folder = save_compressor(tmp_path / "c", config, params, model=MODEL)
    tensors = load_file(folder / "model.safetensors")
    save_file({f"base.{name}": value for name, value in tensors.items()}, folder / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, load_compressor(folder)[1], params)


def test_another_model_is_refused_before_anything_is_read(tmp_path):
    config, params = made()
    folder = save_compressor(tmp_path / "c", config, params, model=MODEL)
    other = ModelConfig.from_hf({**MODEL.to_hf(), "num_hidden_layers": 5})
    with pytest.raises(CompressorMismatchError, match=r"is for 2 layers.*has 5 layers"):
        load_compressor(folder, model=other)
    with pytest.raises(CompressorMismatchError):
        save_compressor(tmp_path / "d", config, params, model=other)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_compressed_size": 8}, "kv_compressed_size: 8 in config.json, 4 in the tensors"),
        ({"compressor_down_type": "linear"}, "compressor_down_type: linear in config.json, mlp_swiglu in the tensors"),
    ],
)
def test_a_config_that_its_tensors_deny_is_refused(tmp_path, change, words):
    config, params = made(**SORTS["recipe"])
    folder = save_compressor(tmp_path / "c", config, params, model=MODEL)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(TensorMismatchError) as error:
        read_compressor_config(folder)
    assert words in str(error.value)


def test_missing_and_misshaped_tensors_are_listed(tmp_path):
    config, params = made()
    folder = save_compressor(tmp_path / "c", config, params, model=MODEL)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.compress_up.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(TensorMismatchError, match=r"compress_up\.weight"):
        read_compressor_config(folder)
    tensors = load_file(save_compressor(tmp_path / "d", config, params, model=MODEL) / "model.safetensors")
    tensors["model.layers.1.self_attn.compress_up.weight"] = np.ones((12, 9), np.float32)
    save_file(tensors, tmp_path / "d" / "model.safetensors")
    with pytest.raises(TensorMismatchError, match=r"1.*up.weight: shape \[12, 9\], expected \[12, 4\]"):
        read_compressor_config(tmp_path / "d")


def test_a_folder_without_a_compressor_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"model.norm.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no compressor: none of its 1 tensors"):
        read_compressor_config(tmp_path)


def test_arrays_of_another_size_than_the_config_are_refused(tmp_path):
    config, params = made()
    folder = save_compressor(tmp_path / "c", config, params, model=MODEL, layout="orbax")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "kv_compressed_size": 7}))
    with pytest.raises(TensorMismatchError, match=r"expected \[.*7"):
        load_compressor(folder)


@pytest.mark.parametrize("change", [{"cluster_ratio": "abc"}, {"compressor_up_type": ["linear"]}])
def test_a_damaged_config_is_named(tmp_path, change):
    config, params = made()
    folder = save_compressor(tmp_path / "c", config, params, model=MODEL)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(SparsejaxError, match=str(tmp_path / "c")):
        read_compressor_config(folder)
