"""Options of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsejax.errors import InvalidArgumentError

MODEL_TYPES = ("e2e", "cluster_e2e", "cluster_e2e_big")
TRAIN_ON = ("both", "ce", "mse")
REMATERIALISATION = ("none", "dots", "full")
DTYPES = ("bfloat16", "float32")

_LEAST = {"batch_size": 1, "accumulation": 1, "max_steps": 0, "epochs": 1, "length": 2, "seed": 0, "keep": 1}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How a compressor is trained; what the compressor is stands in `CompressorConfig`.

    Attributes:
      model_type: "e2e" (references by position), "cluster_e2e" (nearest centers), or "cluster_e2e_big" (the same,
        layers rematerialised by default so that long sequences of large models fit).
      train_on: what gives gradients: "both" losses, the next-token cross-entropy alone ("ce"), or the reconstruction
        error alone ("mse"). Both are reported whichever it is.
      rematerialisation: what the backward pass computes again: "none", "full" (each layer from its input; the result of
        the reference search is kept), "dots" (all but the matrix products); None: "full" for cluster_e2e_big, else
        "none".
      learning_rate: peak of AdamW's rate: linear warm-up, then linearly to 0 at the end of the run.
      warmup_ratio: fraction of the run that is warm-up.
      beta1, beta2, epsilon, weight_decay: of AdamW.
      clip: largest global norm of a gradient.
      batch_size: sequences a device takes at once.
      accumulation: batches whose gradients make one step.
      max_steps: steps of the run; None: as many as `epochs` passes over the data need; 0: none, the compressor is what
        it starts as.
      epochs: see max_steps.
      length: tokens of a sequence to use; None: all that the data has.
      document_masks: keep attention and loss within a document of a packed sequence.
      dtype: of the computation; parameters being trained and the optimizer's state are float32.
      seed: of the initial weights and the order of the data.
      log_every: steps between lines of the metrics.
      save_every: steps between checkpoints; below 1, a fraction of the run.
      keep: checkpoints kept, the newest.
    """

    model_type: str = "cluster_e2e_big"
    train_on: str = "both"
    rematerialisation: str | None = None
    learning_rate: float = 2e-4
    warmup_ratio: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    batch_size: int = 1
    accumulation: int = 1
    max_steps: int | None = None
    epochs: int = 1
    length: int | None = None
    document_masks: bool = False
    dtype: str = "bfloat16"
    seed: int = 42
    log_every: int = 10
    save_every: float = 0.2
    keep: int = 5

    def __post_init__(self) -> None:
        choices = {
            "model_type": MODEL_TYPES,
            "train_on": TRAIN_ON,
            "rematerialisation": (None, *REMATERIALISATION),
            "dtype": DTYPES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                known = ", ".join(str(value) for value in allowed if value is not None)
                raise InvalidArgumentError(f"{name} must be one of {known}; got {getattr(self, name)!r}.")
        for name, least in {**_LEAST, "log_every": 1}.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise InvalidArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        for name in ("learning_rate", "clip", "save_every", "epsilon"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise InvalidArgumentError(f"{name} must be positive, got {getattr(self, name)!r}.")
        for name in ("warmup_ratio", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} must be at least 0 and below 1, got {getattr(self, name)!r}.")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise InvalidArgumentError(f"weight_decay must be finite and not negative, got {self.weight_decay!r}.")

    @property
    def recompute(self) -> str:
        """`rematerialisation` with its default filled in."""
        return self.rematerialisation or ("full" if self.model_type == "cluster_e2e_big" else "none")

    def save_interval(self, steps: int) -> int:
        """Steps between checkpoints of a run of `steps`."""
        return max(1, round(self.save_every * steps) if self.save_every < 1 else round(self.save_every))


# What may differ between a run and its resumption without changing what is computed.
RESUMABLE = ("log_every", "save_every", "keep")
