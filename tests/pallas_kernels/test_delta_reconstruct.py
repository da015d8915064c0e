"""Reading tokens of a DeltaKV store back into pages: kernel and XLA program against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import abstract_store, make_delta, rotations
from kernel_cases import MODES, TOLERANCE, normal
from lowering import lower_for_h200, triton_calls

from pallas_kernels import (
    delta_reconstruct,
    delta_reconstruct_reference,
    prefill_attention,
    read_latents,
    scratch_address,
    scratch_table,
)
from pallas_kernels.delta_reference import read_back_reference

HISTORIES, RECENTS = (0, 2, 3, 19, 40), (5, 0, 1, 12, 7)
LENGTH = 47


def read_slots(pages, tokens, heads, positions):
    """[S, T, H, D] of the scratch, 0 where positions < 0."""
    page = pages.shape[1]
    segments = positions.shape[0]
    columns = -(-tokens // page)
    x = pages.reshape(segments, columns, heads, page, -1).swapaxes(2, 3)
    x = np.asarray(x.reshape(segments, columns * page, heads, -1), np.float32)[:, :tokens]
    return np.where((np.asarray(positions) >= 0)[..., None, None], x, 0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("heads", "dim", "size", "page", "dtype", "latent_dtype", "listed", "bias"),
    [
        (2, 16, 32, 8, jnp.float32, "float32", False, True),
        (2, 64, 64, 16, jnp.bfloat16, "int4", False, False),
        (3, 80, 40, 4, jnp.float32, "float32", True, False),
        (1, 128, 160, 32, jnp.bfloat16, "bfloat16", True, True),
    ],
)
def test_reads_back_what_the_store_holds(mode, heads, dim, size, page, dtype, latent_dtype, listed, bias):
    case = make_delta(
        histories=HISTORIES, recents=RECENTS, heads=heads, dim=dim, size=size, page=page, dtype=dtype,
        latent_dtype=latent_dtype,
    )  # fmt: skip
    features = 2 * heads * dim
    up = normal(1, size, features, dtype=dtype) * size**-0.5
    up_bias = normal(2, features, dtype=dtype) if bias else None
    every = np.broadcast_to(np.arange(LENGTH), (len(HISTORIES), LENGTH))
    live = np.where(every < np.asarray(case.lengths)[:, None], every, -1)
    positions = None
    if listed:
        rng = np.random.default_rng(3)
        live = np.stack([rng.permutation(row) for row in live])
        live[:, ::5] = -1
        positions = jnp.asarray(live, jnp.int32)
    cos, sin = rotations(np.maximum(live, 0) if listed else every[:1], dim)
    arguments = (*case[:1], *case[2:], cos, sin)
    options = {"layout": case.layout, "num_kv_heads": heads, "positions": positions, "up": up, "up_bias": up_bias}
    got = delta_reconstruct(*arguments, **options, **mode)
    expected = delta_reconstruct_reference(*arguments, **options)
    tolerance = TOLERANCE[jnp.dtype(dtype)]
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        np.testing.assert_allclose(
            read_slots(one, LENGTH, heads, live), read_slots(other, LENGTH, heads, live), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("mode", MODES)
def test_a_residual_takes_the_place_of_up(mode):
    heads, dim, size = 2, 16, 32
    case = make_delta(histories=(0, 19), recents=(5, 12), heads=heads, dim=dim, size=size, page=8, dtype=jnp.float32)
    up = normal(1, size, 2 * heads * dim, dtype=jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))
    positions = jnp.where(positions < case.lengths[:, None], positions, -1)
    z = read_latents(case.store, case.rows, case.history, positions, layout=case.layout)
    residual = jnp.einsum("btd,df->btf", z, up, precision="highest")
    arguments = (*case[:1], *case[2:], *rotations(np.arange(LENGTH)[None], dim))
    options = {"layout": case.layout, "num_kv_heads": heads}
    got = delta_reconstruct(*arguments, residual=residual, **options, **mode)
    expected = delta_reconstruct_reference(*arguments, up=up, **options)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            *(read_slots(x, LENGTH, heads, positions) for x in (one, other)), rtol=1e-4, atol=1e-4
        )


# What the interpreted kernel writes is tested above, and this is about the pages that attention reads.
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.id != "interpreted"])
def test_a_chunk_attends_to_the_scratch(mode):
    heads, dim, page, length = 2, 64, 16, 47
    case = make_delta(histories=(40, 0), recents=(7, 0), heads=heads, dim=dim, size=32, page=page, dtype=jnp.float32)
    up = normal(1, 32, 2 * heads * dim, dtype=jnp.float32) * 0.2
    cos, sin = rotations(np.arange(64)[None], dim)
    scratch = delta_reconstruct(*case[:1], *case[2:], cos, sin, layout=case.layout, num_kv_heads=heads, up=up, **mode)
    q, k, v = (normal(5 + i, 2, heads, dim, dtype=jnp.float32) for i in range(3))
    out = prefill_attention(
        q, k, v, *scratch, scratch_table(2, 64 // page), jnp.pad(case.lengths, (1, 0))[None, :, None],
        jnp.array([1, 2], jnp.int32), jnp.array([0, 1, 2], jnp.int32), address=scratch_address(heads), scale=0.1,
        **mode,
    )  # fmt: skip
    positions = np.where(np.arange(length) < np.asarray(case.lengths)[:, None], np.arange(length), -1)
    rotation = (np.broadcast_to(x, (2, *x.shape[1:])) for x in (cos, sin))
    old = read_back_reference(case.store, *case[2:5], positions, *rotation, up, layout=case.layout, num_kv_heads=heads)
    for s, held in enumerate((length, 0)):
        keys, values = (np.concatenate([x[s, :held], y[s : s + 1]]) for x, y in zip(old, (k, v), strict=True))
        weights = jax.nn.softmax(0.1 * np.einsum("hd,nhd->hn", q[s], keys), axis=-1)
        np.testing.assert_allclose(out[s], np.einsum("hn,nhd->hd", weights, values), rtol=1e-4, atol=1e-4)


def test_rotation_at_position_one_million_is_that_of_the_arrays():
    case = make_delta(histories=(5,), recents=(2,), heads=1, dim=16, size=32, page=8, dtype=jnp.float32)
    cos, sin = rotations(np.full((1, 8), 1_000_000) + np.arange(8), 16)
    up = jnp.zeros((32, 32), jnp.float32)
    (k, _), (plain, _) = (
        delta_reconstruct(*case[:1], *case[2:], c, s, layout=case.layout, num_kv_heads=1, up=up, implementation="xla")
        for c, s in ((cos, sin), (jnp.ones_like(cos), jnp.zeros_like(sin)))
    )
    first, second = np.split(np.asarray(k[0, :7]), 2, axis=-1)
    c, s = np.asarray(cos[0, :7], np.float64), np.asarray(sin[0, :7], np.float64)
    back = np.concatenate([first * c + second * s, second * c - first * s], axis=-1)
    np.testing.assert_allclose(back, plain[0, :7], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("segments", "heads", "dim", "size", "tokens", "dtype", "latent_dtype", "listed", "projected"),
    [
        (1, 8, 128, 512, 131072, jnp.bfloat16, "bfloat16", False, True),
        (1, 8, 128, 512, 131072, jnp.bfloat16, "int4", False, True),
        (8, 4, 128, 256, 2320, jnp.bfloat16, "int4", True, False),
        (2, 2, 80, 96, 1000, jnp.float32, "float32", True, True),
    ],
)
def test_lowers_for_cuda_at_production_shapes(
    segments, heads, dim, size, tokens, dtype, latent_dtype, listed, projected
):
    store, layout = abstract_store(
        heads=heads, dim=dim, size=size, dtype=dtype, latent_dtype=latent_dtype, requests=segments
    )
    shape = jax.ShapeDtypeStruct
    row = shape((segments,), jnp.int32)
    rotation = shape((segments if listed else 1, tokens, dim // 2), jnp.float32)
    features = 2 * heads * dim
    given = {
        "positions": shape((segments, tokens), jnp.int32) if listed else None,
        "up": shape((size, features), dtype) if projected else None,
        "up_bias": shape((features,), dtype) if projected else None,
        "residual": None if projected else shape((segments, tokens, features), dtype),
    }
    function = functools.partial(delta_reconstruct, layout=layout, num_kv_heads=heads)
    text = lower_for_h200(
        lambda given, *at: function(*at, **given), given, store, row, row, row, row, rotation, rotation
    )
    assert triton_calls(text) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": None}, "either up or residual"),
        ({"up": jnp.zeros((16, 64))}, "up has shape"),
        ({"num_kv_heads": 3}, "up has shape"),
        ({"cos": jnp.zeros((1, 8, 16))}, "cos has shape"),
        ({"rows": jnp.zeros(3, jnp.int32)}, "recent_rows has shape"),
    ],
)
def test_errors_name_the_argument(change, message):
    case = make_delta(histories=(5,), recents=(2,), heads=2, dim=16, size=32, page=8, dtype=jnp.float32)
    cos, sin = rotations(np.arange(8)[None], 16)
    arguments = {**case._asdict(), "cos": cos, "sin": sin, "num_kv_heads": 2, "up": jnp.zeros((32, 64))}
    with pytest.raises(ValueError, match=message):
        delta_reconstruct(**{**arguments, **change})


def test_the_scratch_table_lists_every_page_once():
    table, address = scratch_table(3, 4), scratch_address(2)
    pages = sorted(int(address.page(entry, h)) for entry in np.asarray(table[0, 1:]).ravel() for h in range(2))
    assert pages == list(range(3 * 4 * 2))
    assert jax.tree.leaves(table)[0][0, 0].sum() == 0
