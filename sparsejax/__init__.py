"""sparsejax: a JAX inference engine for NVIDIA GPUs in which the KV cache is sparse from the start."""

from typing import TYPE_CHECKING, Any

from sparsejax.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from sparsejax.engine.sampling_params import CompressionParams, SamplingParams
from sparsejax.errors import SparsejaxError

if TYPE_CHECKING:
    from sparsejax.engine.llm import LLM

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


def __getattr__(name: str) -> Any:
    """`LLM` on first use: it brings JAX, which `sparsejax --help` does not need."""
    if name == "LLM":
        from sparsejax.engine.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
