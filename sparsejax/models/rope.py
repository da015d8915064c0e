"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with the context extensions of transformers.

Angles are float32 whatever the model's dtype: at position 100,000 a bfloat16 angle is off by whole turns. The
half-split layout is used (component i is paired with i + D/2), as in Hugging Face checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rotate

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions become rotation angles. Only the fields of a kind are read for it.

    Attributes:
      kind: "default"; "linear" (positions divided by `factor`); "dynamic" (NTK-aware: the base grows with the sequence
        once it is longer than `original_max_position_embeddings`); "llama3" (slow frequencies divided by `factor`);
        "yarn" (Peng et al. 2023, arXiv:2309.00071).
      theta: the base.
      factor: by how much the context was stretched (linear, dynamic, llama3, yarn).
      original_max_position_embeddings: context length before stretching, in tokens (dynamic, llama3, yarn).
      low_freq_factor, high_freq_factor: bounds of llama3's ramp, in turns over the original context.
      beta_slow, beta_fast: bounds of yarn's ramp, in turns over the original context.
      attention_factor: multiplier of cos and sin (yarn); None: from factor, `mscale` and `mscale_all_dim`.
      truncate: round yarn's ramp bounds outwards to whole dimensions.
    """

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_slow: float = 1.0
    beta_fast: float = 32.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rope_type must be one of {', '.join(KINDS)}; got {self.kind!r}.")
        for name, value in (("rope_theta", self.theta), ("factor", self.factor)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value!r}.")
        if self.kind in ("dynamic", "llama3", "yarn") and self.original_max_position_embeddings < 1:
            raise ValueError(f"rope_type {self.kind!r} needs original_max_position_embeddings.")
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                "low_freq_factor must be positive and below high_freq_factor, got "
                f"{self.low_freq_factor!r} and {self.high_freq_factor!r}."
            )
        if self.kind == "yarn" and not (0 < self.beta_slow < math.inf and 0 < self.beta_fast < math.inf):
            raise ValueError(
                f"beta_slow and beta_fast must be positive, got {self.beta_slow!r} and {self.beta_fast!r}."
            )
        if self.kind == "yarn" and self.theta <= 1:
            raise ValueError(f"rope_theta must be above 1 for rope_type 'yarn', got {self.theta!r}.")

    @classmethod
    def from_hf(cls, parameters: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
        """Parses transformers' RoPE parameters (one flat dictionary that includes `rope_theta`).

        Raises:
          ValueError: if the type is not supported, or a parameter it needs is missing.
        """
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in KINDS:
            raise ValueError(f"rope_type must be one of {', '.join(KINDS)}; got {kind!r}.")
        given = {key: value for key, value in parameters.items() if value is not None}
        missing = [name for name in _REQUIRED[kind] if name not in given]
        if missing:
            raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)}; got {', '.join(sorted(given))}.")
        values: dict[str, Any] = {"kind": kind, "theta": _number(given, "rope_theta")}
        original = int(_number(given, "original_max_position_embeddings", max_position_embeddings))
        if kind != "default":
            values["factor"] = _number(given, "factor", max_position_embeddings / max(original, 1))
        if kind == "dynamic":
            # transformers measures the growth from max_position_embeddings, whatever else the parameters say.
            values["original_max_position_embeddings"] = max_position_embeddings
        elif kind in ("llama3", "yarn"):
            values["original_max_position_embeddings"] = original
        if kind == "llama3":
            names = ("low_freq_factor", "high_freq_factor")
        elif kind == "yarn":
            names = ("attention_factor", "mscale", "mscale_all_dim", "beta_fast", "beta_slow")
            values["truncate"] = given.get("truncate", True)
            if not isinstance(values["truncate"], bool):
                raise ValueError(f"truncate must be true or false, got {values['truncate']!r}.")
            # transformers takes a beta of 0 for one that is not given.
            given = {key: value for key, value in given.items() if value != 0 or key not in ("beta_fast", "beta_slow")}
        else:
            names = ()
        values |= {name: _number(given, name) for name in names if name in given}
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The `rope_parameters` dictionary of transformers 5."""
        parameters: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            parameters["factor"] = self.factor
        if self.kind in ("llama3", "yarn"):
            parameters["original_max_position_embeddings"] = self.original_max_position_embeddings
        if self.kind == "llama3":
            parameters |= {"low_freq_factor": self.low_freq_factor, "high_freq_factor": self.high_freq_factor}
        if self.kind == "yarn":
            parameters |= {"beta_fast": self.beta_fast, "beta_slow": self.beta_slow, "truncate": self.truncate}
            optional = {name: getattr(self, name) for name in ("attention_factor", "mscale", "mscale_all_dim")}
            parameters |= {name: value for name, value in optional.items() if value is not None}
        return parameters


def _number(parameters: Mapping[str, Any], name: str, default: float = 0.0) -> float:
    """A finite number by name, as JSON or a cautious hand has written it."""
    value = parameters.get(name, default)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r}.")
    return number


def rope_cos_sin(
    config: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each token's rotation angles.

    Args:
      positions: i32[T], position of each token in its text.
      lengths: i32[T], length of the sequence that sets the base of "dynamic"; None: position + 1. transformers uses the
        prompt's length for all tokens of a prompt, and position + 1 for each generated token. Other kinds ignore it.

    Returns:
      (cos, sin), each f32[T, head_dim / 2], with yarn's attention factor multiplied in.
    """
    if config.kind == "dynamic":
        frequencies = _dynamic_frequencies(config, head_dim, positions + 1 if lengths is None else lengths)
    else:
        frequencies = jnp.asarray(inverse_frequencies(config, head_dim))
    angles = positions.astype(jnp.float32)[:, None] * frequencies  # [T, D/2]
    scale = attention_factor(config)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [T, H, D] by the angles of cos, sin [T, D/2]; computed in float32, returned in x's dtype."""
    return rotate(x, cos, sin)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """f32[head_dim / 2] radians per position; of "dynamic", those up to the original length."""
    exponent = _exponents(head_dim)
    # Rounded once, as PyTorch's power is but for single cases. NumPy's float32 power is off by one unit in every fifth
    # element, and a unit is a hundredth of a radian at position 100,000.
    base = (np.float64(config.theta) ** exponent.astype(np.float64)).astype(np.float32)
    plain = (np.float32(1.0) / base).astype(np.float32)
    if config.kind == "linear":
        return (plain / np.float32(config.factor)).astype(np.float32)
    if config.kind == "llama3":
        return _llama3_frequencies(config, plain)
    if config.kind == "yarn":
        return _yarn_frequencies(config, plain)
    return plain


def _exponents(head_dim: int) -> np.ndarray:
    """f32[head_dim / 2], divided as PyTorch does: XLA multiplies by the inverse, which is off by a unit for some."""
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def attention_factor(config: RopeConfig) -> float:
    """Multiplier of cos and sin: yarn's temperature, 1 for the other kinds."""
    if config.kind != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return _yarn_mscale(config.factor, config.mscale) / _yarn_mscale(config.factor, config.mscale_all_dim)
    return _yarn_mscale(config.factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _dynamic_frequencies(config: RopeConfig, head_dim: int, lengths: jax.Array) -> jax.Array:
    """f32[T, head_dim / 2]: the base grows so that the slowest frequency stretches with the sequence."""
    original = config.original_max_position_embeddings
    growth = config.factor * lengths.astype(jnp.float32) / original - (config.factor - 1)
    base = config.theta * jnp.maximum(growth, 1.0) ** (head_dim / (head_dim - 2))  # [T]
    grown = 1.0 / base[:, None] ** jnp.asarray(_exponents(head_dim))
    return jnp.where(lengths[:, None] > original, grown, inverse_frequencies(config, head_dim))


def _llama3_frequencies(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Frequencies that turn often over the original context stay, slow ones are divided, a ramp lies between."""
    turns = config.original_max_position_embeddings * plain / (2 * math.pi)
    ramp = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = np.clip(ramp, 0.0, 1.0)
    return (keep * plain + (1 - keep) * plain / config.factor).astype(np.float32)


def _yarn_frequencies(config: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """As llama3, but the ramp runs over the dimension index."""
    dim = 2 * plain.shape[0]

    def dimension(turns: float) -> float:  # where a frequency makes `turns` turns over the original context
        return (
            dim
            * math.log(config.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(config.theta))
        )

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    stretch = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return ((1 - stretch) * plain + stretch * plain / config.factor).astype(np.float32)
