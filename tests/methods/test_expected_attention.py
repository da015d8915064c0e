"""Expected attention against its formula, against sampled queries, and in its corner cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import random_case, random_order
from method_oracles import expected_attention_oracle, full_view, one_row, random_moments, rope_angles, thinned

from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import QueryMoments
from sparsejax.methods.expected_attention import ExpectedAttention

OPTIONS = {"future_tokens": 6, "skipped_queries": 2}


def scores(method, slots):
    return np.asarray(jax.jit(method.scores)(slots))


def moments_of(case, seed=0):
    layers, rows, heads = case.live.shape[:3]
    return random_moments(seed, layers=layers, rows=rows, query_heads=heads * case.group, dim=case.k.shape[-1])


@pytest.mark.parametrize(
    ("use_covariance", "use_vnorm", "epsilon"), [(True, True, 0.0), (True, False, 0.0), (False, True, 0.02)]
)
def test_equals_the_formula(use_covariance, use_vnorm, epsilon):
    case = random_case(0, layers=2, slots=24, text_length=40)
    case = thinned(case, 17).permuted(random_order(1, case.live.shape))
    moments = moments_of(case)
    method = ExpectedAttention(use_covariance=use_covariance, use_vnorm=use_vnorm, epsilon=epsilon, **OPTIONS)
    expected = expected_attention_oracle(
        case, moments, future=6, skip=2, epsilon=epsilon, use_covariance=use_covariance, use_vnorm=use_vnorm
    )
    got = scores(method, full_view(case, moments=moments))
    np.testing.assert_allclose(got[case.live], expected[case.live], rtol=2e-4, atol=1e-7)


def test_is_the_attention_of_normal_queries():
    # With one future position the expectation is exact, so many sampled queries must agree in their mean exponentials.
    case = random_case(2, layers=1, rows=1, heads=1, slots=12, group=1, head_dim=4)
    rng = np.random.default_rng(3)
    mean, root = rng.standard_normal(4), 0.5 * rng.standard_normal((4, 4))
    moments = QueryMoments(
        first=jnp.asarray(mean, jnp.float32)[None, None, None],
        second=jnp.asarray(root @ root.T + np.outer(mean, mean), jnp.float32)[None, None, None],
        count=jnp.ones((1, 1)),
    )
    method = ExpectedAttention(future_tokens=1, skipped_queries=0, use_vnorm=False)
    got = scores(method, full_view(case, moments=moments))[0, 0, 0]
    queries = mean + rng.standard_normal((400_000, 4)) @ root.T
    cos, sin = (np.asarray(part) for part in rope_angles(12, 4))
    first, second = np.split(queries, 2, axis=-1)
    queries = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    weights = np.exp(queries @ case.k[0, 0, 0].T / 2).mean(0)
    np.testing.assert_allclose(got, weights / weights.sum(), rtol=0.05)


def test_a_row_scores_as_it_does_alone():
    case = thinned(random_case(4, layers=1, slots=24), [[[24], [9]]])
    view = full_view(case, moments=moments_of(case))
    method = ExpectedAttention(**OPTIONS)
    both = scores(method, view)
    for row in range(2):
        np.testing.assert_allclose(scores(method, one_row(view, row))[:, 0], both[:, row], rtol=1e-5)


def test_without_any_query_the_values_rank():
    case = random_case(5, layers=1, rows=1, slots=8)
    moments = jax.tree.map(jnp.zeros_like, moments_of(case))
    got = scores(ExpectedAttention(skipped_queries=0), full_view(case, moments=moments))
    np.testing.assert_allclose(got, np.linalg.norm(case.v, axis=-1) / 8, rtol=1e-5)


@pytest.mark.parametrize("text_length", [1, 3])
def test_texts_shorter_than_what_is_skipped_are_finite(text_length):
    case = random_case(6, layers=1, rows=1, slots=8, text_length=text_length)
    method = ExpectedAttention()
    assert 0 <= method.record_from(text_length, 0) < text_length
    got = scores(method, full_view(case, moments=moments_of(case)))
    assert not np.isnan(got).any()


def test_records_from_behind_the_first_queries():
    assert ExpectedAttention().record_from(1000, 0) == 4
    assert ExpectedAttention(skipped_queries=0).record_from(1000, 0) == 0
    assert ExpectedAttention().power == 0


def test_moments_are_required():
    case = random_case(7, layers=1, rows=1, slots=8)
    with pytest.raises(ValueError, match="moments"):
        ExpectedAttention().scores(dataclasses.replace(full_view(case), moments=None))


@pytest.mark.parametrize(
    "option",
    [
        {"future_tokens": 0},
        {"future_tokens": 65537},
        {"skipped_queries": -1},
        {"skipped_queries": 2**31},
        {"use_covariance": 1},
        {"use_vnorm": "no"},
        {"epsilon": -1.0},
    ],
)
def test_bad_options_are_named(option):
    with pytest.raises(InvalidArgumentError, match=next(iter(option))):
        ExpectedAttention(**option)
