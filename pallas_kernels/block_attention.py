"""How much each token of a chunk is attended to by its neighbours, in both directions: the attention half of
Compactor's score (Chari and Van Durme 2025, "Compactor: calibrated query-agnostic KV cache compression").
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_float, check_integer, check_query, check_scale, check_shape, query_group
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.online_softmax import LOG2_E
from pallas_kernels.query_tiles import query_tiles
from pallas_kernels.tiles import (
    WHOLE,
    exact_dot,
    index_grid,
    kernel_exp2,
    load_vectors,
    next_power_of_two,
    vector_mask,
)


class BlockTile(NamedTuple):
    """Queries of a step, and how Triton compiles the program."""

    block_q: int
    num_warps: int
    num_stages: int


# By (bytes per element, padded head_dim).
_TILES = {
    (2, 64): BlockTile(64, 4, 2),
    (2, 128): BlockTile(64, 4, 2),
    (2, 256): BlockTile(64, 8, 2),
    (4, 64): BlockTile(32, 8, 1),
    (4, 128): BlockTile(32, 8, 1),
}
_FALLBACK_TILE = BlockTile(16, 8, 1)
_BLOCKS = (16, 32, 64, 128, 256)
_DEAD = -3e38


def block_attention_mass(
    q: jax.Array,
    k: jax.Array,
    starts: jax.Array,
    *,
    block: int = 128,
    scale: float = 1.0,
    tile: BlockTile | None = None,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Sums the attention that each key gets inside its block, without a causal mask.

    Every segment is cut into blocks of `block` tokens from its start, the last one being shorter. Each query attends to
    all keys of its block.

    Args:
      q: [T, Hq, D]; query heads h*G .. h*G+G-1 use KV head h. Used at the precision of `k`.
      k: [T, H, D].
      starts: i32[S + 1], from 0 on, not decreasing: segment s is the packed tokens starts[s] .. starts[s+1]-1.
      block: tokens of a block, a power of two from 16 to 256.
      scale: factor of the scores.
      tile: sizes of the kernel, for tuning.
      implementation, interpret: see `dispatch.resolve`.

    Returns:
      f32[T, H]: for each key the sum of its probabilities over the queries of its block and the G query heads of the
      group. So the sum over a block of n tokens is n * G. Tokens outside every segment have 0.

    Raises:
      ValueError, TypeError: arguments that do not fit.
    """
    check_shape("k", k, (None, None, None))
    tokens, heads, dim = k.shape
    check_query(q, tokens, dim)
    check_scale(scale)
    query_group(q.shape[1], heads)
    check_float(k=k)
    check_shape("starts", starts, (None,))
    check_integer(starts=starts)
    if starts.shape[0] < 1:
        raise ValueError("starts has no element, expected one more than there are segments")
    if block not in _BLOCKS:
        raise ValueError(f"block must be one of {_BLOCKS}, got {block}")
    implementation, interpret = resolve(implementation, interpret)
    if tokens == 0:
        return jnp.zeros((0, heads), jnp.float32)
    if implementation == "xla":
        return _mass_xla(q, k, starts, block=block, scale=scale)
    if tile is None:
        tile = _TILES.get((k.dtype.itemsize, max(next_power_of_two(dim), 64)), _FALLBACK_TILE)
    return _mass_triton(q.astype(k.dtype), k, starts, block=block, scale=scale, tile=tile, interpret=interpret)


def block_attention_mass_reference(q, k, starts, *, block: int = 128, scale: float = 1.0) -> jax.Array:
    """The meaning of `block_attention_mass`, one block after the other (`starts` concrete)."""
    tokens, heads, dim = k.shape
    q = q.astype(jnp.float32).reshape(tokens, heads, -1, dim)
    mass = jnp.zeros((tokens, heads), jnp.float32)
    for start, end in itertools.pairwise(starts.tolist()):
        for low in range(start, end, block):
            here = slice(low, min(low + block, end))
            with jax.default_matmul_precision("highest"):
                logits = jnp.einsum("qhgd,khd->hgqk", q[here], k[here].astype(jnp.float32)) * scale
            mass = mass.at[here].set(jax.nn.softmax(logits, axis=-1).sum(axis=(1, 2)).T)
    return mass


def _tiles(starts, tokens, block):
    return query_tiles(jnp.zeros(starts.shape[0] - 1, jnp.int32), starts, tokens, block)


@functools.partial(jax.jit, static_argnames=("block", "scale"))
def _mass_xla(q, k, starts, *, block, scale):
    """One block after the other."""
    tokens, heads, dim = k.shape

    def one_block(tile):
        token = tile.first + jnp.arange(block, dtype=jnp.int32)
        live = (token < tile.last) & (tile.key_first < tile.last)
        at = jnp.minimum(token, tokens - 1)
        queries = q[at].astype(jnp.float32).reshape(block, heads, -1, dim)
        logits = jnp.einsum("qhgd,khd->hgqk", queries, k[at].astype(jnp.float32), precision="highest") * scale
        weights = jnp.where(live[:, None], jax.nn.softmax(jnp.where(live, logits, _DEAD), axis=-1), 0.0)
        return jnp.where(live, token, tokens), weights.sum(axis=(1, 2)).T

    token, mass = jax.lax.map(one_block, _tiles(starts, tokens, block))
    return jnp.zeros((tokens, heads), jnp.float32).at[token].set(mass, mode="drop")


def _mass_kernel(
    q_ref, k_ref, first_ref, last_ref, key_first_ref, mass_ref, *, block, group, scale, block_q, exp2
):  # fmt: skip
    """One (KV head, block): all its keys against its queries, `block_q` tokens of one query head at a time."""
    h, index = pl.program_id(0), pl.program_id(1)
    first, last = first_ref[index], jnp.minimum(last_ref[index], first_ref[index] + block)
    dim = q_ref.shape[2]

    @pl.when(first < last)
    def _():
        key = first + jnp.arange(block, dtype=jnp.int32)
        live = key < last
        k = load_vectors(k_ref, key, jnp.broadcast_to(h, key.shape), live, dim=dim)

        def visit(step, mass):
            part = step // group
            query = first + part * block_q + jnp.arange(block_q, dtype=jnp.int32)
            head = h * group + step - part * group
            queries, columns = index_grid(query, jnp.arange(next_power_of_two(dim), dtype=jnp.int32))
            mask = vector_mask(query < last, columns, dim)
            q = plgpu.load(q_ref.at[queries, jnp.broadcast_to(head, queries.shape), columns], mask=mask, other=0.0)
            scores = jnp.where(live[None, :], exact_dot(q, k.T) * (scale * LOG2_E), _DEAD)
            weights = exp2(scores - scores.max(axis=1)[:, None])
            share = jnp.where(query < last, 1.0 / weights.sum(axis=1), 0.0)
            return mass + weights * share[:, None]

        # Padding has no queries, and its mass of 0 is written like any other.
        steps = jnp.where(key_first_ref[index] < last, pl.cdiv(last - first, block_q) * group, 0)
        mass = jax.lax.fori_loop(0, steps, visit, jnp.zeros((block_q, block), jnp.float32))
        plgpu.store(mass_ref.at[key, jnp.broadcast_to(h, key.shape)], mass.sum(axis=0), mask=live)


@functools.partial(jax.jit, static_argnames=("block", "scale", "tile", "interpret"))
def _mass_triton(q, k, starts, *, block, scale, tile, interpret):
    tokens, heads, _ = k.shape
    tiles = _tiles(starts, tokens, block)
    return pl.pallas_call(
        functools.partial(
            _mass_kernel,
            block=block,
            group=q.shape[1] // heads,
            scale=scale,
            block_q=min(tile.block_q, block),
            exp2=kernel_exp2(interpret),
        ),
        grid=(heads, tiles.first.shape[0]),
        in_specs=[WHOLE] * 5,
        out_specs=WHOLE,
        out_shape=jax.ShapeDtypeStruct((tokens, heads), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="block_attention_mass",
    )(q, k, tiles.first, tiles.last, tiles.key_first)
