"""Attention over tokens that are read back in registers: kernel and XLA program against the reference."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import abstract_store, make_delta, rotations
from kernel_cases import MODES, assert_same_attention, normal
from lowering import lower_for_h200, triton_calls

from pallas_kernels import DeltaTile, delta_attention, delta_attention_reference, delta_attention_triton, delta_places
from pallas_kernels.delta_store import view_positions

HISTORIES, RECENTS = (0, 2, 3, 19, 40, 0), (5, 0, 1, 12, 7, 0)
TOP = 24


def listed(case, seed=0):
    """Positions [B, V]: sinks, recent tokens and TOP of the history, or as many as there are."""
    rng = np.random.default_rng(seed)
    selected = np.full((len(HISTORIES), TOP), -1, np.int32)
    for b, n in enumerate(HISTORIES):
        every = rng.permutation(np.arange(case.layout.sinks, n))[:TOP]
        selected[b, : every.size] = np.sort(every)
    return view_positions(
        jnp.asarray(selected), case.history, case.lengths, sinks=case.layout.sinks, ring=case.layout.ring
    )


def make(heads, dim, size, page, dtype, latent_dtype="float32", bias=False):
    case = make_delta(
        histories=HISTORIES, recents=RECENTS, heads=heads, dim=dim, size=size, page=page, dtype=dtype,
        latent_dtype=latent_dtype,
    )  # fmt: skip
    features = 2 * heads * dim
    up = normal(1, size, features, dtype=dtype) * size**-0.5
    return case, up, normal(2, features, dtype=dtype) if bias else None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("heads", "group", "dim", "size", "page", "dtype", "latent_dtype", "bias", "block"),
    [
        (2, 4, 16, 96, 8, jnp.float32, "int4", True, 32),
        (2, 7, 64, 64, 16, jnp.bfloat16, "int4", False, 16),
        (3, 1, 80, 40, 4, jnp.float32, "float32", False, 64),
        (1, 4, 128, 160, 32, jnp.bfloat16, "bfloat16", True, 16),
    ],
)
def test_attends_to_what_reading_back_gives(mode, heads, group, dim, size, page, dtype, latent_dtype, bias, block):
    case, up, up_bias = make(heads, dim, size, page, dtype, latent_dtype, bias)
    positions = listed(case)
    cos, sin = rotations(np.maximum(positions, 0), dim)
    q = normal(4, len(HISTORIES), heads * group, dim, dtype=dtype)
    arguments = (q, case.store, case.rows, case.recent_rows, case.history, positions, cos, sin, up, up_bias)
    options = {"layout": case.layout, "num_kv_heads": heads, "scale": dim**-0.5}
    want = delta_attention_reference(*arguments, **options)
    tile = DeltaTile(32, 2, 1, block, 2)
    for plain in (0, positions.shape[1] - TOP):
        got = delta_attention(*arguments, **options, plain=plain, return_lse=True, tile=tile, **mode)
        assert_same_attention(got, want, dtype)


@pytest.mark.parametrize(("most_parts", "few_programs"), [(2, 264), (64, 1), (64, 3)])
def test_a_part_of_a_long_list_is_many_blocks(monkeypatch, most_parts, few_programs):
    """Of references and latents alike, or of latents more."""
    jax.clear_caches()
    monkeypatch.setattr(delta_attention_triton, "_MOST_PARTS", most_parts)
    monkeypatch.setattr(delta_attention_triton, "_FEW_PROGRAMS", few_programs)
    case, up, _ = make(2, 16, 40, 8, jnp.float32)
    positions = listed(case)
    cos, sin = rotations(np.maximum(positions, 0), 16)
    q = normal(4, len(HISTORIES), 6, 16, dtype=jnp.float32)
    arguments = (q, case.store, case.rows, case.recent_rows, case.history, positions, cos, sin, up, None)
    options = {"layout": case.layout, "num_kv_heads": 2, "scale": 0.25}
    mode = {"implementation": "triton", "interpret": True}
    plain = positions.shape[1] - TOP
    got = delta_attention(*arguments, **options, plain=plain, return_lse=True, tile=DeltaTile(16, 2, 1, 16, 1), **mode)
    assert_same_attention(got, delta_attention_reference(*arguments, **options), jnp.float32)
    jax.clear_caches()


@pytest.mark.parametrize("latent_dtype", ["float32", "int4"])
def test_places_looked_up_for_layers_together_are_each_ones_own(latent_dtype):
    case, up, _ = make(2, 16, 64, 8, jnp.float32, latent_dtype)
    positions = listed(case)
    cos, sin = rotations(np.maximum(positions, 0), 16)
    q = normal(4, len(HISTORIES), 6, 16, dtype=jnp.float32)
    rows = (case.rows, case.recent_rows, case.history, positions)
    mode = {"implementation": "triton", "interpret": True}
    others = [
        dataclasses.replace(
            case.layout,
            near=dataclasses.replace(case.layout.near, layer_offset=2 * layer),
            latent=dataclasses.replace(case.layout.latent, layer_offset=layer),
        )
        for layer in (0, 2)
    ]
    layouts = [others[0], case.layout, others[1]]
    together = delta_places(case.store, *rows, layouts=layouts, **mode)
    xla = delta_places(case.store, *rows, layouts=layouts, implementation="xla")
    for layout, *places in zip(layouts, together, xla, strict=True):
        (alone,) = delta_places(case.store, *rows, layouts=[layout], **mode)
        for each in places:
            jax.tree.map(np.testing.assert_array_equal, each, alone)
    arguments = (q, case.store, *rows, cos, sin, up, None)
    options = {"layout": case.layout, "num_kv_heads": 2, "scale": 0.25}
    want = delta_attention_reference(*arguments, **options)
    for each in (mode, {"implementation": "xla"}):
        got = delta_attention(*arguments, together[1], **options, return_lse=True, **each)
        assert_same_attention(got, want, jnp.float32)
        # It reads what the places say, here those of another layer.
        other, _ = delta_attention(*arguments, together[0], **options, return_lse=True, **each)
        assert not np.allclose(other, want[0], equal_nan=False)


def test_places_of_many_layers_lower_for_cuda():
    store, layout = abstract_store(heads=8, dim=128, size=512, dtype=jnp.bfloat16, latent_dtype="bfloat16", requests=8)
    layouts = [
        dataclasses.replace(layout, latent=dataclasses.replace(layout.latent, layer_offset=layer)) for layer in range(9)
    ]
    row = jax.ShapeDtypeStruct((8,), jnp.int32)
    positions = jax.ShapeDtypeStruct((8, 2320), jnp.int32)
    find = functools.partial(delta_places, layouts=layouts)
    assert triton_calls(lower_for_h200(find, store, row, row, row, positions)) == 1


def test_layers_looked_up_together_differ_in_the_layer_only():
    case, *_ = make(2, 16, 64, 8, jnp.float32)
    rows = (case.rows, case.recent_rows, case.history, listed(case))
    with pytest.raises(ValueError, match="layouts must differ in the layer only"):
        delta_places(case.store, *rows, layouts=[case.layout, dataclasses.replace(case.layout, ring=5)])
    with pytest.raises(ValueError, match="layouts must have one layer"):
        delta_places(case.store, *rows, layouts=[])


def test_the_view_of_a_row_is_its_sinks_what_is_recent_and_what_was_selected():
    selected = jnp.array([[7, 9, -1], [-1, -1, -1], [-1, -1, -1]], jnp.int32)
    view = view_positions(selected, jnp.array([10, 1, 0]), jnp.array([12, 2, 0]), sinks=2, ring=4)
    assert np.asarray(view).tolist() == [
        [7, 9, -1, 0, 1, 10, 11, -1, -1],
        [-1, -1, -1, 0, -1, 1, -1, -1, -1],
        [-1] * 9,
    ]


@pytest.mark.parametrize(
    ("batch", "q_heads", "heads", "dim", "size", "dtype", "latent_dtype", "bias", "top"),
    [
        (8, 32, 8, 128, 512, jnp.bfloat16, "bfloat16", False, 2048),
        (8, 32, 8, 128, 512, jnp.bfloat16, "int4", False, 2048),
        (1, 28, 4, 128, 256, jnp.bfloat16, "int4", True, 32768),
        (2, 6, 2, 80, 96, jnp.float32, "float32", True, 2048),
    ],
)
def test_lowers_for_cuda_at_production_shapes(batch, q_heads, heads, dim, size, dtype, latent_dtype, bias, top):
    store, layout = abstract_store(
        heads=heads, dim=dim, size=size, dtype=dtype, latent_dtype=latent_dtype, requests=batch
    )
    shape = jax.ShapeDtypeStruct
    row = shape((batch,), jnp.int32)
    width = 16 + 256 + top
    rotation = shape((batch, width, dim // 2), jnp.float32)
    features = 2 * heads * dim
    text = lower_for_h200(
        functools.partial(
            delta_attention, layout=layout, num_kv_heads=heads, scale=1.0, return_lse=True, plain=16 + 256
        ),
        shape((batch, q_heads, dim), dtype),
        store,
        row,
        row,
        row,
        shape((batch, width), jnp.int32),
        rotation,
        rotation,
        shape((size, features), dtype),
        shape((features,), dtype) if bias else None,
    )
    assert triton_calls(text) == 5


@pytest.mark.parametrize("plain", [-1, 73])
def test_no_more_tokens_are_without_a_latent_than_are_listed(plain):
    case, up, _ = make(1, 16, 32, 8, jnp.float32)
    positions = jnp.zeros((len(HISTORIES), 72), jnp.int32)
    cos, sin = rotations(np.maximum(positions, 0), 16)
    q = jnp.zeros((len(HISTORIES), 2, 16))
    with pytest.raises(ValueError, match="plain must be between 0 and the 72 listed tokens"):
        delta_attention(
            q, case.store, case.rows, case.recent_rows, case.history, positions, cos, sin, up, layout=case.layout,
            num_kv_heads=1, scale=1.0, plain=plain,
        )  # fmt: skip


def test_a_nonlinear_up_is_refused():
    case, up, _ = make(1, 16, 32, 8, jnp.float32)
    positions = listed(case)
    cos, sin = rotations(np.maximum(positions, 0), 16)
    q = jnp.zeros((len(HISTORIES), 2, 16))
    with pytest.raises(ValueError, match="up has shape"):
        delta_attention(
            q, case.store, case.rows, case.recent_rows, case.history, positions, cos, sin, up[:, :8],
            layout=case.layout, num_kv_heads=1, scale=1.0,
        )  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_gives_an_empty_result(mode):
    case, up, _ = make(1, 16, 32, 8, jnp.float32)
    none = jnp.zeros(0, jnp.int32)
    rotation = jnp.zeros((0, 4, 8))
    out, lse = delta_attention(
        jnp.zeros((0, 2, 16), jnp.bfloat16), case.store, none, none, none, jnp.zeros((0, 4), jnp.int32), rotation,
        rotation, up, layout=case.layout, num_kv_heads=1, scale=1.0, return_lse=True, **mode,
    )  # fmt: skip
    assert (out.shape, out.dtype, lse.shape) == ((0, 2, 16), jnp.bfloat16, (0, 2))
