"""How large the page pool may be: what the device has, less weights, tables, state and a measured step's scratch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import Implementation
from sparsejax.cache import CacheLayout, DeltaCacheLayout, init_cache, init_delta_cache
from sparsejax.engine.execution.compile_ahead import compile_ahead
from sparsejax.engine.execution.packing import pack
from sparsejax.engine.execution.selection_plan import Selections
from sparsejax.engine.programs.delta_ops import StoreSpec
from sparsejax.engine.programs.delta_parts import StoreOptions
from sparsejax.engine.programs.recording import idle_record
from sparsejax.engine.programs.state import init_state
from sparsejax.engine.programs.steps import StepOptions, decode_step, mixed_step
from sparsejax.errors import OutOfMemoryError
from sparsejax.models import Decoder

# A CPU run is for trying things out: enough for tens of thousands of tokens of a small model.
CPU_POOL_BYTES = 512 << 20
MARGIN = 0.01  # of the device's memory, left for allocator rounding


@contextlib.contextmanager
def explain_out_of_memory(what: str) -> Iterator[None]:
    """Turns XLA's out-of-memory error into one that says what was being done and what helps."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        piecemeal = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") in ("false", "False", "0")
        unset = "unset XLA_PYTHON_CLIENT_PREALLOCATE, which cuts memory into pieces, " if piecemeal else ""
        raise OutOfMemoryError(
            f"The device ran out of memory while {what}. Close other programs on it, {unset}raise "
            f"gpu_memory_utilization, or use a smaller model, dtype, num_pages, max_num_seqs or max_num_batched_tokens."
            f" ({str(error).splitlines()[0]})"
        ) from error


def reserve_device_memory(fraction: float) -> None:
    """Asks XLA to reserve `fraction` of each GPU rather than its default of 75 %.

    XLA reads this once, from the environment, when a process first uses a device; there is no other interface. A value
    the user has set stays, and after that first use the call has no effect: the pool then fits what XLA reserved.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction:.3f}")


def scratch_bytes(
    decoder: Decoder,
    params,
    layout: CacheLayout | DeltaCacheLayout,
    *,
    decode_batch: int,
    prefill_tokens: int,
    prefill_seqs: int,
    implementation: Implementation | None,
    records: frozenset[str] = frozenset(),
    store: StoreSpec | None = None,
    store_top: int = 0,
    selecting: Sequence[str] = (),
) -> int:
    """Temporary memory of the largest steps, from XLA's own analysis of the compiled programs.

    store_top: history tokens that a decode of a compressed request reads; requests that read more need more memory.

    Scratch does not grow with the pool (steps update it in place), so a small layout is analysed.
    """
    shape = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
    init = init_delta_cache if isinstance(layout, DeltaCacheLayout) else init_cache
    cache = jax.eval_shape(functools.partial(init, layout))  # pyright: ignore[reportArgumentType]
    state = jax.eval_shape(
        lambda: init_state(
            layout.num_rows,
            decoder.config.vocab_size,
            idle_record(layout, decoder.config, records, prefill_seqs) if isinstance(layout, CacheLayout) else None,
            selects=bool(selecting),
            stores=store is not None,
        )
    )
    evicts = layout.with_score
    selections = select = most = None
    if selecting and isinstance(layout, CacheLayout):
        selections = Selections(decoder.config, max_slots=layout.max_slots, page_size=layout.page_size)
        variants = selections.warm_options(selections.defaults(selecting), mixed=True, uniform=False)
        select = variants[-1] if variants else None  # the one that serves them all
    if store is not None:
        most = StoreOptions(store, chunk=True, compressed=True, top=store_top)
    options = StepOptions(
        plain=False,
        logprobs=True,
        records=records,
        watch=evicts,
        select=select,
        store=most,
        implementation=implementation,
    )
    packed = pack(
        [],
        size=prefill_tokens,
        segments=prefill_seqs,
        eos_token_ids=(),
        moment_slots={} if evicts else None,
        selections=selections,
        stores=store is not None,
    )
    batch = shape(packed)
    rows = jax.ShapeDtypeStruct((decode_batch,), jnp.int32)
    decodes = (rows, rows) if evicts or selecting or store is not None else (rows,)
    peak = 0
    # A mixed step does all that a prefill step does, and more.
    programs = [
        (
            jax.jit(functools.partial(step, decoder=decoder, options=options), donate_argnums=(1, 2)),
            (shape(params), cache, state, *work),
        )
        for step, work in ((mixed_step, (batch, *decodes)), (decode_step, decodes))
    ]
    for compiled in compile_ahead(programs):
        analysis = compiled.memory_analysis()
        # Outputs that alias no donated input are small (tokens and log-probabilities) but live beside the scratch.
        peak = max(peak, analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    return peak


def pages_that_fit(layout: CacheLayout, *, device: Any, scratch: int, other: int) -> int:
    """Pages for which the device has memory, weights being there already.

    Args:
      layout: gives the size of a page; its num_pages is ignored.
      scratch: bytes a step needs beside its arguments.
      other: bytes of everything else that is still to be allocated (state, tables).
    """
    page_bytes = 2 * layout.page_size * layout.head_dim * jnp.dtype(layout.dtype).itemsize
    page_bytes += 4 * layout.page_size * (layout.with_score + layout.with_position)
    page_bytes += 2 * layout.head_dim * jnp.dtype(layout.dtype).itemsize * layout.with_bounds
    if device.platform == "cpu":
        return CPU_POOL_BYTES // page_bytes
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        raise OutOfMemoryError(
            f"{device.device_kind} does not report its memory, so the page pool cannot be sized: pass num_pages."
        )
    # An entry of the free list (stack and reference count) goes with the pages it stands for.
    page_bytes += 8 / layout.pages_per_entry
    free = stats["bytes_limit"] * (1 - MARGIN) - stats["bytes_in_use"] - scratch - other
    return max(0, int(free // page_bytes))


def fit_pool(layout: CacheLayout, num_pages: int, *, needed_tokens: int) -> CacheLayout:
    """The layout with `num_pages` (whole entries), no more than its rows can use; too few is an error."""
    row_entries = layout.entries_for(layout.max_slots)
    useful = (1 + layout.max_rows * row_entries) * layout.pages_per_entry
    entries = min(num_pages, useful) // layout.pages_per_entry
    if entries < 1 + layout.entries_for(needed_tokens):
        raise OutOfMemoryError(
            f"The KV cache would have {num_pages} pages of {layout.page_size} tokens (one KV head of one layer each): "
            f"less than one request needs. Lower max_model_len or page_size, use a smaller model or dtype, raise "
            f"gpu_memory_utilization, or set num_pages to at least "
            f"{(1 + layout.entries_for(needed_tokens)) * layout.pages_per_entry}."
        )
    return dataclasses.replace(layout, num_pages=entries * layout.pages_per_entry)


def tree_bytes(trees: Sequence) -> int:
    """Bytes of all arrays (or abstract arrays) in the trees."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(trees))
