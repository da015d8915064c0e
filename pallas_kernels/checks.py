"""Validation of the arguments that the operations share. Shapes and dtypes are static: this costs no run time."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.paging import PageAddress

FLOAT_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def check_shape(name: str, array: jax.Array, expected: tuple[int | None, ...]) -> None:
    """Raises ValueError unless `array` has the `expected` shape; None stands for any size."""
    fits = len(array.shape) == len(expected) and all(
        want is None or got == want for got, want in zip(array.shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected ({wanted})")


def check_integer(**arrays: jax.Array) -> None:
    """Raises TypeError unless every array is int32, the one index type of this package."""
    for name, array in arrays.items():
        if array.dtype != jnp.int32:
            raise TypeError(f"{name} must be int32, got {array.dtype}")


def check_float(**arrays: jax.Array) -> None:
    """Raises TypeError unless every array is of a float dtype that the kernels take."""
    for name, array in arrays.items():
        if array.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16 or float32, got {array.dtype}")


def check_page_size(name: str, size: int) -> None:
    """Raises ValueError unless `size` is a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"{name} must be a power of two, got {size}")


def check_pool(k_pages: jax.Array, v_pages: jax.Array) -> None:
    """Raises unless the two pools are [pages, page_size, D] of one float dtype with a power-of-two page size."""
    check_shape("k_pages", k_pages, (None, None, None))
    check_shape("v_pages", v_pages, tuple(k_pages.shape))
    if k_pages.dtype != v_pages.dtype or k_pages.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"k_pages and v_pages must share one of bfloat16, float16, float32, got {k_pages.dtype} and {v_pages.dtype}"
        )
    check_page_size("the page size (axis 1 of k_pages)", k_pages.shape[1])


def check_query(q: jax.Array, tokens: int | None, dim: int) -> None:
    """Raises unless q is [T, Hq, D] with so many tokens (None: any) of `dim`, in a float dtype."""
    check_shape("q", q, (tokens, None, dim))
    check_float(q=q)


def check_scale(scale: float) -> None:
    """Raises unless `scale` is positive: dead slots are told by scores that stay the smallest when scaled."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")


def check_score(score: jax.Array, k_pages: jax.Array) -> None:
    """Raises unless `score` is f32[pages, page_size], a number for every slot of the pool."""
    check_shape("score", score, tuple(k_pages.shape[:2]))
    if score.dtype != jnp.float32:
        raise TypeError(f"score must be float32, got {score.dtype}")


def check_table(
    page_table: jax.Array, lengths: jax.Array, lengths_name: str, address: PageAddress, num_kv_heads: int
) -> None:
    """Raises unless `page_table` [Lt, R, Ht, M] and `lengths` [Lt, R, Ht] agree with each other and with `address`."""
    check_shape("page_table", page_table, (None, None, None, None))
    layers, rows, heads, columns = page_table.shape
    if columns < 1:
        raise ValueError("page_table has no columns (axis 3), so no row could hold a page")
    check_shape(lengths_name, lengths, (layers, rows, heads))
    check_integer(page_table=page_table, **{lengths_name: lengths})
    if not 0 <= address.table_layer < layers:
        raise ValueError(f"address.table_layer is {address.table_layer}, but page_table has {layers} layers")
    check_table_heads("page_table", heads, address, num_kv_heads)


def check_table_heads(name: str, heads: int, address: PageAddress, num_kv_heads: int) -> None:
    """Raises unless a table's head axis is 1 (an entry covers all KV heads) or one per KV head, as `address` says."""
    if heads not in (1, num_kv_heads):
        raise ValueError(f"the head axis of {name} must be 1 or {num_kv_heads} (the KV heads), got {heads}")
    if num_kv_heads > 1 and (heads == 1) != (address.head_stride != 0):
        raise ValueError(
            f"address.head_stride is {address.head_stride}, but the head axis of {name} has size {heads}: "
            "the stride is 0 when every head has its own table and 1 when they share one"
        )


def check_places(entry: jax.Array, slot: jax.Array, tokens: int, address: PageAddress, num_kv_heads: int) -> None:
    """Raises unless entry and slot i32[Lt, T, Ht] say where `tokens` tokens go, in the layer of `address` too."""
    check_shape("entry", entry, (None, tokens, None))
    check_shape("slot", slot, tuple(entry.shape))
    check_integer(entry=entry, slot=slot)
    check_table_heads("entry", entry.shape[2], address, num_kv_heads)
    if not 0 <= address.table_layer < entry.shape[0]:
        raise ValueError(f"address.table_layer is {address.table_layer}, but entry has {entry.shape[0]} layers")


def query_group(num_q_heads: int, num_kv_heads: int) -> int:
    """Query heads per KV head; raises ValueError when they do not divide."""
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(f"{num_q_heads} query heads are no multiple of num_kv_heads={num_kv_heads}")
    return num_q_heads // num_kv_heads
