"""sparsejax: a JAX inference engine for NVIDIA GPUs in which the KV cache is sparse from the start."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsejax.engine.requests.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from sparsejax.errors import SparsejaxError

if TYPE_CHECKING:
    from sparsejax.engine.llm import LLM
    from sparsejax.engine.requests.compression_params import CompressionParams
    from sparsejax.engine.requests.sampling_params import SamplingParams

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


# What brings JAX, which `sparsejax --help` does not need, and the module that is imported on first use.
_LAZY = {
    "LLM": "sparsejax.engine.llm",
    "CompressionParams": "sparsejax.engine.requests.compression_params",
    "SamplingParams": "sparsejax.engine.requests.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
