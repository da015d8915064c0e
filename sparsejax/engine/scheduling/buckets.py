"""Static shapes a step may have. Every batch is padded to one of them, so the set of compiled programs is known."""

from __future__ import annotations

SMALLEST_PREFILL = 64
SMALLEST_MIXED_LANES = 32
SMALLEST_SLOTS = 256
FREE_TOKENS = 160  # so many take as long as reading the weights
STEP_COST = 20  # of a step beside, as so many tokens


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


def mixed_buckets(max_mixed_tokens: int) -> tuple[int, ...]:
    """Packed token counts of steps that prefill and decode: the largest three a factor of two apart, the others four.

    While requests come and go, most steps are of these sizes, and padding is what they waste.
    """
    every = powers_of_two(max_mixed_tokens, smallest=min(SMALLEST_PREFILL, max_mixed_tokens))
    return tuple(size for i, size in enumerate(every) if (above := len(every) - 1 - i) < 3 or above % 2 == 0)


def mixed_lanes(max_num_seqs: int) -> tuple[int, ...]:
    """Decode lanes of steps that prefill as well: all, and an eighth of them where that is not few.

    Idle lanes add no token to the model's work, only a row of logits to sample from: two sizes are enough.
    """
    few = max_num_seqs // 8
    return (few, max_num_seqs) if few >= SMALLEST_MIXED_LANES else (max_num_seqs,)


def mixed_shapes(max_mixed_tokens: int, max_num_seqs: int) -> tuple[tuple[int, int], ...]:
    """All (packed tokens, decode lanes) of steps that prefill and decode."""
    sizes, lanes = mixed_buckets(max_mixed_tokens), mixed_lanes(max_num_seqs)
    return tuple(dict.fromkeys((size, min(size, each)) for size in sizes for each in lanes))


def mixed_shape(
    num_prompt_tokens: int, num_decodes: int, shapes: tuple[tuple[int, int], ...], prefill_sizes: tuple[int, ...]
) -> tuple[int, int] | None:
    """The shape of `mixed_shapes` for a step, or None if it had better be two programs.

    Decodes that ride in the padding of the bucket that the prompt tokens need anyhow cost their attention and nothing
    else. A larger bucket for their sake may cost more than a decode step of their own.

    Args:
      prefill_sizes: buckets of the step that would compute the prompt tokens alone.
    """
    total = num_prompt_tokens + num_decodes
    size = next((size for size, _ in shapes if total <= size), None)
    if size is None or _cost(size) > _cost(bucket(num_prompt_tokens, prefill_sizes)) + _cost(num_decodes):
        return None
    return size, bucket(num_decodes, tuple(lanes for each, lanes in shapes if each == size))


def prompt_room(max_mixed_tokens: int, num_decodes: int) -> int:
    """Prompt tokens that a step may compute beside so many decodes.

    Decodes count against the limit, so that they fit into the largest bucket, but never take more than half of it: a
    prefill always gets on.
    """
    return max(max_mixed_tokens - num_decodes, -(-max_mixed_tokens // 2))


def trim(num_prompt_tokens: int, num_decodes: int, sizes: tuple[int, ...]) -> int:
    """Prompt tokens to compute in a step that has so many: fewer, where padding would cost more than one step more.

    Where more than a quarter of a bucket would be padding, the next smaller one is filled, and the rest goes into the
    next steps, if all together take less time than the one and the decode step behind it. So a prompt alone never waits
    longer for its first token. A step whose bucket is full is always a mixed one.

    Args:
      sizes: buckets of such steps.
    """
    total = num_prompt_tokens + num_decodes
    smaller = [size for size in sizes if size < total]
    if not smaller or total > sizes[-1]:
        return num_prompt_tokens
    size, now = bucket(total, sizes), smaller[-1] - num_decodes
    if 4 * (size - total) <= size or now <= 0:
        return num_prompt_tokens
    if num_decodes == 0:
        return now if _cost(smaller[-1]) + _cost_alone(total - now, sizes) < _cost(size) else num_prompt_tokens
    rest = bucket(total - now, sizes)  # the decodes need it again
    saves = _cost(smaller[-1]) + _cost(rest) < _cost(size) + _cost(num_decodes)
    return now if rest < size and saves else num_prompt_tokens


def most_trims(num_tokens: int, sizes: tuple[int, ...]) -> int:
    """Most steps that trimming adds to a prefill of so many tokens while others decode, which are included.

    Every trim leaves a rest that needs a smaller bucket, unless requests have begun to decode in between, which happens
    at most once: nobody is admitted behind a prefill that did not end.
    """
    smaller = sum(size < num_tokens for size in sizes)
    return smaller + 1 if smaller else 0


def _cost(size: int) -> int:
    """Time of a step, in that of a token where there are many."""
    return max(size, FREE_TOKENS) + STEP_COST


def _cost_alone(num_tokens: int, sizes: tuple[int, ...]) -> int:
    """Likewise, of the prefill steps that so many tokens take."""
    now = trim(num_tokens, 0, sizes)
    return _cost(bucket(now, sizes)) + (_cost_alone(num_tokens - now, sizes) if now < num_tokens else 0)


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
