"""Configuration of a compressor: sizes and types of its projections, and how references are chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from pallas_kernels.nearest import METRICS
from sparsejax.errors import SparsejaxError
from sparsejax.models.config import ModelConfig

DOWN_UP_TYPES = ("linear", "mlp_gelu", "mlp_swiglu")
REFERENCE_KINDS = ("cluster", "e2e")
REFERENCE_MODES = ("avg", "first")

_TYPE_ALIASES = {"mlp": "mlp_gelu", "gelu": "mlp_gelu", "swiglu": "mlp_swiglu"}

# Names that one option has had in published checkpoints; the first one present counts, the first is written.
PUBLISHED_NAMES: dict[str, tuple[str, ...]] = {
    "kv_compressed_size": ("kv_compressed_size", "deltakv_latent_dim"),
    "chunk_size": ("seq_chunk_size", "compressor_token_group_size"),
    "neighbors": ("deltakv_k_neighbors", "k_neighbors", "deltakv_neighbor_count"),
    "cluster_ratio": ("cluster_ratio", "deltakv_center_ratio"),
    "sink_tokens": ("num_sink_tokens", "sink_keep_tokens"),
}

# What a checkpoint's config means when it leaves a key out.
_DEFAULTS: dict[str, Any] = {
    "kv_compressed_size": 128,
    "chunk_size": 1,
    "cluster_ratio": 0.1,
    "sink_tokens": 16,
}

# Options of which one value only is in use anywhere: key, that value.
_FIXED: dict[str, Any] = {
    "recon_mode": "delta_in_latent",
    "layer_chunk_size": 1,
    "collect_kv_before_rope": True,
    "stride_alpha": 0.0,
}


class CompressorConfigError(SparsejaxError, ValueError):
    """An option of a compressor has a value that is not allowed; the message names it and what is."""


class CompressorMismatchError(SparsejaxError, ValueError):
    """A compressor was made for another model than the one it is to be used with; the message names both."""


@dataclass(frozen=True, kw_only=True)
class CompressorConfig:
    """A compressor for every layer of one model. Hashable, so it can be a static argument of a jitted function.

    Attributes:
      num_layers: layers of the model; each has its own pair of projections.
      kv_dim: size of a token's signal, 2 * num_kv_heads * head_dim.
      kv_compressed_size: size of a latent (d); with `split_kv` of each of the two halves.
      down_type, up_type: "linear", "mlp_gelu" (two layers around an exact GELU) or "mlp_swiglu".
      down_intermediate_size, up_intermediate_size: width inside an MLP; 0 becomes (input + output) // 2. 0 for
        "linear".
      bias: whether the projections have biases.
      split_kv: separate compressors for K and V; only with references="e2e".
      references: "cluster" (the nearest centers) or "e2e" (by position: a mean of the last tokens, or a group's first).
      neighbors: references of a token (K), for "cluster".
      cluster_ratio: share of tokens after the sinks that are centers, for "cluster".
      cluster_metric: nearness of a center: "l2" (smallest distance), "dot" or "cosine" (largest).
      cluster_on_kv: search with the whole signal; False: with its key half.
      cluster_soft_assignment: weigh references by softmax(score / cluster_temp) rather than equally. Only in training;
        serving takes the plain mean.
      cluster_temp: temperature of the soft assignment.
      chunk_size: tokens that share a reference, for "e2e"; 1: none, a plain autoencoder.
      ref_mode: for "e2e", "avg" (mean of the last chunk_size tokens) or "first" (first token of the chunk).
      sink_tokens: first tokens of a text, never compressed.
    """

    num_layers: int
    kv_dim: int
    kv_compressed_size: int
    down_type: str = "linear"
    up_type: str = "linear"
    down_intermediate_size: int = 0
    up_intermediate_size: int = 0
    bias: bool = False
    split_kv: bool = False
    references: str = "cluster"
    neighbors: int = 4
    cluster_ratio: float = 0.1
    cluster_metric: str = "l2"
    cluster_on_kv: bool = True
    cluster_soft_assignment: bool = False
    cluster_temp: float = 10.0
    chunk_size: int = 1
    ref_mode: str = "avg"
    sink_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("num_layers", "kv_dim", "kv_compressed_size", "neighbors", "chunk_size"):
            _require_whole(name, getattr(self, name), 1)
        for name in ("down_intermediate_size", "up_intermediate_size", "sink_tokens"):
            _require_whole(name, getattr(self, name), 0)
        _require_choice("down_type", self.down_type, DOWN_UP_TYPES)
        _require_choice("up_type", self.up_type, DOWN_UP_TYPES)
        _require_choice("references", self.references, REFERENCE_KINDS)
        _require_choice("cluster_metric", self.cluster_metric, METRICS)
        _require_choice("ref_mode", self.ref_mode, REFERENCE_MODES)
        if self.kv_dim % 2:
            raise CompressorConfigError(f"kv_dim must be even, half keys and half values; got {self.kv_dim}.")
        if not 0.0 < self.cluster_ratio <= 1.0:
            raise CompressorConfigError(f"cluster_ratio must be above 0 and at most 1, got {self.cluster_ratio!r}.")
        if not (self.cluster_temp > 0 and math.isfinite(self.cluster_temp)):
            raise CompressorConfigError(f"cluster_temp must be positive, got {self.cluster_temp!r}.")
        if self.split_kv and self.references != "e2e":
            raise CompressorConfigError('split_kv needs references="e2e", got references="cluster".')
        # What has no meaning is as it is by default, so that equal compressors have equal configurations.
        by_position = self.references == "e2e"
        unused = ("chunk_size", "ref_mode")
        if by_position:
            unused = ("neighbors", "cluster_ratio", "cluster_metric", "cluster_on_kv", "cluster_soft_assignment")
        if by_position or not self.cluster_soft_assignment:
            unused += ("cluster_temp",)
        for entry in fields(self):
            if entry.name in unused:
                object.__setattr__(self, entry.name, entry.default)
        for direction in ("down", "up"):
            name = f"{direction}_intermediate_size"
            if getattr(self, f"{direction}_type") == "linear":
                object.__setattr__(self, name, 0)
            elif getattr(self, name) == 0:
                object.__setattr__(self, name, (self.input_size + self.kv_compressed_size) // 2)

    @property
    def step(self) -> int:
        """Distance between centers after the sinks, in tokens: max(1, int(1 / cluster_ratio))."""
        # 1 / 0.1 and its kin fall just below whole numbers for some ratios; 1e-9 keeps int() from losing a token.
        return max(1, int(1.0 / self.cluster_ratio + 1e-9))

    @property
    def input_size(self) -> int:
        """Size of what one pair of projections compresses: kv_dim, or half of it with `split_kv`."""
        return self.kv_dim // 2 if self.split_kv else self.kv_dim

    @property
    def latent_size(self) -> int:
        """Numbers stored for a compressed token: kv_compressed_size, or twice that with `split_kv`."""
        return self.kv_compressed_size * (2 if self.split_kv else 1)

    def require_model(self, model: ModelConfig, *, where: str = "The compressor") -> None:
        """Raises CompressorMismatchError unless this compressor fits the model.

        Args:
          where: the compressor, in words, to begin the message with.
        """
        if (self.num_layers, self.kv_dim) != (model.num_layers, kv_dim_of(model)):
            raise CompressorMismatchError(
                f"{where} is for {self.num_layers} layers with {self.kv_dim} key and value numbers a token; the model "
                f"({model.architecture}, {model.num_kv_heads} KV heads of {model.head_dim}) has {model.num_layers} "
                f"layers with {kv_dim_of(model)}."
            )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, num_layers: int, kv_dim: int, references: str | None = None
    ) -> CompressorConfig:
        """Reads the fields of a published compressor's `config.json`, under any of the names they have had.

        Args:
          config: the dictionary; keys that are no option of a compressor (the base model's, serving defaults) are left.
          num_layers, kv_dim: of the model that it is for.
          references: "cluster" or "e2e"; None: by `use_cluster`, and "cluster" if that is absent.

        Raises:
          CompressorConfigError: a value that is not allowed or that no implementation has.
        """

        def given(option: str) -> Any:
            found = {name: config[name] for name in PUBLISHED_NAMES[option] if config.get(name) is not None}
            if len(set(found.values())) > 1:
                raise CompressorConfigError(f"The config contradicts itself: {found}; these are names of one option.")
            return next(iter(found.values()), _DEFAULTS.get(option))

        for key, only in _FIXED.items():
            if config.get(key, only) != only:
                raise CompressorConfigError(f"{key} must be {only!r}, got {config[key]!r}.")
        split = bool(config.get("split_kv", False))
        if references is None:
            references = "cluster" if config.get("use_cluster", not split) else "e2e"
        chunk = given("chunk_size")
        neighbors = given("neighbors")
        down, down_size = _direction(config, "down")
        up, up_size = _direction(config, "up")
        mode = config.get("ref_mode", "avg")
        return cls(
            num_layers=num_layers,
            kv_dim=kv_dim,
            kv_compressed_size=given("kv_compressed_size"),
            down_type=down,
            up_type=up,
            down_intermediate_size=down_size,
            up_intermediate_size=up_size,
            bias=bool(config.get("compressor_linear_bias", True)),
            split_kv=split,
            references=references,
            # One key served for both before they were told apart.
            neighbors=chunk if neighbors is None else neighbors,
            cluster_ratio=float(given("cluster_ratio")),
            cluster_metric=config.get("cluster_metric", "l2"),
            cluster_on_kv=bool(config.get("cluster_on_kv", True)),
            cluster_soft_assignment=bool(config.get("cluster_soft_assignment", False)),
            cluster_temp=float(config.get("cluster_temp", 10.0)),
            chunk_size=chunk if references == "e2e" else 1,
            # Cluster compressors carry a mode that nothing reads, "last" by default.
            ref_mode=mode if references == "e2e" else "avg",
            sink_tokens=given("sink_tokens"),
        )

    def to_hf(self) -> dict[str, Any]:
        """Fields of a published compressor's `config.json`, to be laid over the base model's. `from_hf` inverts it."""
        cluster = self.references == "cluster"
        return {
            "kv_compressed_size": self.kv_compressed_size,
            # Older readers take the number of neighbours from here.
            "seq_chunk_size": self.neighbors if cluster else self.chunk_size,
            "deltakv_k_neighbors": self.neighbors,
            "layer_chunk_size": 1,
            "recon_mode": "delta_in_latent",
            "ref_mode": self.ref_mode,
            "use_nonlinear_compressor": (self.down_type, self.up_type) != ("linear", "linear"),
            "compressor_down_type": self.down_type,
            "compressor_up_type": self.up_type,
            "compressor_intermediate_size": -1,
            "compressor_down_intermediate_size": self.down_intermediate_size or -1,
            "compressor_up_intermediate_size": self.up_intermediate_size or -1,
            "compressor_linear_bias": self.bias,
            "collect_kv_before_rope": True,
            "split_kv": self.split_kv,
            "use_cluster": cluster,
            "use_compression": True,
            "cluster_metric": self.cluster_metric,
            "cluster_on_kv": self.cluster_on_kv,
            "cluster_ratio": self.cluster_ratio,
            "cluster_temp": self.cluster_temp,
            "cluster_soft_assignment": self.cluster_soft_assignment,
            "num_sink_tokens": self.sink_tokens,
        }


def kv_dim_of(model: ModelConfig) -> int:
    """Size of one token's keys and values in one layer."""
    return 2 * model.num_kv_heads * model.head_dim


def _direction(config: Mapping[str, Any], direction: str) -> tuple[str, int]:
    """(type, intermediate size or 0) of the "down" or "up" projection, "auto" and aliases resolved."""
    key = f"compressor_{direction}_type"
    kind = config.get(key, "auto")
    if kind == "auto":
        kind = "mlp_gelu" if config.get("use_nonlinear_compressor", True) else "linear"
    kind = _TYPE_ALIASES.get(kind, kind)
    _require_choice(key, kind, ("auto", *DOWN_UP_TYPES))
    if kind == "linear":
        return kind, 0
    sizes = (
        config.get(f"compressor_{direction}_intermediate_size", -1),
        config.get("compressor_intermediate_size", 2048),
    )
    return kind, next((size for size in sizes if size is not None and size > 0), 0)


def _require_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CompressorConfigError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def _require_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise CompressorConfigError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
