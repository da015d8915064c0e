"""Small Hugging Face checkpoints on disk, made without torch."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from sparsejax.checkpoint.mapping import expected_tensors
from sparsejax.models import ModelConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}
CONFIGS = {
    "llama": LLAMA,
    "llama_biases": {**LLAMA, "attention_bias": True, "mlp_bias": True},
    "qwen2_tied": {
        **LLAMA,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
    },
    "qwen3": {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
}
SHARDS = 3


def random_tensors(config: dict[str, Any], dtype: Any = ml_dtypes.bfloat16, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor that a checkpoint of this config must hold."""
    generator = np.random.default_rng(seed)
    shapes = expected_tensors(ModelConfig.from_hf(config))
    return {name: generator.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray], *, sharded: bool = False
) -> Path:
    """A Hugging Face folder: config, a stand-in for a tokenizer, and weights in one file or three with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text('{"kind": "stand-in"}')
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {}
    for index in range(SHARDS):
        name = f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = dict(list(tensors.items())[index::SHARDS])  # interleaved: a layer's tensors lie in several shards
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a folder, whatever its files are called."""
    from safetensors.numpy import load_file

    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(left: Any, right: Any) -> None:
    """Equal type, shape and bits, so that NaN and -0 count too."""
    left, right = np.asarray(left), np.asarray(right)
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert left.tobytes() == right.tobytes()
