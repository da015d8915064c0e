"""Floating-point operations that one training step needs, whatever a program may compute beyond that.

A product of [m, k] and [k, n] counts 2 m k n. Causal attention counts the half of the scores that is used. A backward
pass counts what it must give: gradients of activations everywhere, of weights for the compressor only. What is computed
again (rematerialisation), the one-hot product that stands for the gather of references, and elementwise work count
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsejax.compressor import CompressorConfig, abstract_params, center_count
from sparsejax.models import ModelConfig


@dataclass(frozen=True)
class StepFlops:
    """Of one sequence of a step: the pass that teaches, the pass that is taught, its backward, and the compressor.

    Attributes:
      teacher: forward of the frozen layers, the last one up to its keys and values.
      student: forward of the frozen layers and the output projection.
      backward: gradients of the student's activations.
      compressor: both projections (down twice: token and reference), forward and backward.
      search: scores of the reference search.
    """

    teacher: float
    student: float
    backward: float
    compressor: float
    search: float

    @property
    def total(self) -> float:
        """All together."""
        return self.teacher + self.student + self.backward + self.compressor + self.search


def step_flops(model: ModelConfig, compressor: CompressorConfig, length: int) -> StepFlops:
    """Operations of one sequence of `length` tokens through one training step."""
    d, layers = model.hidden_size, model.num_layers
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    qkv, rest = d * (queries + 2 * keys), d * queries + 3 * d * model.intermediate_size
    linear = 2.0 * length * (qkv + rest)
    # Two products over the lower triangle.
    attention = 2.0 * length * length * queries
    head = 2.0 * length * d * model.vocab_size
    teacher = (layers - 1) * (linear + attention) + 2.0 * length * 2 * d * keys
    student = layers * (linear + attention) + head
    # Four products of attention's backward; the first layer's input takes no gradient.
    backward = layers * (linear + 2 * attention) + head - 2.0 * length * qkv
    return StepFlops(teacher, student, backward, _compressor(compressor, length), _search(compressor, length))


def _compressor(config: CompressorConfig, length: int) -> float:
    tree = abstract_params(config)["layers_0"]
    sizes = {"down": 0, "up": 0}
    for name, projection in tree.items():
        direction = name.removeprefix("k_").removeprefix("v_")
        sizes[direction] += sum(layer["kernel"].shape[0] * layer["kernel"].shape[1] for layer in projection.values())
    has_reference = config.references == "cluster" or config.chunk_size > 1
    forward = 2.0 * length * ((2 if has_reference else 1) * sizes["down"] + sizes["up"])
    return 3 * config.num_layers * forward


def _search(config: CompressorConfig, length: int) -> float:
    if config.references != "cluster":
        return 0.0
    features = config.kv_dim if config.cluster_on_kv else config.kv_dim // 2
    centers = center_count(length, sinks=config.sink_tokens, step=config.step)
    # Half of the centers lie before a token.
    return config.num_layers * float(length) * centers * features
