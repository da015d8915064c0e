"""Compactor against its formula in float64, in any order of slots, after evictions, and in its corner cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import lower_for_h200, triton_calls
from method_cases import random_case, random_order
from method_oracles import compactor_oracle, full_view, one_row, rope_angles, thinned

from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import Slots
from sparsejax.methods.compactor import Compactor, sketch_matrix

# Every chunk holds more tokens than the sketch has columns: in shorter ones all leverages are about equal.
COUNTS = [[[300, 170], [150, 256]]]


def scores(method, slots):
    return np.asarray(jax.jit(method.scores)(slots))


@pytest.mark.parametrize(
    ("counts", "shuffled"),
    [(None, False), (COUNTS, True), (COUNTS, False)],
    ids=["whole prompts", "after evictions, shuffled", "after evictions"],
)
def test_equals_the_formula(counts, shuffled):
    case = random_case(0, layers=1, slots=300, head_dim=32)
    if counts is not None:
        case = thinned(case, counts)
    if shuffled:
        case = case.permuted(random_order(1, case.live.shape))
    method = Compactor(sketch_size=12, chunk_size=128)
    got = scores(method, full_view(case))
    expected = compactor_oracle(
        case, sketch_matrix(32, 12), chunk=128, regularization=method.regularization, blend=method.blend
    )
    np.testing.assert_allclose(got[case.live], expected[case.live], atol=2e-3)


def test_a_row_scores_as_it_does_alone():
    case = thinned(random_case(2, slots=136, head_dim=16, layers=1), [[[136], [90]]])
    method = Compactor(sketch_size=8, chunk_size=128)
    both = scores(method, full_view(case))
    for row in range(2):
        alone = scores(method, one_row(full_view(case), row))
        np.testing.assert_allclose(alone[:, 0][case.live[:, row]], both[:, row][case.live[:, row]], atol=1e-4)


def test_blend_weighs_the_leverage():
    case = random_case(3, layers=1, rows=1, slots=128, head_dim=16)
    attention, half, full = (
        scores(Compactor(blend=blend, sketch_size=8), full_view(case)) for blend in (0.0, 0.5, 1.0)
    )
    np.testing.assert_allclose(full - attention, 2 * (half - attention), atol=1e-4)
    # Without leverage the attention alone ranks.
    np.testing.assert_array_equal(np.argsort(attention.ravel()), np.argsort(case.score.ravel()))


def test_a_key_unlike_the_others_has_the_highest_leverage():
    case = random_case(4, layers=1, rows=1, heads=1, slots=128, head_dim=16)
    k = case.k.copy()
    k[..., 2:] *= 1e-3
    k[0, 0, 0, 21, 9] = 3.0
    # At position 0 nothing is rotated.
    view = dataclasses.replace(full_view(case.replace(k=k)), rope=lambda position: rope_angles(0 * position, 16))
    assert scores(Compactor(blend=100.0, sketch_size=8), view).argmax() == 21


@pytest.mark.parametrize("text_length", [1, 3, 129])
def test_short_chunks_are_finite(text_length):
    # A chunk of one token has no variance.
    case = random_case(5, layers=1, rows=1, slots=136, head_dim=16, text_length=text_length)
    assert np.isfinite(scores(Compactor(chunk_size=128), full_view(case))).all()


def test_chunks_longer_than_the_table_are_one():
    case = full_view(random_case(5, layers=1, rows=1, slots=300, head_dim=16, text_length=130))
    got, want = (scores(Compactor(chunk_size=size, sketch_size=8), case) for size in (1 << 40, 256))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_lowers_for_cuda_without_a_factorisation():
    # An 8B model's prompt of 32k tokens: nothing but the one kernel and what XLA makes.
    shape = jax.ShapeDtypeStruct
    lanes, pool = (32, 1, 8, 32768), shape((32 * 8 * 1024 + 1, 32, 128), jnp.bfloat16)
    view = Slots(
        score=shape(lanes, jnp.float32),
        position=shape(lanes, jnp.int32),
        live=shape(lanes, bool),
        protected=shape(lanes, bool),
        text_length=shape((1,), jnp.int32),
        window_tokens=shape((1,), jnp.int32),
        recorded=shape((1,), jnp.int32),
        seed=shape((1,), jnp.uint32),
        pages=shape((*lanes[:3], 1024), jnp.int32),
        k_pages=pool,
        v_pages=pool,
        moments=None,
        num_query_heads=32,
        rope=lambda position: rope_angles(position, 128),
    )
    text = lower_for_h200(Compactor().scores, view)
    assert triton_calls(text) == 1
    assert "cusolver" not in text
    assert "blas" not in text


def test_the_sketch_is_fixed():
    np.testing.assert_array_equal(sketch_matrix(64, 48), sketch_matrix(64, 48))
    assert sketch_matrix(64, 48).dtype == np.float32
    np.testing.assert_allclose((sketch_matrix(4096, 48) ** 2).sum(1).mean(), 1.0, atol=0.02)


def test_defaults():
    method = Compactor()
    assert (method.sketch_size, method.chunk_size, method.regularization, method.blend) == (48, 512, 5e-3, 0.5)
    assert method.chunk_alignment == 512
    assert method.default_recent_tokens(2048, 0) == 64
    assert method.default_recent_tokens(100, 0) == 25


@pytest.mark.parametrize(
    "option", [{"sketch_size": 0}, {"sketch_size": 129}, {"chunk_size": 500}, {"regularization": 0}, {"blend": -1}]
)
def test_bad_options_are_named(option):
    with pytest.raises(InvalidArgumentError, match=next(iter(option))):
        Compactor(**option)
