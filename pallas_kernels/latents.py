"""Latents of DeltaKV in pages: the compressed tokens of one layer, and the centers that each is a difference from.

The latent pool has one vector a token and layer, of bfloat16 or float32 numbers, or of 4-bit codes: symmetric, one
scale for 32 numbers, so 0.5 + 1/16 bytes a number. A page holds `page` tokens of one layer of one request. The pool has
a table of its own, shared by the layers; `PageAddress(0, Ls, layer, 1)` is the address of layer `layer` of Ls. Logical
slots are latent ordinals (`pallas_kernels.centers`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_float, check_integer, check_shape
from pallas_kernels.paging import PageAddress

GROUP = 32
"""Numbers that share a scale in 4-bit latents."""

PER_CODE = 4
"""Numbers in one uint16 of codes. Not bytes: Pallas-Triton addresses pools of 2 to 4 GiB of them with 32 bits."""

_LARGEST = 7  # of a 4-bit code: -7 .. 7, stored as 1 .. 15


class LatentPages(NamedTuple):
    """The latent pool; a pytree, so it can be donated and returned.

    Attributes:
      values: bf16 or f32 [P, page, d]; or 4-bit codes uint16[P, page, d / 4]: the bits 4i .. 4i+3 of word j hold number
        `i * d / 4 + j` of the vector.
      scale: bf16[P, page, d / 32] with codes, else None.
      reference: uint16 or int32 [P, page, K], center ordinals.
    """

    values: jax.Array
    scale: jax.Array | None
    reference: jax.Array

    @property
    def size(self) -> int:
        """d, numbers of a latent."""
        return self.values.shape[2] * (1 if self.scale is None else PER_CODE)


def init_latents(
    num_pages: int, page_size: int, *, size: int, neighbors: int, max_centers: int, dtype: str = "bfloat16"
) -> LatentPages:
    """An empty pool of `num_pages` pages (those of the null entry included).

    Args:
      size: d.
      neighbors: K, references of a token.
      max_centers: most centers that a row can have; up to 65,536 are numbered in 16 bits.
      dtype: "bfloat16", "float32" or "int4".

    Raises:
      ValueError: an unknown dtype, or 4 bits and a size that is no multiple of 32.
    """
    reference = jnp.zeros((num_pages, page_size, neighbors), jnp.uint16 if max_centers <= 1 << 16 else jnp.int32)
    if dtype == "int4":
        _check_groups(size)
        return LatentPages(
            jnp.zeros((num_pages, page_size, size // PER_CODE), jnp.uint16),
            jnp.zeros((num_pages, page_size, size // GROUP), jnp.bfloat16),
            reference,
        )
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be 'bfloat16', 'float32' or 'int4', got {dtype!r}")
    return LatentPages(jnp.zeros((num_pages, page_size, size), jnp.dtype(dtype)), None, reference)


def check_latents(latents: LatentPages) -> None:
    """Raises unless the arrays of the pool agree with each other."""
    values, scale, reference = latents
    check_shape("latents.values", values, (None, None, None))
    check_shape("latents.reference", reference, (*values.shape[:2], None))
    if reference.dtype not in (jnp.uint16, jnp.int32):
        raise TypeError(f"latents.reference must be uint16 or int32, got {reference.dtype}")
    if scale is None:
        check_float(**{"latents.values without a scale": values})
        return
    if values.dtype != jnp.uint16:
        raise TypeError(f"latents.values with a scale are 4-bit codes in uint16, got {values.dtype}")
    _check_groups(latents.size)
    check_shape("latents.scale", scale, (*values.shape[:2], latents.size // GROUP))


def quantise(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """4-bit codes of vectors: round to nearest, one scale for 32 numbers, the largest of which becomes 7 or -7.

    Args:
      z: [..., d], d a multiple of 32.

    Returns:
      (codes uint16[..., d / 4], scale bf16[..., d / 32]). A group of zeros has scale 0 and stays zero.
    """
    size = z.shape[-1]
    _check_groups(size)
    groups = z.astype(jnp.float32).reshape(*z.shape[:-1], size // GROUP, GROUP)
    scale = (jnp.abs(groups).max(axis=-1) / _LARGEST).astype(jnp.bfloat16)
    # By the scale as it is stored, or its rounding would be an error of every number.
    wide = scale.astype(jnp.float32)[..., None]
    levels = jnp.where(wide > 0, jnp.round(groups / jnp.where(wide > 0, wide, 1.0)), 0.0)
    nibbles = (jnp.clip(levels, -_LARGEST, _LARGEST) + _LARGEST + 1).astype(jnp.uint16)
    nibbles = nibbles.reshape(*z.shape[:-1], PER_CODE, size // PER_CODE)
    shift = (4 * jnp.arange(PER_CODE, dtype=jnp.uint16))[:, None]
    # The bits do not overlap, so the sum is their union.
    return (nibbles << shift).sum(axis=-2, dtype=jnp.uint16), scale


def dequantise(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """f32[..., d]: the numbers that codes uint16[..., d / 4] and scale [..., d / 32] stand for."""
    shift = (4 * jnp.arange(PER_CODE, dtype=jnp.int32))[:, None]
    nibbles = (codes.astype(jnp.int32)[..., None, :] >> shift) & 15  # [..., 4, d / 4]
    levels = (nibbles - (_LARGEST + 1)).astype(jnp.float32).reshape(*codes.shape[:-1], -1)
    return levels * jnp.repeat(scale.astype(jnp.float32), GROUP, axis=-1)


def store_latents(
    latents: LatentPages, z: jax.Array, reference: jax.Array, entry: jax.Array, slot: jax.Array, *, address: PageAddress
) -> LatentPages:
    """Stores the latents of one layer's tokens, in place when the pool is donated; quantised if the pool holds codes.

    An XLA scatter on every backend: N rows of a kilobyte are no work.

    Args:
      z: [N, d].
      reference: i32[N, K] center ordinals, as `reference_search` returns them.
      entry: i32[N] table entry of each token; 0, the null entry, drops the token.
      slot: i32[N] place inside the page. Live (entry, slot) pairs must be distinct.
      address: of the layer in the latent pool.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit.
    """
    check_latents(latents)
    check_shape("z", z, (None, latents.size))
    tokens = z.shape[0]
    check_shape("reference", reference, (tokens, latents.reference.shape[2]))
    check_shape("entry", entry, (tokens,))
    check_shape("slot", slot, (tokens,))
    check_integer(reference=reference, entry=entry, slot=slot)
    # Dropped tokens go past the pool, each to another page, so that the indices are unique as promised.
    beyond = latents.values.shape[0] + jnp.arange(tokens, dtype=jnp.int32)
    page = jnp.where(entry == 0, beyond, address.page(entry, 0))
    if latents.scale is None:
        new = LatentPages(z.astype(latents.values.dtype), None, reference.astype(latents.reference.dtype))
    else:
        new = LatentPages(*quantise(z), reference.astype(latents.reference.dtype))
    return jax.tree.map(
        lambda pool, part: pool.at[page, slot].set(part, mode="drop", unique_indices=True), latents, new
    )


def _check_groups(size: int) -> None:
    if size % GROUP:
        raise ValueError(f"4-bit latents share a scale among {GROUP} numbers: the size must be a multiple, got {size}")
