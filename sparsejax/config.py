"""Frozen configuration of the engine. A model's own configuration lives in `sparsejax.models.config`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsejax.errors import InvalidArgumentError, unknown_key_error
from sparsejax.validation import choice, flag, number, whole

if TYPE_CHECKING:  # all bring JAX, which the command line's parser does not need
    from pallas_kernels import Implementation
    from sparsejax.cache import Granularity
    from sparsejax.compressor import CompressorConfig
    from sparsejax.engine.requests.compression_params import CompressionParams

DTYPES = ("auto", "float32", "bfloat16", "float16")
LATENT_DTYPES = ("bfloat16", "float32", "int4")
GRANULARITIES = ("shared", "per_layer", "per_head")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything `LLM(...)` accepts beside the model. Names follow vLLM where vLLM has one.

    `None` means: chosen for the model and the device when the engine is built.

    Attributes:
      dtype: compute and cache dtype; "auto" is the checkpoint's own on a GPU and float32 on a CPU.
      max_model_len: longest prompt plus answer, in tokens. Default: the model's `max_position_embeddings`.
      max_num_seqs: most requests running at once. Default: 256 on a GPU, 16 on a CPU.
      max_num_batched_tokens: most prompt tokens in one step; longer prompts are chunked. Requests that decode in the
        step count too, but leave at least half of it to prompts. Default: 2,048 on a GPU, 1,024 on a CPU.
      max_mixed_tokens: the same for steps in which requests decode. Less than max_num_batched_tokens gives them their
        tokens at shorter intervals while long prompts are computed, which then take longer. Default:
        max_num_batched_tokens.
      max_prefill_seqs: most requests whose chunks share one prefill step.
      gpu_memory_utilization: fraction of each GPU's memory that JAX is asked to reserve, if nothing in the process has
        used JAX before; weights, scratch and the pool share it. No effect in `LLM.from_params`.
      tensor_parallel_size: GPUs a model is split over; only 1 so far.
      seed: seeds the requests that bring none of their own.
      tokenizer: folder or Hugging Face id of the tokenizer. Default: the model's.
      skip_tokenizer_init: work on token ids only; outputs then carry no text.
      enable_prefix_caching: keep the tokens of requests that have ended, and give a new request the longest prefix of
        its prompt that some request has or had, instead of computing it again. Requests with `prompt_logprobs` or a
        repetition penalty compute their whole prompt all the same. No effect on models with "dynamic" RoPE, whose keys
        depend on the length of the prompt.
      max_resident_rows: for prefix caching: requests beyond max_num_seqs that the slot table has rows for. At least as
        many can be kept after their end; their pages are given up first whenever pages are needed.
        Default: max_num_seqs.
      methods: sparse methods that requests may use. Default: any; the cache is then laid out for dense attention until
        the first request that evicts, when it is built anew (`LLM.enable_methods`).
      default_compression: the method of requests that name none.
      compressor: for method "deltakv": folder or Hugging Face id of the compressor that was trained for the model, or a
        pair (CompressorConfig, parameters) that is loaded already. It is loaded when the method is first used, or at
        once if `methods` names it. Default: the embedded model's own, for that model.
      full_attention_layers: for method "deltakv": layers that keep every token as it is; each one that is followed by
        another layer chooses for the layers behind it what they read. Layer 0 must be among them. Default: those known
        for the model, or every sixth.
      recent_tokens: for method "deltakv": tokens that are compressed at once; as many to twice as many of the last
        tokens are always there as they are.
      latent_dtype: for method "deltakv": how compressed tokens are stored: "bfloat16", "float32", or "int4" (one scale
        for 32 numbers). Default: float32 if the model is, else bfloat16.
      dense_cache_fraction: for method "deltakv": fraction of the KV cache that is laid out as dense requests need it,
        in [0, 1). The rest is laid out for compressed ones, whose sparse layers have little room for dense ones.
      page_size: tokens in one page of the KV cache, a power of two.
      num_pages: physical pages in the pool (one KV head of one layer each). Default: what memory allows.
      table_granularity: "shared", "per_layer" or "per_head" slot tables. Default: the coarsest the methods allow.
      implementation: "triton" or "xla" kernels. Default: xla on a CPU; on a GPU triton, and on Hopper the Mosaic
        kernels of prefill attention and of linear layers, which with "triton" are XLA's.
      warmup: compile every step variant when the engine is built rather than when first needed; "greedy" only those
        of requests that take the likeliest token. Of the programs that compress and evict it compiles those of
        `default_compression`; other methods' are compiled when they are first needed.
    """

    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_mixed_tokens: int | None = None
    max_prefill_seqs: int = 16
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    seed: int = 0
    tokenizer: str | Path | None = None
    skip_tokenizer_init: bool = False
    enable_prefix_caching: bool = True
    max_resident_rows: int | None = None
    methods: tuple[str, ...] | None = None
    default_compression: CompressionParams | None = None
    compressor: str | Path | tuple[CompressorConfig, Any] | None = None
    full_attention_layers: tuple[int, ...] | None = None
    recent_tokens: int = 128
    latent_dtype: str | None = None
    dense_cache_fraction: float = 0.0
    page_size: int = 32
    num_pages: int | None = None
    table_granularity: Granularity | None = None
    implementation: Implementation | None = None
    warmup: bool | Literal["greedy"] = False

    def __post_init__(self) -> None:
        positive = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_prefill_seqs", "num_pages")
        for name in (*positive, "max_resident_rows", "max_mixed_tokens", "recent_tokens", "page_size"):
            self._check(name, whole, 1)
        if self.page_size & (self.page_size - 1):
            raise InvalidArgumentError(f"page_size must be a power of two (1, 2, 4, ...), got {self.page_size!r}.")
        self._check("gpu_memory_utilization", partial(number, above=True), 0.0, 1.0)
        self._check("dense_cache_fraction", number, 0.0, 1.0)
        if self.dense_cache_fraction == 1.0:
            raise InvalidArgumentError("dense_cache_fraction must be less than 1: compressed requests need the rest.")
        self._check("seed", whole, 0)
        self._check("dtype", choice, DTYPES)
        self._check("table_granularity", choice, GRANULARITIES)
        self._check("implementation", choice, ("triton", "xla"))
        self._check("latent_dtype", choice, LATENT_DTYPES)
        self._check("enable_prefix_caching", flag)
        self._check("skip_tokenizer_init", flag)
        if not isinstance(self.warmup, bool) and self.warmup != "greedy":
            raise InvalidArgumentError(f"warmup must be False, True or 'greedy', got {self.warmup!r}.")
        if self.tensor_parallel_size != 1:
            raise InvalidArgumentError(
                f"tensor_parallel_size must be 1: tensor parallelism is not available yet, got "
                f"{self.tensor_parallel_size!r}. Run one engine a GPU instead."
            )
        self._check_compressor()
        if self.full_attention_layers is not None:
            from sparsejax.methods.selection import full_layers

            object.__setattr__(self, "full_attention_layers", full_layers(self.full_attention_layers))
        if self.methods is not None:
            if not isinstance(self.methods, list | tuple | frozenset | set) or not self.methods:
                raise InvalidArgumentError(f"methods must be a list of at least one name, got {self.methods!r}.")
            from sparsejax import methods

            names = tuple(choice("methods", name, methods.available()) for name in self.methods)
            object.__setattr__(self, "methods", names)
        if self.default_compression is not None:
            from sparsejax.engine.requests.compression_params import CompressionParams

            if not isinstance(self.default_compression, CompressionParams):
                raise InvalidArgumentError(
                    f"default_compression must be CompressionParams, got {self.default_compression!r}."
                )

    def _check_compressor(self) -> None:
        given = self.compressor
        if given is None or isinstance(given, str | Path):
            return
        from sparsejax.compressor import CompressorConfig

        if not isinstance(given, tuple) or len(given) != 2 or not isinstance(given[0], CompressorConfig):
            raise InvalidArgumentError(
                f"compressor must be a folder, a Hugging Face id or (CompressorConfig, parameters), got {given!r:.80}."
            )

    def _check(self, name: str, check: Callable[..., Any], *allowed: Any) -> None:
        """Normalises an argument by a check of `sparsejax.validation`; None passes where it is the default."""
        value = getattr(self, name)
        if value is not None or self.__dataclass_fields__[name].default is not None:
            object.__setattr__(self, name, check(name, value, *allowed))

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> EngineConfig:
        """Builds a config; an unknown key is an error that names the nearest valid one."""
        valid = [field.name for field in fields(cls)]
        for name in kwargs:
            if name not in valid:
                raise unknown_key_error(name, valid, "LLM")
        return cls(**kwargs)
