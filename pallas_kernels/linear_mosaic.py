"""Products of many tokens for Hopper, with what follows them inside (Pallas' Mosaic GPU backend).

One warp group fetches pieces of both factors into a ring in shared memory, without a pause between tiles of the result;
two others multiply. A gate or a residual add is done on the sums before they are rounded and stored, so what a gate
reads never reaches memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lowered_once import lowered_once
from pallas_kernels.online_softmax import LOG2_E

_WORKERS = 2
_ROWS = 64  # tokens of a worker
TOKENS = _WORKERS * _ROWS
"""Tokens of a tile; there must be a multiple of them."""
DEPTH = 64
"""Inner dimension of a piece; likewise."""
COLUMNS = 128
"""Columns of the narrowest tile; likewise."""
_BAND = 8  # tiles side by side that programs at work share, so that the L2 cache holds what they read
_SWIZZLE = 128  # bytes
# Of the 65,536 of a multiprocessor; the three warp groups may use 512 a thread together.
_WORKER_REGISTERS, _FETCHER_REGISTERS = 232, 40


class LinearTile(NamedTuple):
    """How a product is cut.

    Attributes:
      columns: of the weights, that a program multiplies at a time; of a gated product half of them are gates.
      stages: pieces of the inner dimension in shared memory.
    """

    columns: int
    stages: int


# As many stages as shared memory has room for beside a tile of the result, but for the narrow tile without gates, which
# a sixth makes slower.
_TILES = {
    False: (LinearTile(256, 3), LinearTile(COLUMNS, 5)),
    True: (LinearTile(256, 4), LinearTile(COLUMNS, 6)),
}
_NARROW = 1.1  # times as long a tile of the narrow kind takes as half of a wide one


def best_tile(tokens: int, columns: int, *, gated: bool, programs: int) -> LinearTile:
    """The tile that takes the fewest rounds of all programs.

    Args:
      columns: of the weights, a multiple of COLUMNS.
      programs: that run at once.
    """

    def cost(tile):
        rounds = -(-(tokens // TOKENS) * (columns // tile.columns) // programs)
        return rounds * tile.columns * (_NARROW if tile.columns == COLUMNS else 1.0)

    return min((tile for tile in _TILES[gated] if columns % tile.columns == 0), key=cost)


def _kernel(x_ref, weight_ref, *refs, grid, interpreted):
    *add_ref, out_ref, x_smem, weight_smem, out_smem, ready, free, add_ready = refs
    _, parts, _, wide = weight_smem.shape  # gates and what they are for, or one part
    stages, features = x_smem.shape[0], out_ref.shape[1]
    steps = x_ref.shape[1] // DEPTH
    program, worker = jax.lax.axis_index("program"), jax.lax.axis_index("worker")
    programs = jax.lax.axis_size("program")
    tiles = jax.lax.div(grid[0] * grid[1] - program + (programs - 1), jnp.int32(programs))

    def place(tile):
        """(first token, first feature) of this program's tile."""
        row, column = plgpu.planar_snake(program + tile * programs, grid, 1, _BAND)
        return row * TOKENS, column * wide

    def slot_of(step):
        return jax.lax.rem(step, jnp.int32(stages))

    @pl.when(worker == _WORKERS)
    def _fetch():
        plgpu.set_max_registers(_FETCHER_REGISTERS, action="decrease")

        @pl.loop(0, tiles)
        def _(tile):
            token, feature = place(tile)

            @pl.loop(0, steps)
            def _(i):
                step = tile * steps + i
                slot = slot_of(step)

                @pl.when(step >= stages)
                def _():
                    plgpu.barrier_wait(free.at[slot])

                inner = pl.ds(i * DEPTH, DEPTH)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(token, TOKENS), inner], x_smem.at[slot], ready.at[slot])
                for part in range(parts):
                    columns = pl.ds(part * features + feature, wide)
                    plgpu.copy_gmem_to_smem(weight_ref.at[inner, columns], weight_smem.at[slot, part], ready.at[slot])

        # Every arrival is waited for, the last ones too.
        for slot in range(stages):

            @pl.when(tiles * steps > slot)
            def _(slot=slot):
                plgpu.barrier_wait(free.at[slot])

    @pl.when(worker < _WORKERS)
    def _multiply():
        plgpu.set_max_registers(_WORKER_REGISTERS, action="increase")
        mine, my_out = pl.ds(worker * _ROWS, _ROWS), out_smem.at[worker]

        def products(first_step):
            def add_up(*sums):
                @pl.loop(0, steps)
                def _(i):
                    slot = slot_of(first_step + i)
                    plgpu.barrier_wait(ready.at[slot])
                    for part, acc in enumerate(sums):
                        plgpu.wgmma(acc, x_smem.at[slot, mine], weight_smem.at[slot, part])
                    plgpu.wgmma_wait(parts)  # those of the step before are done

                    @pl.when(i > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[slot_of(first_step + i - 1)])

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(free.at[slot_of(first_step + steps - 1)])
                return [acc[...] for acc in sums]

            return pl.run_scoped(add_up, *[plgpu.WGMMAAccumulatorRef((_ROWS, wide), jnp.float32)] * parts)

        def products_interpreted(first_step):
            def add_up(i, sums):
                slot = slot_of(first_step + i)
                plgpu.barrier_wait(ready.at[slot])
                x = x_smem[slot, mine]
                sums = [
                    acc + jnp.dot(x, weight_smem[slot, part], preferred_element_type=jnp.float32)
                    for part, acc in enumerate(sums)
                ]
                plgpu.barrier_arrive(free.at[slot])
                return sums

            return jax.lax.fori_loop(0, steps, add_up, [jnp.zeros((_ROWS, wide), jnp.float32)] * parts)

        @pl.loop(0, tiles)
        def _(tile):
            token, feature = place(tile)
            here = (pl.ds(token + worker * _ROWS, _ROWS), pl.ds(feature, wide))
            if add_ref:  # fetched meanwhile, to where the result will be
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.copy_gmem_to_smem(add_ref[0].at[here], my_out, add_ready.at[worker])
            result, *up = (products_interpreted if interpreted else products)(tile * steps)
            if up:
                result = result / (1.0 + jnp.exp2(result * -LOG2_E)) * up[0]
            if add_ref:
                plgpu.barrier_wait(add_ready.at[worker])
                before = my_out[...] if interpreted else plgpu.layout_cast(my_out[...], plgpu.Layout.WGMMA)
                result += before.astype(jnp.float32)
            else:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            my_out[...] = result.astype(out_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(my_out, out_ref.at[here])

        plgpu.wait_smem_to_gmem(0)


@functools.partial(jax.jit, static_argnames=("gated", "tile", "programs", "interpret"))
def linear_mosaic(x, weight, add, *, gated, tile, programs, interpret=None):
    """x @ weight, plus `add` if that is not None; if `gated`, silu of its first half of the columns times the second.

    x [T, d] of a multiple of TOKENS and DEPTH, weight [d, n] of a multiple of the tile's columns, add [T, n], all of
    one dtype, bfloat16 or float16. `programs`: of the grid. `interpret`: parameters of Pallas' GPU interpreter.
    """
    arrays = (x, weight) if add is None else (x, weight, add)
    options = (gated, tile, programs)
    if interpret is None:
        return lowered_once(_call, *arrays, options=options)
    return _call(*arrays, options=options, interpret=interpret)


def _call(x, weight, *add, options, interpret=None):
    gated, tile, programs = options
    parts = 2 if gated else 1
    tokens, features, wide = x.shape[0], weight.shape[1] // parts, tile.columns // parts
    swizzled = (plgpu.TilingTransform((8, _SWIZZLE // x.dtype.itemsize)), plgpu.SwizzleTransform(_SWIZZLE))
    return plgpu.kernel(
        functools.partial(_kernel, grid=(tokens // TOKENS, features // wide), interpreted=interpret is not None),
        out_type=jax.ShapeDtypeStruct((tokens, features), x.dtype),
        scratch_types=[
            plgpu.SMEM((tile.stages, TOKENS, DEPTH), x.dtype, transforms=swizzled),
            plgpu.SMEM((tile.stages, parts, DEPTH, wide), x.dtype, transforms=swizzled),
            plgpu.SMEM((_WORKERS, _ROWS, wide), x.dtype, transforms=swizzled),
            plgpu.Barrier(num_arrivals=1 + parts, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=_WORKERS, num_barriers=tile.stages),
            plgpu.Barrier(num_barriers=_WORKERS),
        ],
        grid=(programs,),
        grid_names=("program",),
        num_threads=_WORKERS + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
        kernel_name="linear",
    )(x, weight, *add)
