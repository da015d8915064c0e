"""What decides the outcome of a training run of the embedded model, and the architecture that it trains."""

from __future__ import annotations

from dataclasses import dataclass

from sparsejax.models import ModelConfig, RopeConfig
from train.tokenizer import BEGIN_ID, END_ID


@dataclass(frozen=True)
class Recipe:
    """A run's settings; the model card names them.

    Attributes:
        seed: of the weights and the data.
        minutes, steps: the run ends at whichever comes first; learning rate and curriculum follow that progress.
        peak_learning_rate: AdamW's, after warm-up.
        batch_tokens: tokens of a step, about.
        lengths: sequence lengths of the curriculum, in tokens.
        deadlines: progress by which each stage but the last ends, learned or not.
        num_layers, hidden_size, intermediate_size: sizes of the model.
    """

    seed: int = 0
    minutes: float = 8.0
    steps: int = 100_000
    peak_learning_rate: float = 1e-3
    batch_tokens: int = 65536
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    deadlines: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.75)
    num_layers: int = 6
    hidden_size: int = 256
    intermediate_size: int = 768


def tiny_config(recipe: Recipe, vocab_size: int) -> ModelConfig:
    """A Llama with 8 query heads over 2 KV heads of 64.

    The RoPE base is large for the length: the slowest pairs hardly turn within the context and serve to match content.
    """
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_layers=recipe.num_layers,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        rope=RopeConfig(theta=100_000.0),
        max_position_embeddings=8192,
        eos_token_ids=(END_ID,),
        bos_token_id=BEGIN_ID,
    )
