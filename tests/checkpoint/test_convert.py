"""Conversion: bit-exact both ways, all or nothing, and a group at a time."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from checkpoint_folders import CONFIGS, LLAMA, assert_same_bits, random_tensors, read_tensors, write_folder

from sparsejax.checkpoint import (
    CheckpointError,
    OutputExistsError,
    TensorMismatchError,
    convert_from_hf,
    convert_to_hf,
    load_model,
    resolve,
)
from sparsejax.checkpoint import convert as convert_module
from sparsejax.checkpoint.orbax_store import FORMAT_VERSION


@pytest.fixture
def hf(tmp_path):
    return write_folder(tmp_path / "hf", LLAMA, random_tensors(LLAMA))


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact(tmp_path, name):
    tensors = random_tensors(CONFIGS[name])
    tensors["model.norm.weight"][:3] = [np.nan, -0.0, np.inf]
    hf = write_folder(tmp_path / "hf", CONFIGS[name], tensors, sharded=True)
    orbax = convert_from_hf(hf, tmp_path / "orbax", progress=False)
    back = convert_to_hf(orbax, tmp_path / "back", progress=False)
    returned = read_tensors(back)
    assert returned.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert_same_bits(returned[key], tensor)
    for file in ("config.json", "tokenizer_config.json"):
        assert (back / file).read_bytes() == (hf / file).read_bytes()


def test_every_tensor_keeps_its_own_dtype(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float16)
    hf = write_folder(tmp_path / "hf", LLAMA, tensors)
    back = convert_to_hf(convert_from_hf(hf, tmp_path / "orbax", progress=False), tmp_path / "back", progress=False)
    for key, tensor in read_tensors(back).items():
        assert_same_bits(tensor, tensors[key])


def test_both_forms_load_to_the_same_parameters(tmp_path, hf):
    orbax = convert_from_hf(hf, tmp_path / "orbax", progress=False)
    assert (resolve(hf).kind, resolve(orbax).kind) == ("huggingface", "orbax")
    for dtype in (None, np.float32):
        (config, params), (other_config, other_params) = (load_model(folder, dtype=dtype) for folder in (hf, orbax))
        assert config == other_config
        jax.tree.map(assert_same_bits, params, other_params)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(dtype or ml_dtypes.bfloat16)}
        assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(other_params))


def test_casting_is_recorded_in_the_config(tmp_path):
    config = {**LLAMA, "dtype": "float32"}
    tensors = random_tensors(config, np.float32)
    hf = write_folder(tmp_path / "hf", config, tensors)
    orbax = convert_from_hf(hf, tmp_path / "orbax", dtype="bfloat16", progress=False)
    assert json.loads((orbax / "config.json").read_text())["dtype"] == "bfloat16"
    _, params = load_model(orbax)
    assert_same_bits(params["embed"], tensors["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16))
    wide = convert_to_hf(orbax, tmp_path / "wide", dtype="float32", progress=False)
    assert {tensor.dtype for tensor in read_tensors(wide).values()} == {np.dtype(np.float32)}
    with pytest.raises(CheckpointError, match="int8"):
        convert_from_hf(hf, tmp_path / "other", dtype="int8")


def test_large_outputs_are_sharded_with_an_index_that_transformers_reads(tmp_path, hf):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    orbax = convert_from_hf(hf, tmp_path / "orbax", progress=False)
    back = convert_to_hf(orbax, tmp_path / "back", max_shard_bytes=3000, progress=False)
    assert len(list(back.glob("model-*-of-*.safetensors"))) > 1
    assert not (back / "model.safetensors").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.bfloat16)
    expected = random_tensors(LLAMA)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.float().numpy(), expected[name].astype(np.float32))
    _, params = load_model(back)
    jax.tree.map(assert_same_bits, params, load_model(hf)[1])


def test_harmless_extras_are_left_aside(tmp_path):
    config = CONFIGS["qwen2_tied"]
    tensors = random_tensors(config)
    extras = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    extras["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    hf = write_folder(tmp_path / "hf", config, {**tensors, **extras})
    back = convert_to_hf(convert_from_hf(hf, tmp_path / "orbax", progress=False), tmp_path / "back", progress=False)
    assert read_tensors(back).keys() == tensors.keys()


@pytest.mark.parametrize("load", [load_model, lambda folder: convert_from_hf(folder, folder.parent / "out")])
@pytest.mark.parametrize("change", [lambda head: head + 1, lambda head: head[:-1]], ids=["values", "shape"])
def test_a_head_of_its_own_is_not_dropped_from_a_tied_model(tmp_path, load, change):
    tensors = random_tensors(CONFIGS["qwen2_tied"])
    head = change(tensors["model.embed_tokens.weight"])
    hf = write_folder(tmp_path / "hf", CONFIGS["qwen2_tied"], {**tensors, "lm_head.weight": head}, sharded=True)
    with pytest.raises(CheckpointError, match=r'lm_head.weight differs .* "tie_word_embeddings": false'):
        load(hf)


@pytest.mark.parametrize("load", [load_model, lambda folder: convert_from_hf(folder, folder.parent / "out")])
def test_all_wrong_tensors_are_named_in_one_error(tmp_path, load):
    tensors = random_tensors(LLAMA)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((3, 16), np.float32)
    tensors["model.layers.1.input_layernorm.weight"] = np.zeros(16, np.int8)
    tensors["model.layers.2.input_layernorm.weight"] = np.zeros(16, np.float32)
    hf = write_folder(tmp_path / "hf", LLAMA, tensors, sharded=True)
    with pytest.raises(TensorMismatchError) as error:
        load(hf)
    assert sorted(error.value.missing) == ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    assert error.value.unexpected == ("model.layers.2.input_layernorm.weight",)
    assert len(error.value.misshaped) == 2
    text = str(error.value)
    for part in ("k_proj.weight: shape [3, 16], expected [16, 16]", "dtype I8", "2 missing", "1 unexpected"):
        assert part in text
    assert not (tmp_path / "out").exists()


def test_an_orbax_folder_that_does_not_fit_its_config_is_refused(tmp_path, hf):
    orbax = convert_from_hf(hf, tmp_path / "orbax", progress=False)
    (orbax / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 3, "vocab_size": 41}))
    with pytest.raises(TensorMismatchError) as error:
        load_model(orbax)
    assert "layers_2/qkv/kernel" in error.value.missing
    assert {line.split(":")[0] for line in error.value.misshaped} == {"embed", "lm_head"}


def test_existing_output_is_refused_unless_empty(tmp_path, hf):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("keep")
    with pytest.raises(OutputExistsError, match="full"):
        convert_from_hf(hf, full, progress=False)
    assert [path.name for path in full.iterdir()] == ["precious"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert resolve(convert_from_hf(hf, empty, progress=False)).kind == "orbax"
    with pytest.raises(CheckpointError, match="already"):
        convert_from_hf(empty, tmp_path / "again")
    with pytest.raises(CheckpointError, match="already"):
        convert_to_hf(hf, tmp_path / "again")


def test_a_failed_conversion_leaves_nothing(tmp_path, hf, monkeypatch):
    def full_disk(*args):
        raise OSError("no space left")

    monkeypatch.setattr(convert_module, "write_manifest", full_disk)
    with pytest.raises(OSError, match="no space"):
        convert_from_hf(hf, tmp_path / "out", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_killed_conversion_never_looks_finished_and_can_be_repeated(tmp_path, hf):
    out = tmp_path / "out"
    script = f"""
        import os, signal
        from sparsejax.checkpoint import convert, convert_from_hf
        save_group = convert.save_group
        def save_then_die(folder, group, arrays):
            save_group(folder, group, arrays)
            if group.name == "layers_0":
                os.kill(os.getpid(), signal.SIGKILL)
        convert.save_group = save_then_die
        convert_from_hf({str(hf)!r}, {str(out)!r}, progress=False)
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=_cpu_environment(), check=False)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    (partial,) = [path for path in tmp_path.iterdir() if path != hf]
    with pytest.raises(CheckpointError):
        resolve(partial)
    convert_from_hf(hf, out, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]
    load_model(out)


def test_peak_memory_follows_the_largest_group_and_torch_is_not_imported(tmp_path):
    config = {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 2000}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64}
    tensors = random_tensors({**config, "num_hidden_layers": 1})
    for layer in range(1, 12):
        first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
        tensors |= {name.replace(".0.", f".{layer}."): tensor for name, tensor in first.items()}
    hf = write_folder(tmp_path / "hf", config, tensors, sharded=True)
    model_bytes = sum(tensor.nbytes for tensor in tensors.values())
    group_bytes = sum(tensor.nbytes for name, tensor in tensors.items() if ".layers.0." in name)
    assert model_bytes > 10 * group_bytes
    script = f"""
        import re, sys
        from pathlib import Path
        import jax
        from sparsejax.checkpoint import convert_from_hf
        def memory(key):
            return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        before = memory("VmRSS")
        convert_from_hf({str(hf)!r}, {str(tmp_path / "out")!r}, progress=False)
        assert "torch" not in sys.modules
        print(memory("VmHWM") - before)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=_cpu_environment(), check=True, capture_output=True
    )
    growth = int(process.stdout.split()[-1])
    print(f"model {model_bytes >> 20} MiB, largest group {group_bytes >> 20} MiB, growth {growth >> 20} MiB")
    # A constant for the blocks, Orbax and its threads comes on top.
    assert growth < group_bytes + (160 << 20)


def test_progress_is_shown_in_bytes(tmp_path, hf, capsys):
    out = convert_from_hf(hf, tmp_path / "out")
    assert "100%" in capsys.readouterr().err
    load_model(out, progress=True)
    assert "100%" in capsys.readouterr().err


def _cpu_environment():
    root = Path(__file__).parents[2]
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # reads that nobody waits for any more
@pytest.mark.parametrize("damage", ["no chunks", "cut chunks", "no parameters"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    folder = convert_from_hf(
        write_folder(tmp_path / "hf", LLAMA, random_tensors(LLAMA)), tmp_path / "o", progress=False
    )
    chunks = [
        path for path in (folder / "params" / "layers_1").rglob("*") if path.is_file() and "/c/" in path.as_posix()
    ]
    assert chunks
    if damage == "no parameters":
        (manifest,) = (path for path in folder.glob("*.json") if "sparsejax-orbax" in path.read_text())
        manifest.write_text(json.dumps({"format": "sparsejax-orbax", "version": FORMAT_VERSION}))
    for chunk in chunks:
        if damage == "no chunks":
            chunk.unlink()
        elif damage == "cut chunks":
            chunk.write_bytes(chunk.read_bytes()[:5])
    with pytest.raises(CheckpointError, match=r"layers_1 is absent or damaged|does not list the parameters"):
        load_model(folder)


def test_an_index_that_is_none_is_named(tmp_path):
    hf = write_folder(tmp_path / "hf", LLAMA, random_tensors(LLAMA), sharded=True)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": 3}}))
    with pytest.raises(CheckpointError, match="no weight_map from tensors to files"):
        load_model(hf)
