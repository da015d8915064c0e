"""Linear layers: both implementations against the references, the kernel's tiles, lowering for CUDA, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import TOLERANCE, InterpretGPUParams, normal
from lowering import lower_for_h200, mosaic_calls

from pallas_kernels import LinearTile, add_linear, add_linear_reference, gated_linear, gated_linear_reference, linear
from pallas_kernels.linear import ADDED_TOKENS, GATED_TOKENS
from pallas_kernels.linear_mosaic import _TILES, DEPTH, TOKENS, best_tile, linear_mosaic


def operands(tokens, inner, columns, dtype=jnp.bfloat16):
    """x, weight and what is added, such that results are about 1."""
    scale = inner**-0.5
    return (
        normal(0, tokens, inner, dtype=dtype),
        normal(1, inner, columns, dtype=dtype) * scale,
        normal(2, tokens, columns, dtype=dtype),
    )


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


def assert_close(got, expected):
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE[jnp.dtype(expected.dtype)]
    np.testing.assert_allclose(
        np.asarray(got, np.float32), np.asarray(expected, np.float32), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_xla_equals_the_reference(dtype, biased):
    x, weight, total = operands(7, 24, 36, dtype)
    bias = normal(3, 36, dtype=dtype) if biased else None
    assert_close(gated_linear(x, weight, bias), gated_linear_reference(x, weight, bias))
    first, second = add_linear(total, x, weight, bias)
    assert_close(first + second, add_linear_reference(total, x, weight, bias))
    np.testing.assert_array_equal(np.asarray(second, np.float32), np.asarray(linear(x, weight, bias), np.float32))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the interpreter runs on the CPU")
@pytest.mark.parametrize(
    ("kind", "tile", "tokens", "steps", "columns", "programs"),
    [
        # Programs of two tiles and of one; pieces are fewer, as many and more than stages.
        ("gated", LinearTile(128, 2), TOKENS, 3, 384, 2),
        ("added", LinearTile(128, 2), 2 * TOKENS, 2, 384, 4),
        ("plain", LinearTile(128, 3), TOKENS, 1, 256, 3),
    ],
)
def test_interpreted(kind, tile, tokens, steps, columns, programs):
    x, weight, total = operands(tokens, steps * DEPTH, columns)
    assert InterpretGPUParams is not None
    got = linear_mosaic(
        x, weight, total if kind == "added" else None, gated=kind == "gated", tile=tile, programs=programs,
        interpret=InterpretGPUParams(),
    )  # fmt: skip
    if kind == "gated":
        expected = gated_linear_reference(x, weight)
    else:
        expected = add_linear_reference(total if kind == "added" else jnp.zeros_like(total), x, weight)
    assert_close(got, expected)


def test_tiles_fill_the_rounds_of_all_programs():
    tile = functools.partial(best_tile, programs=132)
    # 448 tiles are 3.4 rounds, which take as long as 4; 896 of half the width are 6.8, and take as long as 7.
    gated = {tokens: tile(tokens, 28672, gated=True).columns for tokens in (128, 256, 512, 1024, 2048, 8192)}
    assert gated == {128: 256, 256: 256, 512: 128, 1024: 256, 2048: 256, 8192: 256}
    added = {tokens: tile(tokens, 4096, gated=False).columns for tokens in (128, 512, 1024, 2048)}
    assert added == {128: 128, 512: 128, 1024: 256, 2048: 256}
    # Columns that only the narrower one divides.
    assert tile(2048, 128 * 3, gated=True) == _TILES[True][1]


SHAPES = {"llama-3.1-8b": (4096, 28672), "qwen2.5-7b": (3584, 37888), "llama-3.2-1b": (2048, 16384)}


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("tokens", [GATED_TOKENS - 1, GATED_TOKENS, GATED_TOKENS + 64, 512, ADDED_TOKENS])
def test_many_tokens_lower_to_the_kernel(model, tokens):
    hidden, columns = SHAPES[model]

    def mlp(x, gate_up, down):
        total, delta = add_linear(x, gated_linear(x, gate_up), down)
        return total if delta is None else total + delta

    text = lower_for_h200(mlp, shape(tokens, hidden), shape(hidden, columns), shape(columns // 2, hidden))
    assert mosaic_calls(text) == (tokens % TOKENS == 0) * ((tokens >= GATED_TOKENS) + (tokens >= ADDED_TOKENS))


@pytest.mark.parametrize(("gated", "tile"), [(gated, tile) for gated, tiles in _TILES.items() for tile in tiles])
def test_every_tile_fits_into_shared_memory(gated, tile):
    x, weight, total = shape(512, 256), shape(256, 512), shape(512, 512)
    call = functools.partial(linear_mosaic, gated=gated, tile=tile, programs=132)
    assert mosaic_calls(lower_for_h200(call, x, weight, None if gated else total)) == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "inner", "columns", "dtype", "every_tile"),
    [
        (128, 4096, 28672, jnp.bfloat16, False),
        (512, 3584, 37888, jnp.bfloat16, False),
        (2048, 14336, 4096, jnp.bfloat16, False),
        # Several rounds, the last of which some programs sit out, in tiles of both widths.
        (1152, 192, 5120, jnp.float16, True),
    ],
)
def test_native(tokens, inner, columns, dtype, every_tile):
    x, weight, total = operands(tokens, inner, columns, dtype)
    for tile in (None, *(_TILES[True] if every_tile else ())):
        got = gated_linear(x, weight, implementation="mosaic", tile=tile)
        assert_close(got, gated_linear_reference(x, weight))
    for tile in (None, *(_TILES[False] if every_tile else ())):
        got, none = add_linear(total, x, weight, implementation="mosaic", tile=tile)
        assert none is None
        assert_close(got, add_linear_reference(total, x, weight))


@pytest.mark.gpu
def test_a_row_does_not_depend_on_the_others_natively():
    x, weight, _ = operands(2048, 4096, 28672)
    many = gated_linear(x, weight, implementation="mosaic")
    few = gated_linear(x[512:1024], weight, implementation="mosaic")
    np.testing.assert_array_equal(np.asarray(many[512:1024], np.float32), np.asarray(few, np.float32))


def test_errors_name_the_argument():
    x, weight, total = operands(TOKENS, DEPTH, 256)
    with pytest.raises(ValueError, match="weight has shape"):
        gated_linear(x, weight[1:])
    with pytest.raises(ValueError, match="two halves"):
        gated_linear(x, weight[:, 1:])
    with pytest.raises(ValueError, match="bias has shape"):
        gated_linear(x, weight, jnp.zeros(3))
    with pytest.raises(ValueError, match="total has shape"):
        add_linear(total[1:], x, weight)
    with pytest.raises(TypeError, match="dtype of x"):
        add_linear(total.astype(jnp.float32), x, weight)
    with pytest.raises(TypeError, match="weight must be"):
        gated_linear(x, weight.astype(jnp.int32))


def test_a_tile_must_divide_the_columns():
    call = functools.partial(gated_linear, implementation="mosaic", tile=LinearTile(256, 4))
    with pytest.raises(ValueError, match="divide the 384 columns of weight, got 256"):
        lower_for_h200(call, shape(TOKENS, DEPTH), shape(DEPTH, 384))


def test_few_tiles_are_left_to_xla():
    def calls(columns):
        return mosaic_calls(lower_for_h200(gated_linear, shape(256, 512), shape(512, columns)))

    # 2 times 33 tiles of 128 columns are half of 132, and so is not one less.
    assert (calls(33 * 128), calls(32 * 128)) == (1, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, weight: (x[1:], weight, None), "multiple of 128"),
        (lambda x, weight: (x[:, :32], weight[:32], None), "multiple of 64"),
        (lambda x, weight: (x, weight[:, :64], None), "128 columns"),
        (lambda x, weight: (x, weight, weight[0]), "no bias"),
        (lambda x, weight: (x.astype(jnp.float32), weight, None), "float32"),
        (lambda x, weight: (x, weight.astype(jnp.float16), None), "of one kind"),
    ],
)
def test_a_kernel_that_cannot_serve_the_call_is_an_error(change, reason):
    x, weight, bias = change(*operands(TOKENS, DEPTH, 256)[:2])
    with pytest.raises(ValueError, match=reason):
        gated_linear(x, weight, bias, implementation="mosaic")


def test_a_kernel_that_cannot_run_is_an_error():
    x, weight, total = operands(TOKENS, DEPTH, 256)
    with pytest.raises(ValueError, match="no Triton kernel"):
        gated_linear(x, weight, implementation="triton")
    if jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="needs a GPU"):
            add_linear(total, x, weight, implementation="mosaic")
