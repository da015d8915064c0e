"""Which layers of known models should read everything, so that the others can follow their choice.

`sparsejax calibrate` finds such layers for any model. A model is recognised by its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownLayers:
    """Full-attention layers of one model.

    Attributes:
      model: its common name.
      num_layers, hidden_size, num_heads, num_kv_heads: its sizes.
      layers: which layers read everything.
      source: where the list comes from.
    """

    model: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    layers: tuple[int, ...]
    source: str


_CALIBRATED = "Sparse-vLLM, calibrated offline by overlap of top-k sets, August 2026"
_MEASURED = (
    "most exact answers of the retrieval tasks at an eighth of the tokens, among five sets of layers; by "
    "attention alone `sparsejax calibrate` chooses 0,1"
)
_PAPER = "in use with DeltaKV, arXiv:2602.08005"

# The first of a model's lists is its default.
KNOWN = (
    KnownLayers("Llama-3.1-8B", 32, 4096, 32, 8, (0, 2, 7, 13, 16, 26), _CALIBRATED),
    KnownLayers("Llama-3.1-8B", 32, 4096, 32, 8, (0, 1, 2, 8, 18), _PAPER),
    KnownLayers("Qwen2.5-7B", 28, 3584, 28, 4, (0, 2, 4, 11, 16, 22), _CALIBRATED),
    KnownLayers("Qwen2.5-7B", 28, 3584, 28, 4, (0, 1, 2, 4, 7, 14), _PAPER),
    KnownLayers("the embedded model", 6, 256, 8, 2, (0, 3), _MEASURED),
    KnownLayers("Qwen3-4B", 36, 2560, 32, 8, (0, 1, 3, 9, 13, 16, 21, 28), _CALIBRATED),
)


def known_layers(num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int) -> KnownLayers | None:
    """What is known of a model of these sizes; None if nothing is."""
    sizes = (num_layers, hidden_size, num_heads, num_kv_heads)
    for known in KNOWN:
        if (known.num_layers, known.hidden_size, known.num_heads, known.num_kv_heads) == sizes:
            return known
    return None


def spread_layers(num_layers: int) -> tuple[int, ...]:
    """Layer 0 and every sixth after it, for models that nothing is known of: about as many as calibration gives."""
    return tuple(range(0, num_layers, 6))
