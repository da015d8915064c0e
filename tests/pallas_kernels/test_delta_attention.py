"""Attention over tokens that are read back in registers: kernel and XLA program against the reference."""

import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import make_delta, rotations
from kernel_cases import MODES, assert_same_attention, normal

from pallas_kernels import DecodeTile, SpanLimits, delta_attention, delta_attention_reference, delta_work_list
from pallas_kernels.delta_store import view_positions

HISTORIES, RECENTS = (0, 2, 3, 19, 40, 0), (5, 0, 1, 12, 7, 0)
TOP = 24
TILE = DecodeTile(16, num_warps=2, num_stages=1)
LIMITS = SpanLimits(wave=4, min_span=16, wave_span=16, max_span=16, multiple=16)


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
    ("heads", "group", "dim", "size", "page", "dtype", "latent_dtype", "bias"),
    [
        (2, 4, 16, 32, 8, jnp.float32, "float32", True),
        (2, 7, 64, 64, 16, jnp.bfloat16, "int4", False),
        (3, 1, 80, 40, 4, jnp.float32, "float32", False),
        (1, 4, 128, 160, 32, jnp.bfloat16, "bfloat16", True),
        (1, 4, 32, 96, 32, jnp.float32, "int4", True),
    ],
)
def test_attends_to_what_reading_back_gives(mode, heads, group, dim, size, page, dtype, latent_dtype, bias):
    case, up, up_bias = make(heads, dim, size, page, dtype, latent_dtype, bias)
    positions = listed(case)
    cos, sin = rotations(np.maximum(positions, 0), dim)
    q = normal(4, len(HISTORIES), heads * group, dim, dtype=dtype)
    arguments = (q, case.store, case.rows, case.recent_rows, case.history, positions, cos, sin, up, up_bias)
    options = {"layout": case.layout, "num_kv_heads": heads, "scale": dim**-0.5}
    work = delta_work_list(positions, num_kv_heads=heads, limits=LIMITS)
    got = delta_attention(*arguments, **options, return_lse=True, work=work, tile=TILE, **mode)
    assert_same_attention(got, delta_attention_reference(*arguments, **options), dtype)


def test_the_view_of_a_row_is_its_sinks_what_is_recent_and_what_was_selected():
    selected = jnp.array([[7, 9, -1], [-1, -1, -1], [-1, -1, -1]], jnp.int32)
    view = view_positions(selected, jnp.array([10, 1, 0]), jnp.array([12, 2, 0]), sinks=2, ring=4)
    assert np.asarray(view).tolist() == [
        [0, 1, 10, 11, -1, -1, 7, 9, -1],
        [0, -1, 1, -1, -1, -1, -1, -1, -1],
        [-1] * 9,
    ]
