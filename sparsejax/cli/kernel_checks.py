"""Small random cases of the kernels of dense attention against their plain references, for `sparsejax doctor`."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from pallas_kernels.paging import PageAddress

ROWS, ENTRIES, HEADS, GROUP, DIM, PAGE = 3, 4, 2, 4, 64, 16
LENGTHS = (0, 37, 64)  # of the null row and two requests: one ends inside a page, one fills its pages
ADDRESS = PageAddress(table_layer=0, entry_stride=HEADS, layer_offset=0, head_stride=1)


def _dtype() -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32)


def draw(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Normal numbers, in the dtype that the engine computes in here."""
    return jnp.asarray(rng.standard_normal(shape), _dtype())


def paged(rng: np.random.Generator):
    """Random pools and a shared table whose pages lie in random order: k, v, table, lengths."""
    used = (ROWS - 1) * ENTRIES
    table = np.zeros((1, ROWS, 1, ENTRIES), np.int32)
    table[0, 1:, 0] = 1 + rng.permutation(used).reshape(ROWS - 1, ENTRIES)
    pages = ((1 + used) * HEADS, PAGE, DIM)
    return draw(rng, *pages), draw(rng, *pages), jnp.asarray(table), jnp.asarray(LENGTHS, jnp.int32)[None, :, None]


def error(got, expected) -> float:
    """The largest difference between two trees of arrays; NaN if there is one."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    wide = [(np.asarray(a, np.float32), np.asarray(b, np.float32)) for a, b in pairs]
    # Infinities that are equal differ by nothing.
    return float(np.max([np.abs(np.subtract(a, b, out=np.zeros_like(a), where=a != b)).max() for a, b in wide]))


def _decode_attention() -> float:
    rng = np.random.default_rng(0)
    k, v, table, lengths = paged(rng)
    args = (draw(rng, ROWS, HEADS * GROUP, DIM), k, v, table, lengths, jnp.arange(ROWS, dtype=jnp.int32))
    options = {"address": ADDRESS, "num_kv_heads": HEADS, "scale": DIM**-0.5}
    return error(kernels.decode_attention(*args, **options), kernels.decode_attention_reference(*args, **options)[0])


def _prefill_attention() -> float:
    rng = np.random.default_rng(1)
    k, v, table, history = paged(rng)
    tokens = 48
    new = (draw(rng, tokens, HEADS * GROUP, DIM), draw(rng, tokens, HEADS, DIM), draw(rng, tokens, HEADS, DIM))
    args = (*new, k, v, table, history, jnp.asarray([1, 2], jnp.int32), jnp.asarray([0, 19, 45], jnp.int32))
    options = {"address": ADDRESS, "scale": DIM**-0.5}
    return error(kernels.prefill_attention(*args, **options), kernels.prefill_attention_reference(*args, **options)[0])


def _store_kv() -> float:
    rng = np.random.default_rng(2)
    k, v, _, _ = paged(rng)
    new = (draw(rng, 3, HEADS, DIM), draw(rng, 3, HEADS, DIM))
    entry, slot = (jnp.asarray(x, jnp.int32)[None, :, None] for x in ([2, 0, 5], [1, 0, 15]))
    args = (k, v, *new, entry, slot)
    return error(kernels.store_kv(*args, address=ADDRESS), kernels.store_kv_reference(*args, address=ADDRESS))


def _rotate_and_store() -> float:
    rng = np.random.default_rng(4)
    k, v, _, _ = paged(rng)
    angle = jnp.asarray(rng.standard_normal((3, DIM // 2)), jnp.float32)
    entry, slot = (jnp.asarray(x, jnp.int32)[None, :, None] for x in ([2, 0, 5], [1, 0, 15]))
    args = (k, v, draw(rng, 3, HEADS * (GROUP + 2), DIM), jnp.cos(angle), jnp.sin(angle), entry, slot)
    options = {"num_kv_heads": HEADS, "address": ADDRESS}
    return error(kernels.rotate_and_store(*args, **options), kernels.rotate_and_store_reference(*args, **options))


def _move_slots() -> float:
    rng = np.random.default_rng(3)
    k, v, _, _ = paged(rng)
    moves = jnp.asarray([40, 41, 70], jnp.int32), jnp.asarray([20, 3, k.shape[0] * PAGE], jnp.int32)
    return error(kernels.move_slots(k, v, *moves), kernels.move_slots_reference(k, v, *moves))


def _gated_linear() -> float:
    rng = np.random.default_rng(20)
    args = (draw(rng, 256, 128), draw(rng, 128, 4352) / 48)  # as many tiles as the kernel is used for
    return error(kernels.gated_linear(*args), kernels.gated_linear_reference(*args))


def _add_linear() -> float:
    rng = np.random.default_rng(21)
    args = (draw(rng, 1024, 2304) / 4, draw(rng, 1024, 128), draw(rng, 128, 2304) / 32)
    sums = [y.astype(jnp.float32) for y in kernels.add_linear(*args) if y is not None]
    return error(sum(sums), kernels.add_linear_reference(*args))


CHECKS: dict[str, Callable[[], float]] = {
    "decode attention": _decode_attention,
    "prefill attention": _prefill_attention,
    "K/V store": _store_kv,
    "RoPE and store": _rotate_and_store,
    "slot moves": _move_slots,
    "gated product": _gated_linear,
    "product and residual": _add_linear,
}
