"""The model and engine that the engine tests share: tiny, random, and everything about it small enough to run out."""

from sparsejax.models import ModelConfig

VOCAB = 61
CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    eos_token_ids=(2,),
)
ENGINE = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "max_prefill_seqs": 4,
    "page_size": 4,
    "num_pages": 4 * 129,
    "skip_tokenizer_init": True,
}
