"""The way of a checkpoint at full size: random Hugging Face shards -> convert -> load -> generate, timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from sparsejax import LLM, SamplingParams
from sparsejax.models import ModelConfig

SHARD_BYTES = 4 << 30
PROMPT_TOKENS = 1000
# Converts argv[1] to argv[2] and prints the process's peak resident memory in KiB.
CONVERT = """
import re, sys
from sparsejax.checkpoint import convert_from_hf
convert_from_hf(sys.argv[1], sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Hugging Face checkpoint's tensors, [out, in] for projections."""
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, d),
        "model.norm.weight": (d,),
    }
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}."
        projections = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        for name, shape in projections.items():
            shapes[f"{layer}self_attn.{name}_proj.weight"] = shape
            if config.o_bias if name == "o" else config.qkv_bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = shape[:1]
        for name, shape in {"gate": (f, d), "up": (f, d), "down": (d, f)}.items():
            shapes[f"{layer}mlp.{name}_proj.weight"] = shape
            if config.mlp_bias:
                shapes[f"{layer}mlp.{name}_proj.bias"] = shape[:1]
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{name}.weight"] = (d,)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                shapes[f"{layer}self_attn.{name}.weight"] = (config.head_dim,)
    return shapes


def write_random_checkpoint(folder: Path, raw_config: dict[str, Any], *, seed: int = 0) -> int:
    """Writes a bf16 checkpoint of random weights in Hugging Face layout, sharded. Returns its bytes."""
    config = ModelConfig.from_hf(raw_config)
    rng = np.random.default_rng(seed)
    # Drawing 16 GB of normal numbers takes minutes; slices of one block at random offsets serve a loader as well.
    block = (0.02 * rng.standard_normal(1 << 26, np.float32)).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    index, total = {}, 0

    def flush() -> None:
        save_file(shards[-1], folder / f"model-{len(shards):05d}.safetensors", metadata={"format": "pt"})
        shards[-1] = dict.fromkeys(shards[-1], np.empty(0))  # the names stay, the memory goes

    for name, shape in tqdm(tensor_shapes(config).items(), desc="writing random weights", unit="tensor"):
        size = int(np.prod(shape))
        start = int(rng.integers(0, max(1, block.size - size)))
        tensor = np.resize(block[start : start + size], size).reshape(shape)
        if name.endswith("norm.weight"):
            tensor = np.ones(shape, ml_dtypes.bfloat16)
        if sum(x.nbytes for x in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            flush()
            shards.append({})
        shards[-1][name] = tensor
        index[name] = f"model-{len(shards):05d}.safetensors"
        total += tensor.nbytes
    flush()
    (folder / "config.json").write_text(json.dumps(raw_config), encoding="utf-8")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8"
    )
    return total


def run(raw_config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Writes, converts, loads both layouts and generates; `folder` receives "hf" and "orbax".

    The prompt has `PROMPT_TOKENS`, or as many as the model's positions allow.

    Returns:
      Seconds of each stage, checkpoint bytes, peak host memory of the conversion and whether both loads generate alike.
    """
    report: dict[str, Any] = {"bytes": write_random_checkpoint(folder / "hf", raw_config)}
    start = time.perf_counter()
    # In a process of its own, so that its peak memory is its own too.
    command = [sys.executable, "-c", CONVERT, str(folder / "hf"), str(folder / "orbax")]
    peak = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report["convert_seconds"] = time.perf_counter() - start
    report["convert_peak_host_bytes"] = 1024 * int(peak)
    max_model_len = min(2048, ModelConfig.from_hf(raw_config).max_position_embeddings)
    answer_tokens = min(16, max_model_len // 2)
    prompt_tokens = min(PROMPT_TOKENS, max_model_len - answer_tokens)
    prompt = np.random.default_rng(1).integers(0, raw_config["vocab_size"], prompt_tokens).tolist()
    answers = []
    for layout in ("hf", "orbax"):
        start = time.perf_counter()
        llm = LLM(
            folder / layout,
            skip_tokenizer_init=True,
            max_num_seqs=4,
            max_model_len=max_model_len,
            num_pages=1 << 16,
        )
        jax.block_until_ready(llm.engine.runner.params)
        report[f"load_{layout}_seconds"] = time.perf_counter() - start
        params = SamplingParams(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True)
        output = llm.generate(prompt, params, use_tqdm=False)
        answers.append(output[0].outputs[0].token_ids)
        del llm
    report["layouts_agree"] = answers[0] == answers[1]
    return report
