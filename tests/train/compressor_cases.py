"""A toy model, its compressor and packed data, for the tests of compressor training."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.checkpoint.mapping import parameter_groups, split
from sparsejax.checkpoint.safetensors_files import SafetensorsWriter
from sparsejax.models import ModelConfig, init_params
from train.compressor.placement import Placement

LENGTH = 24
MODEL = ModelConfig(
    architecture="qwen3",
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm=True,
)
COMPRESSOR = {"kv_compressed_size": 6, "sink_tokens": 3, "cluster_ratio": 0.25, "neighbors": 2}


def model_params():
    """Weights large enough that attention tells tokens apart."""
    params = init_params(MODEL, jax.random.key(0), jnp.float32)
    return jax.tree.map(lambda leaf: leaf * (8 if leaf.ndim > 1 else 1), params)


def tokens(rows: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, MODEL.vocab_size, (rows, length), np.int32)


def one_device() -> Placement:
    return Placement.make("data=1")


def write_model(folder):
    """The toy model as a Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**MODEL.to_hf(), "dtype": "float32"}))
    writer = SafetensorsWriter(folder, 1 << 30)
    params = jax.device_get(model_params())
    for group in parameter_groups(MODEL):
        for parameter in group.parameters:
            leaf = params
            for key in parameter.path:
                leaf = leaf[key]
            writer.add(split(parameter, np.asarray(leaf)))
    writer.close()
    return folder


def write_packed(folder, rows: int = 40, length: int = LENGTH, *, alike: bool = False):
    """Packed rows of random tokens, or the same row again and again; three documents in every two rows."""
    folder.mkdir(parents=True)
    content = np.repeat(tokens(1, length, seed=1), rows, axis=0) if alike else tokens(rows, length, seed=1)
    content.astype("<u2").tofile(folder / "tokens.bin")
    np.arange(0, rows * length, 2 * length // 3).astype("<i8").tofile(folder / "starts.bin")
    manifest = {"version": 1, "rows": rows, "length": length, "dtype": "<u2", "vocab_size": MODEL.vocab_size}
    (folder / "packed.json").write_text(json.dumps(manifest))
    return folder
