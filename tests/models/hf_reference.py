"""Small random transformers models, one for each branch of the decoder, and their weights as our parameters."""

from typing import Any

import numpy as np
import torch
import transformers

from sparsejax.checkpoint.mapping import fuse, parameter_groups, tree_of
from sparsejax.models import ModelConfig

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    return {"rope_parameters": parameters, "num_hidden_layers": 1}  # angles are the same in every layer


_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
_LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# name -> (architecture, what differs from the sizes above)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_group_1": ("llama", {"num_key_value_heads": 4}),
    "llama_group_4_wide_heads": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama_group_7": ("llama", {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 16}),
    "llama_tied_3_layers": ("llama", {"tie_word_embeddings": True, "num_hidden_layers": 3}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3}),
    "llama_linear": ("llama", _rope("linear", factor=2.5)),
    "llama_dynamic": ("llama", {**_rope("dynamic", factor=2.0), "max_position_embeddings": 24}),
    "llama_llama3": ("llama", _rope("llama3", **_LLAMA3)),
    "llama_yarn": ("llama", _rope("yarn", **_YARN)),
    "llama_yarn_factor": ("llama", _rope("yarn", **_YARN, attention_factor=1.3, beta_fast=8.0, beta_slow=0.5)),
    "llama_yarn_mscale": ("llama", _rope("yarn", **_YARN, mscale=1.0, mscale_all_dim=0.7)),
    "llama_yarn_untruncated": ("llama", _rope("yarn", **_YARN, truncate=False)),
    "qwen2_group_7": ("qwen2", {"hidden_size": 56, "num_attention_heads": 14, "head_dim": 16}),
    "qwen2_tied_yarn": ("qwen2", {"tie_word_embeddings": True, **_rope("yarn", **_YARN)}),
    "qwen3_group_4": ("qwen3", {"num_key_value_heads": 1, "head_dim": 32}),
    "qwen3_tied_bias": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16}),
}


def make_model(name: str) -> torch.nn.Module:
    """The transformers model of a case in float32; every weight is random, norms and biases too."""
    architecture, changes = CASES[name]
    config_class, model_class = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[architecture]
    model = model_class(config_class(**{**_SIZES, **changes})).float().eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            mean = 1.0 if key.endswith("norm.weight") else 0.0
            parameter.copy_(mean + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def our_params(model: torch.nn.Module) -> tuple[ModelConfig, dict[str, Any]]:
    """Config and float32 parameters of a transformers model."""
    config = ModelConfig.from_hf(model.config.to_dict())
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    leaves = {
        parameter.path: fuse(parameter, lambda name: [tensors[name]], np.float32)
        for group in parameter_groups(config)
        for parameter in group.parameters
    }
    return config, tree_of(leaves)


def reference_logits(
    model: torch.nn.Module, prompt: np.ndarray, following: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """transformers' logits [len(prompt), V] of a prompt in one pass, then [len(following), V] token by token."""
    with torch.no_grad():
        out = model(torch.tensor(prompt)[None], use_cache=True)
        first, steps = out.logits[0].numpy(), []
        for token in following:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits[0, 0].numpy())
    return first, np.stack(steps)
