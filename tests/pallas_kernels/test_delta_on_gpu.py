"""The DeltaKV kernels with their own tiles at the sizes of an 8B model, on a GPU, against the XLA programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_cases import make_delta, rotations
from kernel_cases import TOLERANCE, normal

from pallas_kernels import (
    DeltaTile,
    delta_attention,
    delta_attention_triton,
    delta_compress,
    delta_reconstruct,
    reference_mean,
    reference_search,
)
from pallas_kernels.centers import center_count
from pallas_kernels.delta_store import view_positions

pytestmark = pytest.mark.gpu

HISTORIES, RECENTS, RING, SINKS, STEP = (3000, 0, 517, 1500), (200, 3, 256, 128), 256, 16, 10
TILES = [
    DeltaTile(128, 8, 3, 128, 8),
    DeltaTile(64, 4, 2, 32, 4),
]


def make(heads, dim, size, dtype, latent_dtype):
    case = make_delta(
        histories=HISTORIES, recents=RECENTS, heads=heads, dim=dim, size=size, page=32, dtype=dtype,
        latent_dtype=latent_dtype, sinks=SINKS, step=STEP, ring=RING,
    )  # fmt: skip
    return case, normal(1, size, 2 * heads * dim, dtype=dtype) * jnp.asarray(size**-0.5, dtype)


def close(got, expected, dtype):
    tolerance = TOLERANCE[jnp.dtype(dtype)]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=tolerance, atol=tolerance
        )


SHAPES = [
    (8, 4, 128, 512, jnp.bfloat16, "bfloat16"),
    (8, 4, 128, 512, jnp.bfloat16, "int4"),
    (4, 7, 128, 256, jnp.bfloat16, "int4"),
    (2, 8, 64, 192, jnp.float16, "float16"),
    (2, 1, 80, 96, jnp.float32, "float32"),
]


@pytest.mark.parametrize("tile", [None, *TILES])
@pytest.mark.parametrize(("heads", "group", "dim", "size", "dtype", "latent_dtype"), SHAPES)
def test_attention(heads, group, dim, size, dtype, latent_dtype, tile):
    if tile is not None and dtype == jnp.float32:
        pytest.skip("the tile is for 16 bits")
    case, up = make(heads, dim, size, dtype, latent_dtype)
    rng = np.random.default_rng(0)
    selected = np.full((len(HISTORIES), 1024), -1, np.int32)
    for b, n in enumerate(HISTORIES):
        every = np.sort(rng.permutation(np.arange(SINKS, n))[:1024])
        selected[b, : every.size] = every
    positions = view_positions(jnp.asarray(selected), case.history, case.lengths, sinks=SINKS, ring=RING)
    cos, sin = rotations(np.maximum(positions, 0), dim)
    q = normal(4, len(HISTORIES), heads * group, dim, dtype=dtype)
    arguments = (q, case.store, case.rows, case.recent_rows, case.history, positions, cos, sin, up)
    options = {"layout": case.layout, "num_kv_heads": heads, "scale": dim**-0.5, "return_lse": True}
    got = delta_attention(*arguments, **options, tile=tile, implementation="triton")
    close(got, delta_attention(*arguments, **options, implementation="xla"), dtype)


def test_attention_in_few_parts_of_many_blocks(monkeypatch):
    monkeypatch.setattr(delta_attention_triton, "_MOST_PARTS", 4)
    test_attention(*SHAPES[0], tile=DeltaTile(64, 4, 2, 16, 4))  # a tile of its own, compiled for the bound above


def test_attention_with_longer_parts_of_latents(monkeypatch):
    monkeypatch.setattr(delta_attention_triton, "_FEW_PROGRAMS", 16)
    test_attention(*SHAPES[0], tile=DeltaTile(64, 4, 2, 64, 4))  # likewise


@pytest.mark.parametrize(("heads", "group", "dim", "size", "dtype", "latent_dtype"), SHAPES)
def test_reconstruction(heads, group, dim, size, dtype, latent_dtype):
    case, up = make(heads, dim, size, dtype, latent_dtype)
    length = 4096
    arguments = (*case[:1], *case[2:], *rotations(np.arange(length)[None], dim))
    options = {"layout": case.layout, "num_kv_heads": heads, "up": up}
    got, expected = (
        delta_reconstruct(*arguments, **options, implementation=implementation) for implementation in ("triton", "xla")
    )

    def read(pages):
        x = pages.reshape(len(HISTORIES), length // 32, heads, 32, dim).swapaxes(2, 3)
        x = x.reshape(len(HISTORIES), length, heads, dim)
        return jnp.where((jnp.arange(length) < case.lengths[:, None])[..., None, None], x, 0)

    close(map(read, got), map(read, expected), dtype)


@pytest.mark.parametrize("tokens", [(700, 300), (64, 64)])
@pytest.mark.parametrize(("heads", "group", "dim", "size", "dtype", "latent_dtype"), SHAPES)
def test_search_and_compression(heads, group, dim, size, dtype, latent_dtype, tokens):
    case, _ = make(heads, dim, size, dtype, latent_dtype)
    features = 2 * heads * dim
    ends = np.array([HISTORIES[0], HISTORIES[3]])
    positions = np.concatenate([np.arange(end - n, end) for end, n in zip(ends, tokens, strict=True)])
    starts = jnp.asarray(np.cumsum([0, *tokens]), jnp.int32)
    padded = jnp.asarray(np.pad(positions, (0, 37)), jnp.int32)
    x = normal(3, padded.size, features, dtype=dtype)
    where = (case.store.k_pages, case.store.v_pages, case.store.near_table, case.rows[jnp.array([0, 3])], starts)
    options = {"address": case.layout.near, "num_kv_heads": heads}

    def run(implementation):
        ids = reference_search(
            x, *where, padded, neighbors=4, sinks=SINKS, step=STEP, **options, implementation=implementation
        )
        return np.asarray(ids)

    got, expected = run("triton"), run("xla")
    counts = np.asarray([center_count(int(p) + 1, sinks=SINKS, step=STEP) for p in positions])
    assert (got[: positions.size] < counts[:, None]).all()
    # Sums of products in another order may change places of centers that are all but equally near.
    assert (got == expected).mean() > 0.995
    np.testing.assert_array_equal(got[positions.size :], 0)
    down = normal(4, features, size, dtype=dtype) * jnp.asarray(features**-0.5, dtype)
    for function, extra in ((delta_compress, (down,)), (reference_mean, ())):
        first = (x,) if extra else ()
        results = [
            function(*first, *where, jnp.asarray(expected), *extra, **options, implementation=implementation)
            for implementation in ("triton", "xla")
        ]
        close(*([result[: positions.size]] for result in results), dtype)
    assert jax.default_backend() == "gpu"
