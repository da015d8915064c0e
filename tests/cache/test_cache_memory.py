"""Every operation works in place: no temporary the size of the pool, and the donated cache is the returned one."""

import re

import jax
import jax.numpy as jnp
import pytest
from lowering import lower_for_h200, triton_calls

from sparsejax.cache import (
    CacheLayout,
    SlotMapping,
    allocate,
    append,
    compact,
    fork,
    init_cache,
    release,
    slot_mapping,
    stamp,
)

SHAPES = {
    # A row holds 1/16 of the pool, so what one row's data needs is far below the pool's size. fp32, because the CPU
    # compiler widens whole bf16 operands of a scatter, which says nothing about the cache.
    "test": CacheLayout(
        num_layers=2, num_kv_heads=2, head_dim=64, num_pages=16384, max_rows=8, max_slots=4096, page_size=16,
        granularity="shared", dtype=jnp.float32, with_score=True, with_position=True,
    ),
    # Llama-3.1-8B with 8k tokens a row, a pool of 32 GiB.
    "llama-8b": CacheLayout(
        num_layers=32, num_kv_heads=8, head_dim=128, num_pages=2**21, max_rows=128, max_slots=8192, page_size=32,
        granularity="shared", dtype=jnp.bfloat16, with_score=True, with_position=True,
    ),
    # Qwen2.5-7B.
    "qwen-7b": CacheLayout(
        num_layers=28, num_kv_heads=4, head_dim=128, num_pages=2**21, max_rows=64, max_slots=8192, page_size=32,
        granularity="shared", dtype=jnp.bfloat16,
    ),
}  # fmt: skip
OPERATIONS = ("allocate", "append", "stamp", "release", "fork", "compact")


def with_granularity(shape: str, granularity) -> CacheLayout:
    layout = SHAPES[shape]
    return CacheLayout(**(vars(layout) | {"granularity": granularity}))


def case(operation: str, layout: CacheLayout, *, rows: int = 4, tokens: int = 64, slots: int = 256):
    """A step of one operation and the abstract values it is traced with, the cache first."""
    cache = jax.eval_shape(lambda: init_cache(layout))
    batch = jax.ShapeDtypeStruct((rows,), jnp.int32)
    token = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    kv = jax.ShapeDtypeStruct((tokens, layout.num_kv_heads, layout.head_dim), layout.dtype)
    keep = jax.ShapeDtypeStruct((layout.table_layers, 1, layout.table_heads, slots), jnp.bool_)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)

    def write(cache, rows, back, k, v):
        mapping: SlotMapping = slot_mapping(cache, rows, back)
        for layer in range(2):
            cache = append(cache, layer, mapping, k, v)
        return cache

    return {
        "allocate": (lambda cache, rows, count: allocate(cache, rows, count, max_count=1), (batch, batch)),
        "append": (write, (token, token, kv, kv)),
        "stamp": (lambda cache, rows, back: stamp(cache, slot_mapping(cache, rows, back), back), (token, token)),
        "release": (release, (batch,)),
        "fork": (fork, (batch, batch, batch)),
        "compact": (compact, (one, keep)),
    }[operation], cache


@pytest.mark.parametrize("granularity", ["shared", "per_head"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_the_size_of_the_pool_is_made(operation, granularity):
    layout = with_granularity("test", granularity)
    (step, arguments), cache = case(operation, layout, slots=1024)
    memory = jax.jit(step, donate_argnums=0).lower(cache, *arguments).compile().memory_analysis()
    pool = cache.pool.k.size * 2 * cache.pool.k.dtype.itemsize
    assert memory.alias_size_in_bytes == layout.bytes()
    assert memory.temp_size_in_bytes < pool / 40


@pytest.mark.parametrize(("shape", "granularity"), [("llama-8b", "shared"), ("llama-8b", "per_head"),
                                                    ("qwen-7b", "per_layer")])  # fmt: skip
@pytest.mark.parametrize("operation", OPERATIONS)
def test_production_shapes_lower_for_cuda_in_place(operation, shape, granularity):
    layout = with_granularity(shape, granularity)
    (step, arguments), cache = case(operation, layout, rows=128, tokens=128, slots=8192)
    text = lower_for_h200(step, cache, *arguments, donate_argnums=0)
    assert len(re.findall(r"tf\.aliasing_output", text)) == len(jax.tree.leaves(cache))
    # The two layers that are appended share one lowered kernel.
    kernels = {"append": 1, "fork": 1, "compact": 1}.get(operation, 0)
    assert triton_calls(text) == kernels
    assert text.count("output_operand_alias<") == 2 * kernels


def test_allocation_reads_no_array_of_the_pool():
    layout = with_granularity("test", "per_head")
    (step, arguments), cache = case("allocate", layout)
    jaxpr = jax.make_jaxpr(step)(cache, *arguments)
    pool = jaxpr.jaxpr.invars[: len(jax.tree.leaves(cache.pool))]
    used = {id(var) for equation in jaxpr.jaxpr.eqns for var in equation.invars}
    assert not used & {id(var) for var in pool}
