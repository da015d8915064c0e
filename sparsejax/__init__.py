"""sparsejax: a JAX inference engine for NVIDIA GPUs in which the KV cache is sparse from the start."""

from sparsejax.engine.llm import LLM
from sparsejax.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from sparsejax.engine.sampling_params import CompressionParams, SamplingParams
from sparsejax.errors import SparsejaxError

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "CompressionParams",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "SparsejaxError",
]
