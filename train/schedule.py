"""Learning rate and curriculum of a training run, as functions of its progress in [0, 1]."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field


def learning_rate(progress: float, *, peak: float, warmup: float = 0.03, final: float = 0.02) -> float:
    """Linear warm-up to `peak`, then a cosine down to `final * peak`.

    Args:
        progress: fraction of the run that is done.
        warmup: fraction of the run spent warming up.
    """
    if progress < warmup:
        return peak * max(progress, 1e-4) / warmup
    done = min(1.0, (progress - warmup) / (1.0 - warmup))
    return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * done)))


@dataclass
class Curriculum:
    """Grows the sequence length: to the next stage when the present one is learned, or at the latest by its deadline.

    Attributes:
        lengths: sequence lengths of the stages, ascending.
        deadlines: progress at which each stage ends even if it is not learned; the last has none.
        threshold: answer accuracy at a stage's own length that counts as learned.
        review: fraction of later batches that go back to a shorter length.
        stage: the present stage.
        accuracy: running mean of the answer accuracy at the present length.
    """

    lengths: tuple[int, ...]
    deadlines: tuple[float, ...]
    threshold: float = 0.93
    review: float = 0.3
    stage: int = 0
    accuracy: float = field(default=0.0)

    def __post_init__(self) -> None:
        if len(self.deadlines) != len(self.lengths) - 1:
            raise ValueError(
                f"deadlines must have one entry fewer than lengths, got {self.deadlines} and {self.lengths}"
            )

    def observe(self, length: int, answer_accuracy: float, progress: float) -> None:
        """Takes note of one batch's result and moves to the next stage when it is time."""
        if length == self.lengths[self.stage]:
            self.accuracy += 0.05 * (answer_accuracy - self.accuracy)
        last = self.stage == len(self.lengths) - 1
        if not last and (self.accuracy > self.threshold or progress > self.deadlines[self.stage]):
            self.stage += 1
            self.accuracy = 0.0

    def pick(self, rng: random.Random) -> int:
        """Length of the next batch: mostly the present stage's."""
        if self.stage and rng.random() < self.review:
            return rng.choice(self.lengths[: self.stage])
        return self.lengths[self.stage]
