"""Moving slots: every implementation against the reference, lowering for CUDA, and moving in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, normal
from lowering import donated_arguments, kernel_aliases, lower_for_h200, triton_calls

from pallas_kernels import move_slots, move_slots_reference


def make_moves(pages, page, count, dropped, seed=0):
    """`count` moves between distinct slots, of which `dropped` have the sentinel for a target (and any source)."""
    rng = np.random.default_rng(seed)
    slots = rng.permutation(pages * page)[: 2 * count]
    source, target = slots[:count].copy(), slots[count:].copy()
    dead = rng.permutation(count)[:dropped]
    target[dead] = pages * page
    source[dead] = rng.choice([0, pages * page, target[0]], dropped)
    return jnp.asarray(source, jnp.int32), jnp.asarray(target, jnp.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("pages", "page", "dim", "count", "dropped", "dtype"),
    [
        (20, 4, 64, 37, 9, jnp.float32),
        (64, 1, 80, 16, 0, jnp.bfloat16),
        (4, 32, 128, 1, 0, jnp.float16),
        (9, 8, 96, 30, 30, jnp.float32),
    ],
)
def test_moves_the_slots_and_nothing_else(mode, pages, page, dim, count, dropped, dtype):
    pools = normal(1, pages, page, dim, dtype=dtype), normal(2, pages, page, dim, dtype=dtype)
    moves = make_moves(pages, page, count, dropped)
    got = move_slots(*pools, *moves, **mode)
    for pool, expected in zip(got, move_slots_reference(*pools, *moves), strict=True):
        np.testing.assert_array_equal(np.asarray(pool, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize(("dim", "page", "count"), [(128, 32, 1 << 17), (80, 1, 4)])
def test_lowers_for_cuda_in_place(implementation, dim, page, count):
    shape = jax.ShapeDtypeStruct
    pool, moves = shape((1 << 18, page, dim), jnp.bfloat16), shape((count,), jnp.int32)
    text = lower_for_h200(
        lambda *arguments: move_slots(*arguments, implementation=implementation),
        pool, pool, moves, moves, donate_argnums=(0, 1),
    )  # fmt: skip
    assert donated_arguments(text) == 2
    if implementation == "triton":
        assert (triton_calls(text), kernel_aliases(text)) == (1, 2)


def test_donated_pools_are_not_copied():
    pools = (jnp.zeros((4096, 8, 64)),) * 2
    compiled = jax.jit(move_slots, donate_argnums=(0, 1)).lower(*pools, *make_moves(4096, 8, 16, 0)).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * pools[0].nbytes
    assert memory.temp_size_in_bytes < pools[0].nbytes / 50


def test_errors_name_the_argument():
    pool, ids = jnp.zeros((4, 8, 64)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="target has shape"):
        move_slots(pool, pool, ids, ids[:2])
    with pytest.raises(ValueError, match="v_pages has shape"):
        move_slots(pool, pool[:2], ids, ids)
    with pytest.raises(ValueError, match="power of two"):
        move_slots(pool[:, :3], pool[:, :3], ids, ids)
    with pytest.raises(TypeError, match="source must be int32"):
        move_slots(pool, pool, ids.astype(jnp.float32), ids)
