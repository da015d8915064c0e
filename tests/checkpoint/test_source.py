"""Finding checkpoints: folders, Hugging Face ids in the cache, and clear errors for the rest."""

import io
import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_folders import LLAMA, assert_same_bits, random_tensors, write_folder
from safetensors.numpy import save_file

from sparsejax.checkpoint import (
    CheckpointError,
    CheckpointNotFoundError,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    stored_dtype,
)
from sparsejax.models import Decoder, UnsupportedModelError, abstract_params, dense_causal_attend


@pytest.fixture
def hf(tmp_path):
    return write_folder(tmp_path / "hf", LLAMA, random_tensors(LLAMA))


def test_loaded_parameters_are_the_tree_the_decoder_wants(hf):
    config, params = load_model(hf, dtype=jnp.float32)
    expected = abstract_params(config, jnp.float32)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), expected
    )
    tokens = jnp.arange(4)
    logits, _ = Decoder(config, jnp.float32).apply({"params": params}, tokens, tokens, None, dense_causal_attend(1))
    assert np.isfinite(logits).all()


def test_one_file_and_shards_load_alike(tmp_path, hf):
    sharded = write_folder(tmp_path / "sharded", LLAMA, random_tensors(LLAMA), sharded=True)
    jax.tree.map(assert_same_bits, load_model(hf)[1], load_model(sharded)[1])


def test_kernels_are_the_transposed_weights_side_by_side(hf):
    tensors = random_tensors(LLAMA)
    _, params = load_model(hf)
    prefix = "model.layers.1."
    names = {
        "qkv": [f"self_attn.{x}_proj" for x in "qkv"],
        "o": ["self_attn.o_proj"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "down": ["mlp.down_proj"],
    }
    for key, modules in names.items():
        expected = np.concatenate([tensors[f"{prefix}{module}.weight"].T for module in modules], axis=1)
        assert_same_bits(params["layers_1"][key]["kernel"], expected)
    assert_same_bits(params["lm_head"], tensors["lm_head.weight"].T)


def test_end_of_text_ids_of_both_configs_count(hf):
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2, 6]}))
    assert load_config(resolve(hf)).eos_token_ids == (2, 5, 6)


@pytest.mark.parametrize("ids", [[[2]], {"a": 1}, "2", [None]])
def test_end_of_text_ids_that_are_none_are_named_with_their_file(hf, ids):
    (hf / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json: eos_token_id must be a token id"):
        load_config(resolve(hf))


def test_one_file_of_weights_comes_before_an_index_as_in_transformers(tmp_path):
    hf = write_folder(tmp_path / "hf", LLAMA, random_tensors(LLAMA, seed=1), sharded=True)
    tensors = random_tensors(LLAMA, seed=2)
    save_file(tensors, hf / "model.safetensors")
    assert_same_bits(load_model(hf)[1]["embed"], tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("declared", [{"dtype": "float16"}, {"dtype": None, "torch_dtype": "float16"}, {"dtype": None}])
def test_stored_dtype_is_the_declared_one_or_that_of_the_weights(tmp_path, declared):
    hf = write_folder(tmp_path / "hf", {**LLAMA, **declared}, random_tensors(LLAMA, np.float16))
    assert stored_dtype(resolve(hf)) == np.float16


@pytest.mark.parametrize("source", ["./absent", "/absent/folder", "~/absent folder", "a/b/c"])
def test_absent_folders_are_named(source):
    with pytest.raises(CheckpointNotFoundError, match=r"absent|a/b/c"):
        resolve(source)


def test_a_file_is_no_checkpoint(hf):
    with pytest.raises(CheckpointNotFoundError, match="is a file"):
        resolve(hf / "config.json")


def test_what_a_folder_lacks_is_named(tmp_path, hf):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve(tmp_path)
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no weights.*PyTorch"):
        load_model(hf)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lacks 1 .*model-1\.safetensors"):
        load_model(hf)


def test_broken_files_are_named(hf):
    weights = hf / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(hf)
    (hf / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(hf)


def test_other_architectures_are_refused_with_what_is_supported(tmp_path):
    hf = write_folder(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    (hf / "config.json").write_text(json.dumps({**LLAMA, "model_type": "gpt2"}))
    with pytest.raises(UnsupportedModelError, match=r"gpt2.*llama.*qwen2.*qwen3"):
        load_model(hf)


def test_tokenizer_of_a_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[UNK]": 0, "hello": 1, "world": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert load_tokenizer(tmp_path)("hello world").input_ids == [1, 2]


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer.json": {"version": "1.0", "model": {"type": "Nope"}}}, "cannot be loaded"),
        ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, "no tokens"),
        ({"tokenizer_config.json": {"tokenizer_class": ["a"]}}, "cannot be loaded"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path, files, named):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=named) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_code_of_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))  # what transformers would ask for
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        load_tokenizer(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("dtype", ["int8", "float64", "bfloat", bool, 5])
def test_a_dtype_that_parameters_cannot_have_is_refused(hf, dtype):
    with pytest.raises(CheckpointError, match="float32, bfloat16, float16"):
        load_model(hf, dtype=dtype)


def test_hub_ids_come_from_the_local_cache_when_offline(tmp_path, hf):
    """huggingface_hub reads its environment when imported, so this runs in a process of its own."""
    repository = tmp_path / "cache" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    hf.rename(repository / "snapshots" / "abc")
    script = f"""
        import os
        os.environ |= {{"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": {str(tmp_path / "cache")!r}}}
        from sparsejax.checkpoint import CheckpointNotFoundError, load_config, load_tokenizer, resolve
        checkpoint = resolve("some/model")
        assert checkpoint.kind == "huggingface"
        assert load_config(checkpoint).num_layers == 2
        for find in (resolve, load_tokenizer):
            try:
                find("some/other")
            except CheckpointNotFoundError as error:
                assert "some/other" in str(error) and "HF_HUB_OFFLINE" in str(error)
            else:
                raise AssertionError("found a model that is not there")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
