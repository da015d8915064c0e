"""Sizes, page arithmetic and validation of a layout, and the empty cache made from it."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from cache_oracle import check_invariants

from sparsejax.cache import CacheLayout, free_entries, init_cache


def layout(**changes):
    sizes = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "num_pages": 60, "max_rows": 4, "max_slots": 50}
    return CacheLayout(**(sizes | {"page_size": 8} | changes))


@pytest.mark.parametrize(
    ("granularity", "table_layers", "table_heads", "pages_per_entry"),
    [("shared", 1, 1, 6), ("per_layer", 3, 1, 2), ("per_head", 3, 2, 1)],
)
def test_granularity_is_the_shape_of_the_table(granularity, table_layers, table_heads, pages_per_entry):
    shape = layout(granularity=granularity)
    assert (shape.table_layers, shape.table_heads, shape.pages_per_entry) == (
        table_layers,
        table_heads,
        pages_per_entry,
    )
    cache = init_cache(shape)
    assert cache.table.pages.shape == (table_layers, 5, table_heads, 7)
    assert shape.entries_for(17) == table_layers * table_heads * 3
    assert shape.entries_for(0) == 0


@pytest.mark.parametrize("granularity", ["shared", "per_layer", "per_head"])
def test_every_page_belongs_to_one_table_cell(granularity):
    """All (entry of a table, layer, head) name different pages of the pool, and together all whole entries."""
    shape = layout(granularity=granularity, num_pages=61)
    pages = []
    for layer, head in itertools.product(range(3), range(2)):
        address = shape.address(layer)
        # With tables of their own, layers and heads take turns with the entries; give each its own share.
        owners = shape.table_layers * shape.table_heads
        owner = address.table_layer * shape.table_heads + (head if shape.table_heads > 1 else 0)
        pages += [address.page(entry, head) for entry in range(shape.num_entries) if entry % owners == owner]
    assert sorted(pages) == list(range(shape.num_entries * shape.pages_per_entry))
    assert max(pages) < shape.num_pages


@pytest.mark.parametrize("records", [False, True])
def test_bytes_are_those_of_the_arrays(records):
    shape = layout(granularity="per_layer", with_score=records, with_position=records)
    cache = jax.eval_shape(lambda: init_cache(shape))
    assert shape.bytes() == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def test_empty_cache_is_all_free():
    cache = init_cache(layout())
    check_invariants(cache)
    assert int(free_entries(cache)) == cache.layout.num_entries - 1


def test_layouts_are_equal_by_value_whatever_the_spelling_of_the_dtype():
    assert layout(dtype="bfloat16") == layout(dtype=jnp.bfloat16)
    assert hash(layout(dtype="bfloat16")) == hash(layout(dtype=jnp.bfloat16))
    structure = jax.tree.structure(init_cache(layout()))
    assert structure == jax.tree.structure(init_cache(layout()))
    assert structure != jax.tree.structure(init_cache(layout(granularity="per_head")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a positive int, got 0"),
        ({"max_slots": 2.0}, "max_slots must be a positive int, got 2.0"),
        ({"page_size": 12}, "page_size must be a power of two, got 12"),
        ({"granularity": "per-head"}, "granularity must be one of .* got 'per-head'"),
        ({"dtype": "int8"}, "dtype must be a floating type, got int8"),
        ({"num_pages": 11}, "num_pages must be at least 12 .* got 11"),
        ({"num_pages": 2**28}, "num_pages \\* page_size must not exceed"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        layout(**changes)


def test_layer_out_of_range():
    with pytest.raises(ValueError, match=r"layer must be in \[0, 3\), got 3"):
        layout().address(3)
