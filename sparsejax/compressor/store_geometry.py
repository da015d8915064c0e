"""Where the tokens of a text live in a cache that compresses: a function of their positions and its length alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsejax.compressor.geometry import center_ordinals, is_center


@dataclass(frozen=True)
class StoreGeometry:
    """Of a text of n tokens the first `history(n)` are stored as centers and latents; those behind them are recent.

    In the history, the sinks and every `step`-th token after them are centers, all others are latents. Recent tokens
    wait, as they are, to be compressed `recent` at once: `recent` to 2 * `recent` - 1 of them wait, fewer in a short
    text.

    All methods take ints or integer arrays of any kind.

    Attributes:
      sinks: first tokens, which are never compressed.
      step: distance between centers behind them.
      recent: tokens that are compressed at once, and the fewest that wait.
    """

    sinks: int
    step: int
    recent: int

    @property
    def ring(self) -> int:
        """Slots that recent tokens need: the token at position p waits in slot p % ring."""
        return 2 * self.recent

    def compressed(self, num_tokens: Any) -> Any:
        """Tokens of the history behind the sinks, centers among them, in a text of `num_tokens`."""
        blocks = (num_tokens - self.sinks) // self.recent - 1
        return self.recent * (blocks * (blocks > 0))

    def history(self, num_tokens: Any) -> Any:
        """Tokens that are not recent in a text of `num_tokens`: sinks, centers and latents."""
        missing = self.sinks - num_tokens
        return self.sinks - missing * (missing > 0) + self.compressed(num_tokens)

    def history_at_query(self, num_tokens: Any) -> Any:
        """The same while the last token of the text attends: what it makes due is compressed only behind it."""
        is_sink = num_tokens <= self.sinks
        return is_sink * num_tokens + (1 - is_sink) * self.history(num_tokens - 1)

    def centers(self, num_tokens: Any) -> Any:
        """Centers that are stored of a text of `num_tokens`."""
        return self.history(num_tokens) - self.latents(num_tokens)

    def latents(self, num_tokens: Any) -> Any:
        """Latents that are stored of a text of `num_tokens`."""
        compressed = self.compressed(num_tokens)
        return compressed + (-compressed // self.step)

    def due(self, num_tokens: Any) -> Any:
        """bool, whether the last token of a text of `num_tokens` filled the ring, so that `recent` are compressed."""
        return self.compressed(num_tokens) > self.compressed(num_tokens - 1)

    def is_center(self, positions: Any) -> Any:
        """bool, as `geometry.is_center`."""
        return is_center(positions, sinks=self.sinks, step=self.step)

    def center_ordinals(self, positions: Any) -> Any:
        """As `geometry.center_ordinals`."""
        return center_ordinals(positions, sinks=self.sinks, step=self.step)

    def latent_ordinals(self, positions: Any) -> Any:
        """Number of the latent at each position, in order; of no meaning for centers."""
        after = positions - self.sinks
        return after + (-after // self.step)
