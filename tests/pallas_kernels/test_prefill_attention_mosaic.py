"""Prefill attention for Hopper: the kernel interpreted, lowered for CUDA, native, and when it is chosen."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import InterpretGPUParams, assert_same_attention, make_address, make_paged, normal, table_shape
from lowering import lower_for_h200, mosaic_calls, triton_calls

from pallas_kernels import PrefillTile, decode_attention, prefill_attention, prefill_attention_reference
from pallas_kernels.lowered_once import _lowered
from pallas_kernels.paging import PageAddress
from pallas_kernels.prefill_attention_mosaic import (
    BLOCK,
    _heaviest_first,
    _share,
    _Visit,
    best_parts,
    prefill_attention_mosaic,
)
from pallas_kernels.segment_visits import segment_visits

reference = jax.jit(prefill_attention_reference, static_argnames=("address", "scale"))


def arguments(case, tokens, heads, group, rows, starts):
    """Random q, k, v, which are NaN behind the last segment, the cache, and the segments."""
    dim, dtype = case.k_pages.shape[2], case.k_pages.dtype
    new = (normal(i, tokens, n, dim, dtype=dtype) for i, n in ((1, heads * group), (2, heads), (3, heads)))
    new = (x.at[starts[-1] :].set(jnp.nan) for x in new)
    return (*new, *case[:4], jnp.array(rows, jnp.int32), jnp.array(starts, jnp.int32))


def call_kernel(args, case, **options):
    """The kernel itself, with as many parts as are asked for."""
    common, layer = case.address.split_layer()
    return prefill_attention_mosaic(*args, layer, address=common, scale=case.k_pages.shape[2] ** -0.5, **options)


def expected(args, case):
    return reference(*args, address=case.address, scale=case.k_pages.shape[2] ** -0.5)


on_the_cpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="the interpreter runs on the CPU")


@on_the_cpu
@pytest.mark.parametrize(
    ("parts", "programs", "lengths", "tokens", "rows", "starts"),
    [
        # Two segments in one tile, the second one ending in the next; a history that ends inside a block, one of full
        # blocks; padding. Four items, of which one program takes two: the interpreter takes seconds for each.
        (1, 3, (0, 150, 2 * BLOCK), 155, (2, 3), (0, 20, 150)),
        # In one tile segments without history, with less than a block and with several: one of two parts has nothing to
        # do for the first, the second's end of the history is the other's only block. A program for each item.
        (2, 132, (0, 40, 2 * BLOCK + 84), 128, (1, 2, 3), (0, 20, 50, 120)),
    ],
)
def test_interpreted(parts, programs, lengths, tokens, rows, starts):
    case = make_paged(lengths=lengths, granularity="per_head", heads=2, dim=64, page=32, columns=12, dtype=jnp.bfloat16)
    args = arguments(case, tokens, 2, 1, rows, starts)
    assert InterpretGPUParams is not None
    got = call_kernel(args, case, with_lse=True, parts=parts, programs=programs, interpret=InterpretGPUParams())
    assert_same_attention(got, expected(args, case), jnp.bfloat16)


@on_the_cpu
def test_a_part_without_steps_counts_for_nothing_and_holds_nobody_up():
    case = make_paged(lengths=(0,), granularity="shared", heads=1, dim=64, page=32, columns=1, dtype=jnp.bfloat16)
    # A whole tile: the interpreter's threads can starve for those of XLA, which padding takes on a machine with few.
    args = arguments(case, BLOCK, 1, 2, (1,), (0, 7))
    assert InterpretGPUParams is not None
    out, lse = call_kernel(args, case, with_lse=False, parts=2, programs=1, interpret=InterpretGPUParams())
    assert lse is None
    want = expected(args, case)
    assert_same_attention((out, want[1]), want, jnp.bfloat16)


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_shares_of_a_visit_are_its_steps(parts):
    def steps(visit):
        """What each step reads, in order."""
        blocks = [("own", None)] * visit.has_own
        blocks += [("tail", visit.tail_block)] * visit.has_tail + [("lead", visit.lead_block)] * visit.has_lead
        assert visit.masked == len(blocks)
        blocks += [("full", visit.full_first + i) for i in range(visit.full)]
        blocks += [("whole", visit.whole_first + i) for i in range(visit.whole)]
        assert visit.total == len(blocks)
        return blocks

    for tail, lead, full, whole in itertools.product((0, 1), (0, 1), (0, 1, 9), (0, 4)):
        visit = _Visit(
            row=1, first=0, last=BLOCK, key_first=0, held=0, has_own=1, tail=5, has_tail=tail, tail_block=full, lead=7,
            has_lead=lead, lead_block=2, masked=1 + tail + lead, full=full, full_first=0, whole=whole, whole_first=3,
            total=1 + tail + lead + full + whole,
        )  # fmt: skip
        shares = [jax.tree.map(int, _share(jax.tree.map(jnp.int32, visit), i, parts)) for i in range(parts)]
        assert [step for share in shares for step in steps(share)] == steps(visit)
        assert max(share.total for share in shares) - min(share.total for share in shares) <= 1


def test_few_programs_that_see_many_keys_share_them():
    heads, long = 32, 256  # blocks
    parts = {tiles * BLOCK: best_parts(heads * tiles, long + tiles, 132) for tiles in (1, 2, 4, 8, 16)}
    assert parts == {128: 4, 256: 2, 512: 1, 1024: 1, 2048: 1}
    assert best_parts(heads, 1 + 1, 132) == 1
    # They all run at once: parts that find no keys cost little.
    assert all(heads * best_parts(heads, 1 << 20, 132) <= 132 for heads in range(1, 132))
    assert best_parts(133, 1 << 20, 132) == 1


@pytest.mark.parametrize("heads", [1, 3])
def test_what_sees_most_comes_first(heads):
    # A long history before little; a segment without one over three tiles; tiles of padding.
    rows, starts, tiles = (2, 1, 3), (0, 100, 400, 500), 6
    history = np.stack([np.array([0, 0, 1000, 130]) // (head + 1) for head in range(heads)], axis=1)
    visits = segment_visits(jnp.array(rows), jnp.array(starts), tiles * BLOCK, BLOCK)
    seen = np.zeros((tiles, heads), int)  # blocks of keys
    for row, first, last in zip(rows, starts[:-1], starts[1:], strict=True):
        for tile in range(first // BLOCK, (last - 1) // BLOCK + 1):
            seen[tile] += -(-history[row] // BLOCK) + tile + 1 - first // BLOCK
    order = np.asarray(_heaviest_first(visits, jnp.array(history), tiles))
    assert sorted(order) == list(range(tiles * heads))
    assert seen.ravel()[order].tolist() == sorted(seen.ravel(), reverse=True)


@pytest.mark.parametrize(("tokens", "parts"), [(256, 2), (2048, 1)])
@pytest.mark.parametrize("return_lse", [False, True])
def test_parts_are_lowered(tokens, parts, return_lse):
    pool = jax.ShapeDtypeStruct((1 << 18, 32, 128), jnp.bfloat16)
    call = functools.partial(prefill_attention, address=make_address("per_head", 8), scale=1.0, return_lse=return_lse)
    text = lower_for_h200(call, *call_shapes("per_head", tokens, 4, 32, 8, pool))
    (line,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    assert (f"tensor<{parts}x{tokens}x32x128xf32>" in line) == (parts > 1)


def native_case(granularity, dim, page, dtype):
    """Rows without history, with some blocks and a rest, with less than a block, and with one."""
    lengths = (0, 300, 37, BLOCK)
    return make_paged(
        lengths=lengths, granularity=granularity, heads=2, dim=dim, page=page, columns=512 // page, dtype=dtype
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("granularity", "group", "dim", "page", "dtype"),
    [
        ("shared", 4, 128, 32, jnp.bfloat16),
        ("per_layer", 7, 64, 16, jnp.float16),
        ("per_head", 2, 128, 128, jnp.bfloat16),
        ("per_head", 1, 64, 256, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize(
    ("tokens", "rows", "starts"),
    [
        (530, (2, 3, 4, 1), (0, 20, 270, 270, 520)),  # nothing aligned, an empty segment, padding
        (512, (4,), (0, 512)),
        (7, (2, 1, 3), (0, 3, 4, 7)),
        (260, (2, 0, 0), (0, 256, 256, 256)),
        (64, (0,), (0, 0)),  # padding only
    ],
)
def test_native(granularity, group, dim, page, dtype, tokens, rows, starts):
    case = native_case(granularity, dim, page, dtype)
    args = arguments(case, tokens, 2, group, rows, starts)
    call = functools.partial(prefill_attention, *args, address=case.address, scale=dim**-0.5, implementation="mosaic")
    got = call(return_lse=True)
    assert_same_attention(got, reference(*args, address=case.address, scale=dim**-0.5), dtype)
    np.testing.assert_array_equal(call(), got[0])


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize(
    ("granularity", "group", "dim", "page", "dtype"),
    [("shared", 4, 128, 32, jnp.bfloat16), ("per_head", 7, 64, 16, jnp.float16)],
)
@pytest.mark.parametrize(
    ("tokens", "rows", "starts"),
    [(530, (2, 3, 4, 1), (0, 20, 270, 270, 520)), (7, (2, 1, 3), (0, 3, 4, 7)), (64, (0,), (0, 0))],
)
def test_native_in_parts(parts, granularity, group, dim, page, dtype, tokens, rows, starts):
    case = native_case(granularity, dim, page, dtype)
    args = arguments(case, tokens, 2, group, rows, starts)
    got = call_kernel(args, case, with_lse=True, parts=parts)
    assert_same_attention(got, expected(args, case), dtype)
    out, lse = call_kernel(args, case, with_lse=False, parts=parts)
    assert lse is None
    # Not to the bit: XLA merges the parts in another program.
    assert_same_attention((out, got[1]), expected(args, case), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 5, 13])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("tokens", "rows", "starts"), [(530, (2, 3, 4, 1), (0, 20, 270, 270, 520)), (1024, (0,), (0, 0))]
)
@pytest.mark.parametrize(
    ("granularity", "dim", "dtype"), [("per_head", 128, jnp.bfloat16), ("shared", 64, jnp.float16)]
)
def test_programs_that_take_several_items(programs, parts, tokens, rows, starts, granularity, dim, dtype):
    case = native_case(granularity, dim, 32, dtype)
    args = arguments(case, tokens, 2, 4, rows, starts)
    got = call_kernel(args, case, with_lse=True, parts=parts, programs=programs)
    if parts == 1:
        np.testing.assert_array_equal(call_kernel(args, case, with_lse=False, programs=programs, parts=1)[0], got[0])
    for some, one_each in zip(got, call_kernel(args, case, with_lse=True, parts=parts, programs=1000), strict=True):
        np.testing.assert_array_equal(some, one_each)
    assert_same_attention(got, expected(args, case), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [128, 256])
def test_a_short_chunk_after_a_long_history(tokens):
    case = make_paged(lengths=(7000,), granularity="shared", heads=8, dim=128, page=32, columns=256, dtype=jnp.bfloat16)
    args = arguments(case, tokens, 8, 4, (1,), (0, tokens))
    assert best_parts(32 * tokens // BLOCK, 64, 132) > 1
    got = call_kernel(args, case, with_lse=True)
    assert_same_attention(got, expected(args, case), jnp.bfloat16)
    assert_same_attention(got, call_kernel(args, case, with_lse=True, parts=1), jnp.bfloat16)


@pytest.mark.gpu
def test_one_token_equals_decode_with_that_token_in_the_pool():
    case = make_paged(lengths=(210,), granularity="shared", heads=2, dim=128, page=32, columns=8, dtype=jnp.bfloat16)
    q = normal(1, 1, 8, 128, dtype=jnp.bfloat16)
    page = case.address.page(case.page_table[0, 1, 0, 209 // 32], jnp.arange(2))
    k, v = case.k_pages[page, 209 % 32][None], case.v_pages[page, 209 % 32][None]
    row = jnp.array([1], jnp.int32)
    whole = decode_attention(q, *case[:4], row, address=case.address, num_kv_heads=2, scale=0.1)
    split = prefill_attention(
        q, k, v, *case[:3], case.lengths - 1, row, jnp.array([0, 1], jnp.int32), address=case.address, scale=0.1,
        implementation="mosaic",
    )  # fmt: skip
    np.testing.assert_allclose(split.astype(jnp.float32), whole.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_needs_no_memory_beside_its_output():
    tokens, pool = 2048, jax.ShapeDtypeStruct((1 << 15, 32, 128), jnp.bfloat16)
    args = call_shapes("shared", tokens, 8, 32, 8, pool)
    call = functools.partial(prefill_attention, address=make_address("shared", 8), scale=1.0, implementation="mosaic")
    memory = jax.jit(call).lower(*args).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1 << 20


def call_shapes(granularity, tokens, segments, q_heads, heads, pool):
    """The shapes of the arguments of `prefill_attention` at production sizes."""
    layers, table_heads = table_shape(granularity, heads)
    shape = jax.ShapeDtypeStruct
    new = shape((tokens, heads, pool.shape[2]), pool.dtype)
    return (
        shape((tokens, q_heads, pool.shape[2]), pool.dtype),
        new,
        new,
        pool,
        pool,
        shape((layers, 65, table_heads, 4096), jnp.int32),
        shape((layers, 65, table_heads), jnp.int32),
        shape((segments,), jnp.int32),
        shape((segments + 1,), jnp.int32),
    )


@pytest.mark.parametrize(
    ("granularity", "tokens", "segments", "q_heads", "heads", "dim", "dtype"),
    [
        ("per_head", 8192, 32, 32, 8, 128, jnp.bfloat16),
        ("shared", 2000, 8, 28, 4, 128, jnp.float16),
        ("per_layer", 16, 4, 14, 2, 64, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_is_the_default_on_hopper(granularity, tokens, segments, q_heads, heads, dim, dtype, return_lse):
    pool = jax.ShapeDtypeStruct((1 << 18, 32, dim), dtype)
    call = functools.partial(
        prefill_attention, address=make_address(granularity, heads), scale=1.0, return_lse=return_lse
    )
    text = lower_for_h200(call, *call_shapes(granularity, tokens, segments, q_heads, heads, pool))
    assert (mosaic_calls(text), triton_calls(text)) == (1, 0)


def test_programs_share_what_the_kernel_was_lowered_to():
    """Programs and layers that differ in all else; another shape is another kernel."""
    pool = jax.ShapeDtypeStruct((1 << 12, 32, 128), jnp.bfloat16)

    def kernels(tokens, layers, scale):
        def program(*arrays):
            attend = functools.partial(prefill_attention, scale=1.0)
            outs = [attend(*arrays, address=PageAddress(0, 4, 2 * layer, 1)) for layer in range(layers)]
            return sum(outs) * scale

        text = lower_for_h200(program, *call_shapes("shared", tokens, 2, 4, 2, pool))
        (line,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
        return re.search(r"kernel_hash = (\S+)", line)[1]

    before = _lowered.cache_info()
    same = {kernels(128, 1, 1.0), kernels(128, 2, 3.0)}
    after = _lowered.cache_info()
    assert (len(same), after.misses - before.misses) == (1, 1)
    assert kernels(256, 1, 1.0) not in same


@pytest.mark.parametrize(
    ("page", "dim", "dtype", "options"),
    [
        (1, 128, jnp.bfloat16, {}),
        (32, 80, jnp.bfloat16, {}),
        (32, 128, jnp.float32, {}),
        (32, 128, jnp.bfloat16, {"tile": PrefillTile(64, 32, 4, 2)}),
    ],
)
def test_what_it_cannot_serve_is_left_to_triton_and_refused_by_name(page, dim, dtype, options):
    pool = jax.ShapeDtypeStruct((1 << 12, page, dim), dtype)
    call = functools.partial(prefill_attention, address=make_address("shared", 2), scale=1.0, **options)
    args = call_shapes("shared", 256, 2, 4, 2, pool)
    text = lower_for_h200(call, *args)
    assert (mosaic_calls(text), triton_calls(text)) == (0, 1)
    with pytest.raises(ValueError, match="implementation='mosaic' cannot serve"):
        lower_for_h200(functools.partial(call, implementation="mosaic"), *args)
