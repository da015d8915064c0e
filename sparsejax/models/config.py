"""Configuration of a decoder: the sizes and switches that the code reads, parsed from a Hugging Face `config.json`.

Everything a config can ask for that the decoder does not compute is refused here, by name: a model that loads must give
the logits that its config promises.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from sparsejax.errors import SparsejaxError
from sparsejax.models.rope import RopeConfig

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# What transformers assumes for a key that config.json leaves out, where the architectures differ.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
}


class UnsupportedModelError(SparsejaxError, ValueError):
    """A config asks for something that no decoder here computes; the message names it and what is supported."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama, Qwen2 or Qwen3 decoder. Hashable, so it can be a static argument of a jitted function.

    Attributes:
      architecture: "llama", "qwen2" or "qwen3".
      vocab_size: rows of the embedding table (V).
      hidden_size: width of the residual stream (d).
      intermediate_size: width of the MLP (F).
      num_layers: decoder layers (L).
      num_heads: query heads (Hq), a multiple of `num_kv_heads`.
      num_kv_heads: key/value heads (H).
      head_dim: size of one head (D), even; need not be hidden_size / num_heads.
      rms_norm_eps: added to the mean square in every RMSNorm.
      tie_embeddings: the output projection is the embedding table.
      qkv_bias, o_bias, mlp_bias: biases of the attention input, attention output and MLP projections.
      qk_norm: RMSNorm over head_dim on q and k before RoPE (Qwen3).
      rope: rotary position embedding.
      max_position_embeddings: longest sequence the model was made for, in tokens.
      eos_token_ids: ids that end an answer; may be empty.
      bos_token_id: id that starts a text, if the model has one.
      hidden_act: activation of the gated MLP; only "silu".
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    max_position_embeddings: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    hidden_act: str = "silu"

    def __post_init__(self) -> None:
        _require_supported_architecture(self.architecture)
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.type == "int":
                _require_size(entry.name, value)
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim must be even for rotary embeddings, got {self.head_dim}.")
        if self.hidden_act != "silu":
            raise UnsupportedModelError(f'hidden_act must be "silu", got {self.hidden_act!r}.')

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Parses the dictionary of a Hugging Face `config.json`, as transformers 4 or 5 writes it.

        Raises:
          UnsupportedModelError: for an architecture or an option that is not supported, or a missing size.
        """
        architecture = config.get("model_type", "")
        _require_supported_architecture(architecture)
        _require_causal_lm(config)
        # A missing key takes transformers' default; an explicit null means "none", or "derive it" for the sizes.
        given = {key: value for key, value in {**_DEFAULTS[architecture], **config}.items() if value is not None}
        _refuse_quantized(given)
        _refuse_sliding_window(architecture, given)
        if not _flag(given, "is_causal", True):
            raise UnsupportedModelError("is_causal must be true: attention in both directions is not supported.")

        layers = _size(given, "num_hidden_layers")
        heads = _size(given, "num_attention_heads")
        kv_heads = _size(given, "num_key_value_heads") if "num_key_value_heads" in given else heads
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {heads} and {kv_heads}."
            )
        hidden = _size(given, "hidden_size")
        if "head_dim" not in given and hidden % heads:
            raise UnsupportedModelError(
                f"hidden_size must be a multiple of num_attention_heads where head_dim is not given, got {hidden} and "
                f"{heads}."
            )
        max_positions = _size(given, "max_position_embeddings")
        attention_bias = _flag(given, "attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=_size(given, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(given, "intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=given.get("head_dim", hidden // heads),
            rms_norm_eps=_positive(given, "rms_norm_eps", 1e-6),
            tie_embeddings=_flag(given, "tie_word_embeddings"),
            qkv_bias=True if architecture == "qwen2" else attention_bias,
            o_bias=False if architecture == "qwen2" else attention_bias,
            mlp_bias=architecture == "llama" and _flag(given, "mlp_bias"),
            qk_norm=architecture == "qwen3",
            rope=_parse_rope(given, max_positions),
            max_position_embeddings=max_positions,
            eos_token_ids=token_ids(given, "eos_token_id"),
            bos_token_id=next(iter(token_ids(given, "bos_token_id")), None),
            hidden_act=_activation(given.get("hidden_act", "silu")),
        )

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` dictionary of this model, in the form transformers 5 writes; `from_hf` inverts it.

        Raises:
          UnsupportedModelError: if the biases or norms are none that the architecture can have.
        """
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self.architecture]],
            "model_type": self.architecture,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "hidden_act": self.hidden_act,
            "max_position_embeddings": self.max_position_embeddings,
            "rope_parameters": self.rope.to_hf(),
            "rope_theta": self.rope.theta,  # transformers 4 reads it here
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None,
        }
        if self.architecture != "qwen2":
            config["attention_bias"] = self.qkv_bias
        if self.architecture == "llama":
            config["mlp_bias"] = self.mlp_bias
        if ModelConfig.from_hf(config) != self:
            raise UnsupportedModelError(
                f"No {ARCHITECTURES[self.architecture]} has qkv_bias={self.qkv_bias}, o_bias={self.o_bias}, "
                f"mlp_bias={self.mlp_bias}, qk_norm={self.qk_norm}."
            )
        return config


def _require_supported_architecture(architecture: Any) -> None:
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model_type {architecture!r} is not supported. Supported: "
            + ", ".join(f"{name} ({cls})" for name, cls in ARCHITECTURES.items())
            + "."
        )


def _require_causal_lm(config: Mapping[str, Any]) -> None:
    expected = ARCHITECTURES[config["model_type"]]
    names = config.get("architectures") or [expected]
    names = [str(name) for name in names] if isinstance(names, list | tuple) else [str(names)]
    if expected.lower() not in [name.lower() for name in names]:
        raise UnsupportedModelError(
            f"architectures of a {config['model_type']} model must name {expected}, got {', '.join(names)}."
        )


def _refuse_quantized(config: Mapping[str, Any]) -> None:
    # compressed-tensors wrote the second name in its first versions.
    for name in ("quantization_config", "compression_config"):
        if name not in config:
            continue
        how = config[name]
        method = how.get("quant_method", "unknown") if isinstance(how, Mapping) else how
        raise UnsupportedModelError(
            f"The checkpoint is quantized (quant_method {method!r}); only float32, bfloat16 and float16 weights load."
        )


def _refuse_sliding_window(architecture: str, config: Mapping[str, Any]) -> None:
    """Raises if any layer would attend to a window only. A window that is switched off, as in Qwen2.5, is fine."""
    layer_types = config.get("layer_types")
    window = config.get("sliding_window")
    if layer_types is not None:
        layers = _size(config, "num_hidden_layers")
        if not isinstance(layer_types, list | tuple) or len(layer_types) != layers:
            raise UnsupportedModelError(
                f"layer_types must name the type of each of {layers} layers, got {layer_types!r}."
            )
        other = sorted({str(kind) for kind in layer_types} - {"full_attention"})
        if other:
            raise UnsupportedModelError(
                f"layer_types must all be full_attention, got also {', '.join(other)}: sliding-window and other "
                "restricted layers are not supported."
            )
        return
    if architecture == "llama":
        in_use = _flag(config, "use_sliding_window", True)
    else:
        # Qwen configs have a window that use_sliding_window switches on, for the layers from max_window_layers on.
        first = config.get("max_window_layers", 28)
        in_use = _flag(config, "use_sliding_window")
        if in_use and (isinstance(first, bool) or not isinstance(first, int)):
            raise UnsupportedModelError(f"max_window_layers must be a whole number, got {first!r}.")
        in_use = in_use and first < _size(config, "num_hidden_layers")
    if in_use and window is not None:
        raise UnsupportedModelError(
            f"The config uses a sliding window of {window} tokens; sliding-window attention is not supported. "
            "Models with use_sliding_window false run."
        )


def _parse_rope(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # transformers 5 writes rope_parameters, 4 wrote rope_scaling with rope_theta beside it.
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise UnsupportedModelError(f"RoPE parameters must be a dictionary, got {parameters!r}.")
    parameters = dict(parameters)
    if any(isinstance(value, Mapping) for value in parameters.values()):
        raise UnsupportedModelError("RoPE parameters that differ by layer type are not supported; give one flat set.")
    partial = parameters.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor must be 1 (RoPE over the whole head), got {partial!r}.")
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if "original_max_position_embeddings" in config:
        parameters["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    try:
        return RopeConfig.from_hf(parameters, max_positions)
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from None


def _size(config: Mapping[str, Any], name: str) -> int:
    if name not in config:
        raise UnsupportedModelError(f"The model's config.json does not give {name}.")
    _require_size(name, config[name])
    return config[name]


def _require_size(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnsupportedModelError(f"{name} must be a positive whole number, got {value!r}.")


def _flag(config: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise UnsupportedModelError(f"{name} must be true or false, got {value!r}.")
    return value


def _positive(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"{name} must be a positive number, got {value!r}.")
    return float(value)


def token_ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The ids under a key that holds one, a list or nothing.

    Raises:
      UnsupportedModelError: it holds something else.
    """
    value = config.get(name)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise UnsupportedModelError(f"{name} must be a token id or a list of them, got {value!r}.")
    return ids


def _activation(name: str) -> str:
    return "silu" if name == "swish" else name  # two names of one function
