"""From a configuration to what an engine needs to store requests compressed: compressor, layers, geometry, pools."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.latents import GROUP
from sparsejax.cache import DeltaCacheLayout, Entries
from sparsejax.checkpoint.compressor import load_compressor
from sparsejax.compressor import CompressorConfig, StoreGeometry
from sparsejax.config import EngineConfig
from sparsejax.engine.programs.delta_ops import StoreSpec
from sparsejax.engine.scheduling.store_limits import StoreLimits, cell_size
from sparsejax.errors import InvalidArgumentError, OutOfMemoryError
from sparsejax.methods import DeltaKV
from sparsejax.methods.known_layers import known_layers, spread_layers
from sparsejax.methods.selection import full_layers
from sparsejax.models import ModelConfig


@dataclass(frozen=True)
class Store:
    """How an engine stores requests compressed.

    Attributes:
      spec: what the steps need to know.
      full_layers: layers that keep everything.
      params: of the compressor, of the sparse layers only, in the model's type.
      latent_dtype: "bfloat16", "float32" or "int4".
      dense_fraction: of the memory of the pools, shared among them as dense requests need it.
    """

    spec: StoreSpec
    full_layers: tuple[int, ...]
    params: Mapping[str, Any]
    latent_dtype: str
    dense_fraction: float = 0.0

    def layout(self, model: ModelConfig, *, entries: Entries, dtype: Any, **sizes: int) -> DeltaCacheLayout:
        """The layout of a cache with `entries`. sizes: max_rows, max_slots and page_size."""
        return DeltaCacheLayout.make(
            num_layers=model.num_layers,
            full_layers=self.full_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            latent_size=self.spec.compressor.latent_size,
            neighbors=self.spec.compressor.neighbors,
            max_centers=self.spec.geometry.centers(sizes["max_slots"] + self.spec.geometry.ring),
            latent_dtype=self.latent_dtype,
            ring=self.spec.geometry.ring,
            entries=entries,
            dtype=dtype,
            **sizes,
        )

    def fit(self, model: ModelConfig, budget: int, *, max_model_len: int, dtype: Any, **sizes: int) -> DeltaCacheLayout:
        """The layout whose pools share `budget` bytes as requests of `max_model_len` tokens share them.

        `dense_fraction` of the bytes are shared as dense requests share them, the others as compressed ones.

        Args:
          sizes: max_rows, max_slots and page_size.

        Raises:
          OutOfMemoryError: not one request of a token fits.
        """
        smallest = self.layout(model, entries=Entries(2, 2, 2), dtype=dtype, **sizes)
        held = StoreLimits(self.spec.geometry, Entries(*[2**31 - 1] * 3), smallest.page_size, cell=1).held
        left = budget - smallest.bytes_of(Entries(1, 1, 1))  # the null entries come first
        entries = [1, 1, 1]
        for compressed, share in ((True, 1 - self.dense_fraction), (False, self.dense_fraction)):
            row = held(max_model_len, compressed=compressed)
            rows = min(share * left / smallest.bytes_of(row), smallest.full.max_rows)
            entries = [count + int(rows * each) for count, each in zip(entries, row, strict=True)]
        if any(have < 1 + need for have, need in zip(entries, held(1, compressed=True), strict=True)):
            raise OutOfMemoryError(
                f"The KV cache would have {budget / 2**20:.1f} MiB: less than one request needs. Lower page_size or "
                "max_model_len, use a smaller model or dtype, or raise gpu_memory_utilization or num_pages."
            )
        # Every pool has an entry beside the null one, even if no request can come to need it.
        return self.layout(model, entries=Entries(*(max(count, 2) for count in entries)), dtype=dtype, **sizes)

    def limits(self, layout: DeltaCacheLayout, max_mixed_tokens: int) -> StoreLimits:
        """What the scheduler has to know."""
        return StoreLimits(
            geometry=self.spec.geometry,
            entries=Entries(*(count - 1 for count in layout.num_entries)),
            page_size=layout.page_size,
            cell=cell_size(max_mixed_tokens),
        )


def load_store(model: ModelConfig, config: EngineConfig, *, dtype: Any) -> Store:
    """The compressor and the layers that a configuration names, checked before anything of the cache is allocated.

    Args:
      dtype: the model's.

    Raises:
      InvalidArgumentError: no compressor, one that cannot be served, or layers that do not fit.
      CompressorMismatchError: the compressor is for another model.
      CheckpointError, TensorMismatchError, CompressorConfigError: a bad compressor checkpoint.
    """
    if config.compressor is None:
        raise InvalidArgumentError(
            "method 'deltakv' needs a compressor that was trained for the model: LLM(..., compressor=FOLDER). "
            "`sparsejax train-compressor` makes one."
        )
    if model.rope.kind == "dynamic":
        raise InvalidArgumentError(
            "method 'deltakv' rotates keys by their position when it reads them; with dynamic NTK scaling the rotation "
            "also depends on the length of the text, so such models cannot use it."
        )
    compressor, params = _compressor(model, config, dtype)
    if compressor.references != "cluster":
        raise InvalidArgumentError(
            f"method 'deltakv' serves compressors with references='cluster'; this one has {compressor.references!r}."
        )
    if compressor.cluster_soft_assignment:
        warnings.warn(
            "This compressor was trained with cluster_soft_assignment, which weighs a token's references. What is "
            "served is read back from their plain mean, with larger errors than in training: train without it.",
            stacklevel=2,
        )
    layers = full_attention_layers(model, config)
    geometry = StoreGeometry(compressor.sink_tokens, compressor.step, config.recent_tokens)
    own = {f"layers_{i}": params[f"layers_{i}"] for i in range(model.num_layers) if i not in layers}
    own = jax.tree.map(lambda x: jnp.asarray(x, dtype), own)
    latent_dtype = config.latent_dtype or ("float32" if jnp.dtype(dtype) == jnp.float32 else "bfloat16")
    if latent_dtype == "int4" and compressor.latent_size % GROUP:
        raise InvalidArgumentError(
            f"latent_dtype='int4' shares a scale among {GROUP} numbers; the compressor's latents have "
            f"{compressor.latent_size}, which is no multiple."
        )
    return Store(StoreSpec(compressor, geometry, model.rope), layers, own, latent_dtype, config.dense_cache_fraction)


def _compressor(model: ModelConfig, config: EngineConfig, dtype: Any) -> tuple[CompressorConfig, Mapping[str, Any]]:
    given = config.compressor
    if isinstance(given, tuple):
        given[0].require_model(model)
        return given
    assert given is not None
    return load_compressor(given, model=model, dtype=dtype)


def full_attention_layers(model: ModelConfig, config: EngineConfig) -> tuple[int, ...]:
    """Layers that keep everything: those that were given, or those known for the model, or an even spread.

    Raises:
      InvalidArgumentError: layers that the model does not have, without layer 0, or all of them.
    """
    count, given = model.num_layers, config.full_attention_layers
    asked = None if config.default_compression is None else config.default_compression.policy
    if given is None and isinstance(asked, DeltaKV):
        given = asked.full_attention_layers
    if given is None:
        known = known_layers(count, model.hidden_size, model.num_heads, model.num_kv_heads)
        given = spread_layers(count) if known is None else known.layers
    layers = full_layers(given)
    if layers[-1] >= count or len(layers) == count:
        raise InvalidArgumentError(
            f"full_attention_layers must name some but not all of the model's {count} layers (0 to {count - 1}), got "
            f"{layers}."
        )
    return layers
