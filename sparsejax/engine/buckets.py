"""Static shapes a step may have. Every batch is padded to one of them, so the set of compiled programs is known."""

from __future__ import annotations

SMALLEST_PREFILL = 64


def powers_of_two(largest: int, *, smallest: int = 1) -> tuple[int, ...]:
    """smallest, 2 * smallest, ... up to and including `largest` (which need not be a power of two)."""
    sizes = []
    size = smallest
    while size < largest:
        sizes.append(size)
        size *= 2
    return (*sizes, largest)


def decode_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes of decode steps."""
    return powers_of_two(max_num_seqs)


def prefill_buckets(max_num_batched_tokens: int) -> tuple[int, ...]:
    """Packed token counts of prefill steps: a factor of four apart, for each costs a compilation of the whole model."""
    every = powers_of_two(max_num_batched_tokens, smallest=min(SMALLEST_PREFILL, max_num_batched_tokens))
    return tuple(size for i, size in enumerate(every) if (len(every) - 1 - i) % 2 == 0)


def bucket(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`."""
    for candidate in buckets:
        if size <= candidate:
            return candidate
    raise ValueError(f"size {size} is larger than the largest bucket {buckets[-1]}")
