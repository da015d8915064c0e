"""A tiny model with compressors for it, and engines that store requests compressed."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import LLM, CompressionParams, SamplingParams
from sparsejax.compressor import CompressorConfig
from sparsejax.models import ModelConfig
from sparsejax.models.decoder import init_params as init_model

VOCAB, DIM, HEADS, LAYERS = 61, 16, 2, 4
KV_DIM = 2 * HEADS * DIM
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=HEADS,
    head_dim=DIM,
    max_position_embeddings=128,
    eos_token_ids=(2,),
)
ENGINE = {
    "methods": ["full", "deltakv"],
    "full_attention_layers": (0, 2),
    "recent_tokens": 4,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 32,
    "max_mixed_tokens": 32,
    "max_prefill_seqs": 2,
    "page_size": 4,
    "num_pages": 3 * LAYERS * HEADS * 33,
    "dense_cache_fraction": 0.4,
    "skip_tokenizer_init": True,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=1)


@functools.cache
def model_params() -> Any:
    # Ten times the usual scale: logits far enough apart that rounding does not decide a token.
    return jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, init_model(CONFIG, jax.random.key(7), jnp.float32))


def compressor_config(size: int = KV_DIM, kind: str = "linear", **changes: Any) -> CompressorConfig:
    options: dict[str, Any] = {"neighbors": 2, "cluster_ratio": 0.25, "sink_tokens": 3, "bias": False} | changes
    return CompressorConfig(
        num_layers=LAYERS, kv_dim=KV_DIM, kv_compressed_size=size, down_type=kind, up_type=kind, **options
    )


def identity() -> tuple[CompressorConfig, Any]:
    """Stores tokens as they are, as differences."""
    eye = {"out": {"kernel": jnp.eye(KV_DIM)}}
    return compressor_config(), {f"layers_{i}": {"down": eye, "up": eye} for i in range(LAYERS)}


def lossy() -> tuple[CompressorConfig, Any]:
    """Loses half: a token is read back with what of its difference lies in a subspace. Configured as `identity`."""
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(KV_DIM, KV_DIM)))
    half = jnp.asarray(rotation * (np.arange(KV_DIM) < KV_DIM // 2), jnp.float32)
    pair = {"down": {"out": {"kernel": half}}, "up": {"out": {"kernel": half.T}}}
    return compressor_config(), {f"layers_{i}": pair for i in range(LAYERS)}


def make_llm(compressor: tuple[CompressorConfig, Any], **changes: Any) -> LLM:
    return LLM.from_params(CONFIG, model_params(), compressor=compressor, **(ENGINE | changes))


def delta(top_tokens: float = 128) -> CompressionParams:
    return CompressionParams(method="deltakv", top_tokens=top_tokens)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, VOCAB, length).tolist() for length in lengths]


def answers(llm: LLM, texts: list[list[int]], compression: Any, params: Any = GREEDY) -> list[Any]:
    """The answers to all of them, served together."""
    return [output.outputs[0] for output in llm.generate(texts, params, compression, use_tqdm=False)]


def tokens(given: list[Any]) -> list[list[int]]:
    return [answer.token_ids for answer in given]


def assert_all_free(llm: LLM) -> None:
    """No row holds anything: on the host, and on the device once releases have run."""
    engine = llm.engine
    assert engine.scheduler.free_entries == engine.scheduler.pool_entries
    assert engine.scheduler.available_entries == engine.scheduler.pool_entries
