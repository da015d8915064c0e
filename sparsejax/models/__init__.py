"""Decoders of Llama, Qwen2 and Qwen3. Attention is handed in, so nothing here knows a cache or a sparse method."""

from sparsejax.models.config import ARCHITECTURES, ModelConfig, UnsupportedModelError
from sparsejax.models.decoder import Attend, AttendFromProjection, Decoder, abstract_params, init_params
from sparsejax.models.dense_attention import dense_causal_attend
from sparsejax.models.rope import RopeConfig

__all__ = [
    "ARCHITECTURES",
    "Attend",
    "AttendFromProjection",
    "Decoder",
    "ModelConfig",
    "RopeConfig",
    "UnsupportedModelError",
    "abstract_params",
    "dense_causal_attend",
    "init_params",
]
