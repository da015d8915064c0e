"""Static shapes a step may have. Every batch is padded to one of them, so the set of compiled programs is known."""

from __future__ import annotations

SMALLEST_PREFILL = 64
SMALLEST_MIXED_LANES = 32
SMALLEST_SLOTS = 256


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


def prefill_buckets(max_num_batched_tokens: int, *, also: int | None = None) -> tuple[int, ...]:
    """Packed token counts of prefill steps: a factor of four apart, for each costs a compilation of the whole model.

    also: a size that is common, and so must not be padded.
    """
    every = powers_of_two(max_num_batched_tokens, smallest=min(SMALLEST_PREFILL, max_num_batched_tokens))
    sizes = {size for i, size in enumerate(every) if (len(every) - 1 - i) % 2 == 0}
    return tuple(sorted(sizes if also is None else sizes | {also}))


def mixed_lanes(max_num_seqs: int) -> tuple[int, ...]:
    """Decode lanes of steps that prefill as well: all, and an eighth of them where that is not few.

    Idle lanes add no token to the model's work, only a row of logits to sample from: two sizes are enough.
    """
    few = max_num_seqs // 8
    return (few, max_num_seqs) if few >= SMALLEST_MIXED_LANES else (max_num_seqs,)


def mixed_shapes(max_mixed_tokens: int, max_num_seqs: int) -> tuple[tuple[int, int], ...]:
    """All (packed tokens, decode lanes) of steps that prefill and decode."""
    sizes, lanes = prefill_buckets(max_mixed_tokens), mixed_lanes(max_num_seqs)
    return tuple(dict.fromkeys((size, min(size, each)) for size in sizes for each in lanes))


def mixed_shape(
    num_prompt_tokens: int, num_decodes: int, shapes: tuple[tuple[int, int], ...]
) -> tuple[int, int] | None:
    """The shape of `mixed_shapes` for a step, or None if it had better be two programs.

    Decodes ride in the padding of the bucket that the prompt tokens need anyhow, where they cost their attention and
    nothing else. A larger bucket for their sake could cost more than a decode step of their own.
    """
    size = next((size for size, _ in shapes if num_prompt_tokens <= size), 0)
    if num_prompt_tokens + num_decodes > size:
        return None
    return size, bucket(num_decodes, tuple(lanes for each, lanes in shapes if each == size))


def prompt_room(max_mixed_tokens: int, num_decodes: int) -> int:
    """Prompt tokens that a step may compute beside so many decodes.

    Decodes count against the limit, so that they fit into the largest bucket, but never take more than half of it: a
    prefill always gets on.
    """
    return max(max_mixed_tokens - num_decodes, -(-max_mixed_tokens // 2))


def bucket(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest bucket that holds `size`."""
    for candidate in buckets:
        if size <= candidate:
            return candidate
    raise ValueError(f"size {size} is larger than the largest bucket {buckets[-1]}")


def slot_buckets(most: int) -> tuple[int, ...]:
    """Bounds on the slots of a row in programs that evict: each costs a compilation, but none of the model."""
    return powers_of_two(most, smallest=min(SMALLEST_SLOTS, most))


def compress_rows(number: int, most: int) -> int:
    """Rows of a call of the compression program: one, or as many as there can be."""
    return 1 if number == 1 else most
