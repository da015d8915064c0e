"""Which tokens of a DeltaKV text are centers: arithmetic on positions, the same in training, in serving and in kernels.

The sinks, positions 0 .. sinks - 1, are centers 0 .. sinks - 1. After them every `step`-th token is one: center number
sinks + j stands at position sinks + j * step. All other tokens are compressed, to latents that are numbered in the
order of their positions.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def center_count(num_tokens: Any, *, sinks: int, step: int) -> Any:
    """Centers among positions 0 .. num_tokens - 1; an int, or an integer array of them."""
    before = num_tokens < sinks
    return before * num_tokens + (1 - before) * (sinks - (sinks - num_tokens) // step)


def latent_count(num_tokens: Any, *, sinks: int, step: int) -> Any:
    """Tokens that are no centers among positions 0 .. num_tokens - 1; an int, or an integer array of them."""
    return num_tokens - center_count(num_tokens, sinks=sinks, step=step)


def center_positions(num_tokens: int, *, sinks: int, step: int) -> np.ndarray:
    """i32[M], ascending: the position of every center among the first num_tokens."""
    after = np.arange(sinks, num_tokens, step, dtype=np.int32)
    return np.concatenate([np.arange(min(num_tokens, sinks), dtype=np.int32), after])


def is_center(positions: Any, *, sinks: int, step: int) -> Any:
    """bool, whether the tokens at `positions` (an integer array of any kind and shape) are centers."""
    return (positions < sinks) | ((positions - sinks) % step == 0)


def center_ordinals(positions: Any, *, sinks: int, step: int) -> Any:
    """Number of the last center at or before each position; the center's own number if it is one."""
    after = sinks + (positions - sinks) // step
    before = positions < sinks
    return before * positions + (1 - before) * after


def latent_ordinals(positions: Any, *, sinks: int, step: int) -> Any:
    """Number of the latent of each position, if it is no center: how many tokens before it are none."""
    return positions - 1 - center_ordinals(positions, sinks=sinks, step=step)
