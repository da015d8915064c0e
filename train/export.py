"""Writes the embedded model in Hugging Face layout: weights, configuration, tokenizer and model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from sparsejax.models import ModelConfig
from train.tokenizer import BEGIN_ID, END_ID, PAD_ID, save_tokenizer


def to_hf_tensors(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Names and arrays of a transformers Llama (weights [out, in], float32) from a decoder's parameters."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim

    def array(value: Any) -> np.ndarray:
        return np.asarray(value, np.float32)

    tensors = {"model.embed_tokens.weight": array(params["embed"]), "model.norm.weight": array(params["final_norm"])}
    for index in range(config.num_layers):
        layer, name = params[f"layers_{index}"], f"model.layers.{index}"
        q, k, v = np.split(array(layer["qkv"]["kernel"]), [queries, queries + keys], axis=1)
        gate, up = np.split(array(layer["gate_up"]["kernel"]), 2, axis=1)
        matrices = {
            "self_attn.q_proj": q,
            "self_attn.k_proj": k,
            "self_attn.v_proj": v,
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
        }
        matrices |= {"self_attn.o_proj": array(layer["o"]["kernel"]), "mlp.down_proj": array(layer["down"]["kernel"])}
        tensors |= {f"{name}.{part}.weight": np.ascontiguousarray(matrix.T) for part, matrix in matrices.items()}
        tensors[f"{name}.input_layernorm.weight"] = array(layer["attn_norm"])
        tensors[f"{name}.post_attention_layernorm.weight"] = array(layer["mlp_norm"])
    return tensors


def from_hf_tensors(config: ModelConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `to_hf_tensors`: float32 parameters to continue training from."""

    def matrix(name: str) -> np.ndarray:
        return np.asarray(tensors[f"{name}.weight"], np.float32).T

    def vector(name: str) -> np.ndarray:
        return np.asarray(tensors[f"{name}.weight"], np.float32)

    params: dict[str, Any] = {"embed": vector("model.embed_tokens"), "final_norm": vector("model.norm")}
    for index in range(config.num_layers):
        name = f"model.layers.{index}"
        params[f"layers_{index}"] = {
            "attn_norm": vector(f"{name}.input_layernorm"),
            "mlp_norm": vector(f"{name}.post_attention_layernorm"),
            "qkv": {"kernel": np.concatenate([matrix(f"{name}.self_attn.{part}_proj") for part in "qkv"], axis=1)},
            "o": {"kernel": matrix(f"{name}.self_attn.o_proj")},
            "gate_up": {
                "kernel": np.concatenate([matrix(f"{name}.mlp.{part}_proj") for part in ("gate", "up")], axis=1)
            },
            "down": {"kernel": matrix(f"{name}.mlp.down_proj")},
        }
    return params


def load_params(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Float32 parameters from a folder written by `save_model`."""
    return from_hf_tensors(config, load_file(folder / "model.safetensors"))


def save_model(
    out: Path, config: ModelConfig, params: Mapping[str, Any], tokenizer: Tokenizer, *, card: str | None = None
) -> None:
    """Writes the model to `out` as transformers reads it: bf16 safetensors, configurations, tokenizer and card."""
    save_tokenizer(tokenizer, out, max_length=config.max_position_embeddings)
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in to_hf_tensors(config, params).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
    written = {**config.to_hf(), "pad_token_id": PAD_ID, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    generation = {"bos_token_id": BEGIN_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID, "do_sample": False}
    for name, content in {"config.json": written, "generation_config.json": generation}.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    if card is not None:
        (out / "README.md").write_text(card)
