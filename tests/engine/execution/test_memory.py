"""The size of the page pool, on devices that only say what memory they have."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.cache import CacheLayout, init_cache
from sparsejax.engine.execution import memory
from sparsejax.errors import OutOfMemoryError

LAYOUT = CacheLayout(
    num_layers=2,
    num_kv_heads=2,
    head_dim=64,
    num_pages=8,
    page_size=16,
    max_rows=3,
    max_slots=100,
    dtype=jnp.bfloat16,
)
PAGE_BYTES = 2 * 16 * 64 * 2  # keys and values
GIB = 1 << 30


@dataclass
class Device:
    """A GPU as far as its memory goes."""

    stats: dict | None
    platform: str = "gpu"
    device_kind: str = "Fake GPU"

    def memory_stats(self):
        return self.stats


@given(
    limit=st.integers(1, 100 * GIB),
    used=st.integers(0, 50 * GIB),
    scratch=st.integers(0, 4 * GIB),
    other=st.integers(0, GIB),
)
def test_pool_and_all_else_fit_and_little_is_left(limit, used, scratch, other):
    device = Device({"bytes_limit": limit, "bytes_in_use": used})
    pages = memory.pages_that_fit(LAYOUT, device=device, scratch=scratch, other=other)
    bookkeeping = 8 * pages / LAYOUT.pages_per_entry
    rest = limit * (1 - memory.MARGIN) - used - scratch - other - pages * PAGE_BYTES - bookkeeping
    assert pages >= 0
    assert rest >= 0 or pages == 0
    assert rest < PAGE_BYTES + 8 or pages == 0


def test_the_pages_are_counted_as_the_cache_allocates_them():
    pages = memory.pages_that_fit(LAYOUT, device=Device({"bytes_limit": 10**6, "bytes_in_use": 0}), scratch=0, other=0)
    layout = memory.fit_pool(dataclasses.replace(LAYOUT, max_slots=10**6), pages, needed_tokens=1)
    cache = jax.eval_shape(lambda: init_cache(layout))
    pool = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.pool, cache.free)))
    assert 0.9e6 < pool <= 1e6
    assert layout.bytes() >= memory.tree_bytes([cache.pool])


def test_a_device_that_says_nothing():
    with pytest.raises(OutOfMemoryError, match=r"Fake GPU does not report its memory.*num_pages"):
        memory.pages_that_fit(LAYOUT, device=Device(None), scratch=0, other=0)


def test_a_cpu_gets_a_fixed_pool():
    pages = memory.pages_that_fit(LAYOUT, device=Device(None, platform="cpu"), scratch=0, other=0)
    assert pages * PAGE_BYTES == memory.CPU_POOL_BYTES


def test_a_pool_is_whole_entries_and_no_more_than_rows_can_use():
    assert LAYOUT.pages_per_entry == 4
    assert memory.fit_pool(LAYOUT, 4 * 5 + 3, needed_tokens=1).num_pages == 4 * 5
    useful = 1 + 3 * 7  # the null entry, and seven pages for each row's 100 slots
    assert memory.fit_pool(LAYOUT, 10**9, needed_tokens=1).num_pages == 4 * useful


def test_a_pool_too_small_for_one_request_says_what_helps():
    assert memory.fit_pool(LAYOUT, 4 * 3, needed_tokens=32).num_pages == 12
    with pytest.raises(OutOfMemoryError, match=r"would have 11 pages of 16 tokens.*at least 12\."):
        memory.fit_pool(LAYOUT, 11, needed_tokens=32)


def test_only_memory_errors_are_explained():
    words = r"while making tea.*gpu_memory_utilization.*\(RESOURCE_EXHAUSTED: no room for 7 bytes\)$"
    with pytest.raises(OutOfMemoryError, match=words), memory.explain_out_of_memory("making tea"):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 7 bytes\nallocator dump")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explain_out_of_memory("making tea"):
        raise jax.errors.JaxRuntimeError("INTERNAL: broken")


def test_memory_reserved_piece_by_piece_is_named(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "False")
    with (
        pytest.raises(OutOfMemoryError, match="unset XLA_PYTHON_CLIENT_PREALLOCATE"),
        memory.explain_out_of_memory("making tea"),
    ):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")


def test_a_fraction_that_the_user_set_stays(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    memory.reserve_device_memory(0.9)
    assert memory.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    memory.reserve_device_memory(0.8)
    assert memory.os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.800"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")


def test_tree_bytes_of_real_and_abstract_arrays():
    trees = [{"a": np.zeros((2, 3), np.float32)}, jax.ShapeDtypeStruct((5,), jnp.bfloat16)]
    assert memory.tree_bytes(trees) == 24 + 10
