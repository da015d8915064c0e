"""Which Hugging Face tensors make which parameter, for Llama, Qwen2 and Qwen3.

Hugging Face stores linear weights [out, in] and keeps q, k, v and gate, up apart; here kernels are [in, out] and both
sets are fused along the output. Every parameter is made of its own sources only, so a checkpoint moves group by group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsejax.models import ModelConfig

# A buffer that older exports carry beside the weights; the config says the same.
_HARMLESS_SUFFIX = ".rotary_emb.inv_freq"
EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor: its name and shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One leaf of the parameter tree.

    Attributes:
      path: keys from the root of the tree.
      sources: the tensors it is made of, concatenated along their first (output) axis.
      transpose: whether the result is then transposed, as kernels are.
    """

    path: tuple[str, ...]
    sources: tuple[Source, ...]
    transpose: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the leaf."""
        rows = sum(source.shape[0] for source in self.sources)
        shape = (rows, *self.sources[0].shape[1:])
        return shape[::-1] if self.transpose else shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Parameters that are read, converted and written together: one layer, or one of the large tables."""

    name: str
    parameters: tuple[Parameter, ...]


def parameter_groups(config: ModelConfig) -> list[Group]:
    """All parameters of a model in the order they are moved: embed, layers_0 .. layers_{L-1}, final_norm, lm_head."""
    d, vocab = config.hidden_size, config.vocab_size
    groups = [_single("embed", Source(EMBEDDING, (vocab, d)))]
    groups += [_layer(config, index) for index in range(config.num_layers)]
    groups.append(_single("final_norm", Source("model.norm.weight", (d,))))
    if not config.tie_embeddings:
        groups.append(_single("lm_head", Source(LM_HEAD, (vocab, d)), transpose=True))
    return groups


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Hugging Face checkpoint of this model must hold."""
    return {
        source.name: source.shape
        for group in parameter_groups(config)
        for parameter in group.parameters
        for source in parameter.sources
    }


def is_harmless(config: ModelConfig, name: str) -> bool:
    """Whether a tensor that no parameter is made of may be left aside: old buffers, a tied model's copy of a head."""
    return name.endswith(_HARMLESS_SUFFIX) or (config.tie_embeddings and name == LM_HEAD)


def fuse(parameter: Parameter, read: Callable[[str], Iterable[np.ndarray]], dtype: Any) -> np.ndarray:
    """The leaf made of its sources, cast to dtype, on the host.

    Args:
      read: yields the blocks of consecutive rows of a named tensor, so that no source is ever held whole.
    """
    out = np.empty(parameter.shape, dtype)
    target = out.T if parameter.transpose else out
    row = 0
    for source in parameter.sources:
        for block in read(source.name):
            target[row : row + block.shape[0]] = block
            row += block.shape[0]
    return out


def split(parameter: Parameter, array: np.ndarray) -> dict[str, np.ndarray]:
    """Undoes `fuse`: the Hugging Face tensors of a leaf, contiguous."""
    rows = array.T if parameter.transpose else array
    ends = np.cumsum([source.shape[0] for source in parameter.sources])[:-1]
    pieces = np.split(rows, ends)
    return {source.name: np.ascontiguousarray(piece) for source, piece in zip(parameter.sources, pieces, strict=True)}


def tree_of(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """A nested dictionary from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _single(name: str, source: Source, *, transpose: bool = False) -> Group:
    return Group(name, (Parameter((name,), (source,), transpose),))


def _layer(config: ModelConfig, index: int) -> Group:
    name, prefix = f"layers_{index}", f"model.layers.{index}."
    d, ffn, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * head, config.num_kv_heads * head

    def linear(key: str, outputs: Mapping[str, int], inputs: int, bias: bool) -> Iterator[Parameter]:
        weights = tuple(Source(f"{prefix}{module}.weight", (size, inputs)) for module, size in outputs.items())
        yield Parameter((name, key, "kernel"), weights, transpose=True)
        if bias:
            biases = tuple(Source(f"{prefix}{module}.bias", (size,)) for module, size in outputs.items())
            yield Parameter((name, key, "bias"), biases)

    def norm(key: str, module: str, size: int) -> Parameter:
        return Parameter((name, key), (Source(f"{prefix}{module}.weight", (size,)),))

    attention = {"self_attn.q_proj": queries, "self_attn.k_proj": keys, "self_attn.v_proj": keys}
    head_norms = [norm("q_norm", "self_attn.q_norm", head), norm("k_norm", "self_attn.k_norm", head)]
    return Group(
        name,
        (
            norm("attn_norm", "input_layernorm", d),
            *linear("qkv", attention, d, config.qkv_bias),
            *(head_norms if config.qk_norm else ()),
            *linear("o", {"self_attn.o_proj": d}, queries, config.o_bias),
            norm("mlp_norm", "post_attention_layernorm", d),
            *linear("gate_up", {"mlp.gate_proj": ffn, "mlp.up_proj": ffn}, d, config.mlp_bias),
            *linear("down", {"mlp.down_proj": d}, ffn, config.mlp_bias),
        ),
    )
