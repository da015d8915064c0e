"""What requests hold in the pools of a `DeltaCache`, and where their prompts are cut: arithmetic on lengths alone."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from sparsejax.cache import Entries
from sparsejax.compressor import StoreGeometry


@dataclass(frozen=True)
class StoreLimits:
    """The empty pools, and the rules of an engine that stores requests compressed.

    Attributes:
      geometry: which tokens are sinks, centers, latents and recent.
      entries: table entries of the pools.
      page_size: tokens of a page.
      cell: tokens of the cells that the prompt of a compressed request is computed in. What a token attends to is exact
        within its cell and compressed before it, so cells follow from the engine's configuration, never from the load.
    """

    geometry: StoreGeometry
    entries: Entries
    page_size: int
    cell: int

    def held(self, num_tokens: int, *, compressed: bool) -> Entries:
        """Entries of a request whose row has been given so many tokens. Never fewer for more tokens."""
        if not num_tokens:
            return Entries(0, 0, 0)
        everything = self._pages(num_tokens)
        if not compressed:
            return Entries(everything, everything, 0)
        geometry = self.geometry
        near = self._pages(geometry.centers(num_tokens)) + self._pages(geometry.ring)
        return Entries(everything, near, self._pages(geometry.latents(num_tokens)))

    def fits(self, num_tokens: int, *, compressed: bool) -> bool:
        """Whether the empty pools hold a request of so many tokens."""
        return within(self.held(num_tokens, compressed=compressed), self.entries)

    def most_tokens(self, limit: int, *, compressed: bool) -> int:
        """Most tokens, up to `limit`, of a request that the empty pools hold."""
        return bisect.bisect_left(range(1, limit + 1), True, key=lambda n: not self.fits(n, compressed=compressed))

    def chunk(self, start: int, stop: int, room: int) -> int:
        """Tokens of the next chunk of a compressed request, from `start`, of a prefill to `stop`: the rest of a cell.

        0 if there is no room for so many: a cell is never divided.
        """
        count = min(stop, (start // self.cell + 1) * self.cell) - start
        return count if count <= room else 0

    def compresses(self, start: int, count: int) -> bool:
        """Whether the `count` tokens from `start` of a compressed request make any token due."""
        return self.geometry.compressed(start + count) > self.geometry.compressed(start)

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


def within(entries: Entries, bound: Entries) -> bool:
    """Whether there are no more entries of any pool."""
    return all(each <= most for each, most in zip(entries, bound, strict=True))


def plus(entries: Entries, others: Entries) -> Entries:
    """Both together."""
    return Entries(*(one + another for one, another in zip(entries, others, strict=True)))


def minus(entries: Entries, others: Entries) -> Entries:
    """The first without the second."""
    return Entries(*(one - another for one, another in zip(entries, others, strict=True)))


def cell_size(max_mixed_tokens: int) -> int:
    """Tokens of a cell: the largest power of two for which every step has room, whoever decodes beside it."""
    return 1 << (max(max_mixed_tokens // 2, 1).bit_length() - 1)
