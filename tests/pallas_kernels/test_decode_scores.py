"""Scores that decode attention records and dead slots that it skips: kernel and XLA program against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import MODES, assert_same_attention, make_address, make_paged, normal, table_shape
from lowering import donated_arguments, kernel_aliases, lower_for_h200, triton_calls

from pallas_kernels import (
    DecodeTile,
    SpanLimits,
    decode_attention,
    decode_attention_reference,
    decode_work_list,
    kept_logits,
    merge_items,
)

BLOCK = 16
TILE = DecodeTile(BLOCK, num_warps=2, num_stages=3)
LIMITS = SpanLimits(wave=4, min_span=2 * BLOCK, wave_span=2 * BLOCK, max_span=2 * BLOCK, multiple=BLOCK)
LENGTHS = (0, 1, BLOCK - 1, BLOCK + 1, 96)
MAX_SLOTS = 96
ROWS = jnp.array([3, 0, 5, 1, 2, 4], jnp.int32)
POWER = jnp.array([1, 2, 2, 1, 1, 0], jnp.int32)

reference = jax.jit(decode_attention_reference, static_argnames=("address", "num_kv_heads", "scale"))


def slot_state(case, seed=5):
    """(position with a third of the slots dead, a score to add to)."""
    rng = np.random.default_rng(seed)
    shape = case.k_pages.shape[:2]
    position = np.where(rng.random(shape) < 1 / 3, -1, rng.integers(0, 99, shape))
    return jnp.asarray(position, jnp.int32), jnp.asarray(rng.random(shape), jnp.float32)


def run(case, q, heads, mode, **options):
    """(out, lse[, score]) with small tiles and spans."""
    work = decode_work_list(case.lengths, ROWS, num_kv_heads=heads, max_slots=MAX_SLOTS, limits=LIMITS)
    options |= {
        "num_kv_heads": heads,
        "scale": q.shape[2] ** -0.5,
        "work": work,
        "tile": TILE,
        "return_lse": True,
        **mode,
    }
    return decode_attention(q, *case[:4], ROWS, address=case.address, **options)


def paged(granularity="per_head", heads=2, dim=64, page=8, dtype=jnp.float32):
    return make_paged(
        lengths=LENGTHS, granularity=granularity, heads=heads, dim=dim, page=page, columns=MAX_SLOTS // page,
        dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("granularity", "heads", "group", "dim", "page", "dtype", "dead"),
    [
        ("per_head", 2, 4, 64, 8, jnp.float32, True),
        ("per_head", 2, 7, 80, 4, jnp.bfloat16, True),
        ("per_head", 1, 1, 64, 32, jnp.float32, False),
        ("shared", 2, 4, 128, 16, jnp.float16, False),
    ],
)
def test_adds_the_powers_of_the_probabilities(mode, granularity, heads, group, dim, page, dtype, dead):
    case = paged(granularity, heads, dim, page, dtype)
    position, score = slot_state(case)
    position = position if dead else None
    q = normal(1, len(ROWS), heads * group, dim, dtype=dtype)
    out, lse, got = run(case, q, heads, mode, position=position, score=score, power=POWER)
    *attention, expected = reference(
        q, *case[:4], ROWS, address=case.address, num_kv_heads=heads, scale=dim**-0.5, position=position, score=score,
        power=POWER,
    )  # fmt: skip
    assert_same_attention((out, lse), attention, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
    untouched = np.asarray(expected) == np.asarray(score)
    np.testing.assert_array_equal(np.asarray(got)[untouched], np.asarray(score)[untouched])
    # The same without a record.
    plain = run(case, q, heads, mode, position=position)
    np.testing.assert_array_equal(plain[0], out)


@pytest.mark.parametrize("mode", MODES)
def test_a_probability_mass_of_one_a_query_head(mode):
    case = paged()
    position, score = slot_state(case)
    q = normal(1, len(ROWS), 8, 64, dtype=jnp.float32)
    power = jnp.array([1, 1, 1, 0, 0, 0], jnp.int32)  # rows 3, null, 5
    _, lse, got = run(case, q, 2, mode, position=position, score=jnp.zeros_like(score), power=power)
    attending = np.asarray(lse)[np.asarray(power) > 0] > -1e29
    np.testing.assert_allclose(np.asarray(got).sum(), attending.sum(), rtol=1e-5)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize(
    ("granularity", "group", "dim", "page", "dtype", "kept"),
    [
        ("per_head", 4, 64, 8, jnp.float32, None),
        ("per_head", 7, 80, 4, jnp.bfloat16, 6),  # heads of which all logits are kept, some, and none
        ("shared", 4, 128, 16, jnp.float16, 1),
    ],
)
def test_a_program_that_ends_a_head_scores_it(monkeypatch, mode, granularity, group, dim, page, dtype, kept):
    case = paged(granularity, 2, dim, page, dtype)
    position, score = slot_state(case)
    q = normal(1, len(ROWS), 2 * group, dim, dtype=dtype)
    monkeypatch.setattr(merge_items, "_MANY_HEADS", 1)
    if kept is not None:
        size = kept_logits.kept_dtype(dtype).itemsize
        monkeypatch.setattr(kept_logits, "_MOST_BYTES", kept * kept_logits.ALIGNMENT * group * size)
    jax.clear_caches()
    *attention, got = run(case, q, 2, mode, position=position, score=score, power=POWER)
    jax.clear_caches()
    *expected_attention, expected = reference(
        q, *case[:4], ROWS, address=case.address, num_kv_heads=2, scale=dim**-0.5, position=position, score=score,
        power=POWER,
    )  # fmt: skip
    assert_same_attention(attention, expected_attention, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("power", [1, 2])
def test_whole_heads_score_many_slots_step_by_step(power):
    case = make_paged(
        lengths=(0, 700, 513, 1100), granularity="per_head", heads=2, dim=16, page=32, columns=36, dtype=jnp.float32
    )
    position, score = slot_state(case)
    rows, heads = jnp.array([3, 1, 2], jnp.int32), 2
    q = normal(1, len(rows), heads * 3, 16, dtype=jnp.float32)
    limits = SpanLimits(wave=1, min_span=1152, wave_span=9600, max_span=1152)
    work = decode_work_list(case.lengths, rows, num_kv_heads=heads, max_slots=36 * 32, limits=limits)
    assert int(work.parts.max()) == 1
    options = {"address": case.address, "num_kv_heads": heads, "scale": 0.25, "position": position, "score": score}
    options["power"] = jnp.full(3, power, jnp.int32)
    mode = {"implementation": "triton", "interpret": True, "work": work, "tile": DecodeTile(64, 2, 3)}
    got = decode_attention(q, *case[:4], rows, **options, **mode)[1]
    np.testing.assert_allclose(got, reference(q, *case[:4], rows, **options)[2], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "batch", "longest", "page", "kept"), [(8, 64, 2111, 32, 1), (4, 80, 4200, 16, 1), (8, 64, 2111, 32, 0.5)]
)
def test_many_heads_on_the_gpu(monkeypatch, heads, batch, longest, page, kept):
    """kept: of the logits, what has a place."""
    case = make_paged(
        lengths=(0, *range(longest - batch, longest)), granularity="per_head", heads=heads, dim=128, page=page,
        columns=-(-longest // page), dtype=jnp.bfloat16,
    )  # fmt: skip
    monkeypatch.setattr(kept_logits, "_MOST_BYTES", int(kept * batch * heads * 4 * 2 * longest))
    jax.clear_caches()
    position, score = slot_state(case)
    rows = jnp.arange(1, batch + 1, dtype=jnp.int32)
    q = normal(1, batch, heads * 4, 128, dtype=jnp.bfloat16)
    options = {"address": case.address, "num_kv_heads": heads, "scale": 128**-0.5, "position": position}
    options |= {"score": score, "power": jnp.ones(batch, jnp.int32)}
    got = decode_attention(q, *case[:4], rows, **options, implementation="triton")[1]
    jax.clear_caches()
    expected = decode_attention(q, *case[:4], rows, **options, implementation="xla")[1]
    np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kept", [1, 4])
def test_logits_that_have_no_place_are_computed_again(monkeypatch, kept):
    case = paged(page=4)
    position, score = slot_state(case)
    q = normal(1, len(ROWS), 8, 64, dtype=jnp.float32)
    mode = {"implementation": "triton", "interpret": True}
    whole = run(case, q, 2, mode, position=position, score=score, power=POWER)[2]
    monkeypatch.setattr(kept_logits, "_MOST_BYTES", kept * kept_logits.ALIGNMENT * 4 * 4)
    jax.clear_caches()
    part = run(case, q, 2, mode, position=position, score=score, power=POWER)[2]
    jax.clear_caches()
    np.testing.assert_allclose(part, whole, rtol=1e-6, atol=1e-6)


def test_places_do_not_overlap_and_are_for_those_that_record():
    lengths = jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 7, 3)), jnp.int32)
    rows, power = jnp.array([2, 5, 1], jnp.int32), jnp.array([1, 0, 2], jnp.int32)
    places = np.asarray(kept_logits.logit_places(lengths, rows, power, heads=3)).reshape(2, 3, 3)
    first = places * kept_logits.ALIGNMENT
    length = np.asarray(lengths[:, rows])
    most = kept_logits.most_places(9, 4, 100, jnp.float32)
    for layer in range(2):
        used = np.zeros(most, int)
        for b, h in np.ndindex(3, 3):
            if power[b] > 0:
                used[first[layer, b, h] : first[layer, b, h] + length[layer, b, h]] += 1
            else:
                assert places[layer, b, h] > most
        assert used.max() == 1
        assert used.sum() == length[layer, np.asarray(power) > 0].sum()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("dim", "group"), [(64, 7), (128, 4), (128, 1), (256, 8)])
def test_default_tiles_on_the_gpu(dtype, dim, group):
    heads = 2
    case = make_paged(
        lengths=(0, 3000, 65, 1), granularity="per_head", heads=heads, dim=dim, page=32, columns=94, dtype=dtype
    )
    rows, power = jnp.array([2, 1, 4, 3], jnp.int32), jnp.array([2, 1, 1, 1], jnp.int32)
    position, score = slot_state(case)
    q = normal(1, len(rows), heads * group, dim, dtype=dtype)
    options = {"address": case.address, "num_kv_heads": heads, "scale": dim**-0.5, "position": position, "power": power}
    *attention, expected = reference(q, *case[:4], rows, score=score, **options)
    results = [
        decode_attention(q, *case[:4], rows, score=score, return_lse=True, implementation="triton", **options)
        for _ in range(2)
    ]
    assert_same_attention(results[0][:2], attention, dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(results[0][2], expected, rtol=tolerance, atol=tolerance)
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize(
    ("granularity", "batch", "q_heads", "heads", "dim", "dtype", "dead"),
    [
        ("per_head", 64, 32, 8, 128, jnp.bfloat16, True),
        ("per_head", 256, 28, 4, 128, jnp.float16, False),
        ("shared", 8, 14, 2, 64, jnp.float32, True),
    ],
)
def test_lowers_for_cuda_in_place(granularity, batch, q_heads, heads, dim, dtype, dead):
    layers, table_heads = table_shape(granularity, heads)
    shape = jax.ShapeDtypeStruct
    pool, rows = shape((1 << 18, 32, dim), dtype), batch + 1
    function = functools.partial(
        decode_attention, address=make_address(granularity, heads), num_kv_heads=heads, scale=1.0
    )
    text = lower_for_h200(
        lambda q, k, v, table, lengths, rows, position, score, power: function(
            q, k, v, table, lengths, rows, position=position, score=score, power=power
        ),
        shape((batch, q_heads, dim), dtype),
        pool,
        pool,
        shape((layers, rows, table_heads, 4096), jnp.int32),
        shape((layers, rows, table_heads), jnp.int32),
        shape((batch,), jnp.int32),
        shape(pool.shape[:2], jnp.int32) if dead else None,
        shape(pool.shape[:2], jnp.float32),
        shape((batch,), jnp.int32),
        donate_argnums=7,
    )
    # All that there are write into the score. Many heads are merged by the programs that end them, which count the ends
    # in place; few by a second kernel, in place of the outputs of the first.
    kernels, aliases = (2, 3) if batch * heads >= 256 else (3, 4)
    assert (triton_calls(text), kernel_aliases(text), donated_arguments(text)) == (kernels, aliases, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"score": None}, ValueError, "score and power go together"),
        ({"power": jnp.ones(3, jnp.int32)}, ValueError, "power has shape"),
        ({"score": jnp.zeros((2, 3))}, ValueError, "score has shape"),
        ({"score": jnp.zeros((17, 4), jnp.bfloat16)}, TypeError, "score must be float32"),
        ({"position": jnp.zeros((2, 3), jnp.int32)}, ValueError, "position has shape"),
        ({"indices": jnp.zeros((2, 1, 4), jnp.int32)}, ValueError, "indices cannot be combined"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    pool = jnp.zeros((17, 4, 64))
    arguments = {
        "q": jnp.zeros((2, 8, 64)),
        "k_pages": pool,
        "v_pages": pool,
        "page_table": jnp.zeros((2, 3, 2, 2), jnp.int32),
        "lengths": jnp.zeros((2, 3, 2), jnp.int32),
        "rows": jnp.array([1, 2], jnp.int32),
        "score": jnp.zeros((17, 4)),
        "power": jnp.ones(2, jnp.int32),
    }
    address = make_address("per_head", 2)
    with pytest.raises(error, match=message):
        decode_attention(**{**arguments, **change}, address=address, num_kv_heads=2, scale=1.0)
