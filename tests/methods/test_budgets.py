"""Budget rules: exact totals, protection, floors, and independence from the order of slots and from other rows."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import Case, keep, random_case, random_order

from sparsejax import methods
from sparsejax.errors import InvalidArgumentError, UnknownArgumentError
from sparsejax.methods.budgets import Adaptive, Global, Layer, Pyramid, Uniform, share_of

LAYERS, HEADS, SLOTS = 3, 2, 24
RULES = [
    Uniform(),
    Pyramid(),
    Pyramid(beta=2),
    Pyramid(layer_ratios=(1, 5, 2)),
    Adaptive(),
    Adaptive(floor=0.6),
    Layer(),
    Global(),
    Global(floor=0.3),
]
seeds = st.integers(0, 10_000)
budgets = st.integers(1, SLOTS + 4)
each_rule = pytest.mark.parametrize("rule", RULES, ids=str)


layer_budgets = jax.jit(Pyramid.layer_budgets, static_argnums=0)


def coarse(case: Case) -> Case:
    """Few distinct scores, so that ties are everywhere."""
    return case.replace(score=np.floor(case.score * 4))


def best(case: Case, pool: list[tuple], first: set, count: int) -> set:
    """The oracle of a pool: `first`, then by score, position and lane, by sorting."""
    lanes = {lane: rank for rank, lane in enumerate(sorted({cell[:3] for cell in pool}))}
    order = sorted(pool, key=lambda c: (c in first, case.score[c], case.position[c], lanes[c[:3]]), reverse=True)
    return set(order[:count])


def cells(marks: np.ndarray, lane: tuple) -> list[tuple]:
    return [(*lane, int(s)) for s in np.flatnonzero(marks[lane])]


@each_rule
@settings(max_examples=12, deadline=None)
@given(seed=seeds, budget=budgets, ragged=st.booleans())
def test_protected_slots_are_kept_and_only_live_ones(rule, seed, budget, ragged):
    case = random_case(seed, ragged=ragged, text_length=30, sinks=2, recent=5)
    kept = keep(rule, case, budget)
    assert np.all(kept[case.protected])
    assert not np.any(kept & ~case.live)


@each_rule
@settings(max_examples=12, deadline=None)
@given(seed=seeds, budget=budgets)
def test_totals_are_exact(rule, seed, budget):
    case = random_case(seed, sinks=1, recent=2)
    budget = max(budget, 3)
    kept = keep(rule, case, budget)
    np.testing.assert_array_equal(kept.sum(axis=(0, 2, 3)), LAYERS * HEADS * min(budget, SLOTS))
    if rule.equal_heads:
        assert np.all(kept.sum(axis=3) == kept.sum(axis=3)[:, :, :1])
    if rule.equal_layers:
        assert np.all(kept.sum(axis=3) == kept.sum(axis=3)[:1])
    if isinstance(rule, Adaptive | Layer):
        np.testing.assert_array_equal(kept.sum(axis=(2, 3)), HEADS * min(budget, SLOTS))


@each_rule
@settings(max_examples=8, deadline=None)
@given(seed=seeds, more=st.integers(0, 5))
def test_a_budget_that_covers_the_text_keeps_all(rule, seed, more):
    case = random_case(seed, ragged=True)
    np.testing.assert_array_equal(keep(rule, case, case.live.sum(-1).max() + more), case.live)


@each_rule
@settings(max_examples=12, deadline=None)
@given(seed=seeds, budget=budgets)
def test_the_order_of_slots_does_not_matter(rule, seed, budget):
    case = coarse(random_case(seed, ragged=True, sinks=1, recent=3))
    order = random_order(seed + 1, case.live.shape)
    expected = np.take_along_axis(keep(rule, case, budget), order, axis=-1)
    np.testing.assert_array_equal(keep(rule, case.permuted(order), budget), expected)


@each_rule
@settings(max_examples=8, deadline=None)
@given(seed=seeds, budget=st.tuples(budgets, budgets))
def test_rows_do_not_affect_each_other(rule, seed, budget):
    case = coarse(random_case(seed, ragged=True, sinks=1, recent=3))
    together = keep(rule, case, budget)
    for row in range(2):
        twins = {name: np.stack([getattr(case, name)[:, row]] * 2, axis=1) for name in ("live", "position", "score")}
        vectors = {name: np.stack([getattr(case, name)[:, row]] * 2, axis=1) for name in ("k", "v")}
        alone = keep(rule, case.replace(**twins, **vectors), budget[row])
        np.testing.assert_array_equal(together[:, row], alone[:, 0])
        np.testing.assert_array_equal(alone[:, 0], alone[:, 1])


@each_rule
@settings(max_examples=12, deadline=None)
@given(seed=seeds, budget=budgets, ragged=st.booleans())
def test_a_head_keeps_its_best(rule, seed, budget, ragged):
    case = random_case(seed, ragged=ragged, sinks=1, recent=2)
    kept = keep(rule, case, budget)
    free = case.live & ~case.protected
    worst_kept = np.where(kept & free, case.score, np.inf).min(-1)
    best_dropped = np.where(~kept & free, case.score, -np.inf).max(-1)
    assert np.all(worst_kept >= best_dropped)


@each_rule
@settings(max_examples=12, deadline=None)
@given(seed=seeds, budget=budgets, page_size=st.sampled_from([1, 4, 32]), grown=st.integers(0, 9))
def test_the_bounds_hold(rule, seed, budget, page_size, grown):
    case = random_case(seed, sinks=1, recent=2)
    budget = max(budget, 3)
    held = keep(rule, case, budget).sum(-1)
    size = {"num_layers": LAYERS, "num_kv_heads": HEADS}
    pages = (-(-held // page_size)).sum(axis=(0, 2))
    assert np.all(pages <= rule.max_entries(budget, SLOTS, page_size=page_size, **size))
    most = rule.most_kept(budget, page_size=page_size)
    assert np.all(held.sum(axis=(0, 2)) <= most * LAYERS * HEADS)
    later = (-(-(held + grown) // page_size)).sum(axis=(0, 2))
    assert np.all(later <= rule.max_entries(most + grown, SLOTS + grown, page_size=page_size, **size))


@settings(max_examples=20, deadline=None)
@given(seed=seeds, budget=budgets)
def test_uniform_equals_sorting(seed, budget):
    case = coarse(random_case(seed, ragged=True, sinks=1, recent=2))
    kept = keep(Uniform(), case, budget)
    for lane in np.ndindex(*case.live.shape[:3]):
        first = set(cells(case.protected, lane))
        expected = best(case, cells(case.live, lane), first, max(budget, len(first)))
        assert set(cells(kept, lane)) == expected


@pytest.mark.parametrize("rule", [Adaptive(), Adaptive(floor=0.6), Layer(), Global(), Global(floor=0.3)], ids=str)
@settings(max_examples=20, deadline=None)
@given(seed=seeds, budget=budgets)
def test_pooled_rules_equal_sorting(rule, seed, budget):
    case = coarse(random_case(seed, ragged=True, sinks=1, recent=2))
    kept = keep(rule, case, budget)
    floor = int(np.floor(np.float32(budget) * np.float32(getattr(rule, "floor", 0.0))))
    if isinstance(rule, Global):
        pools = [[(layer, row, h) for layer in range(LAYERS) for h in range(HEADS)] for row in range(2)]
    else:
        pools = [[(layer, row, h) for h in range(HEADS)] for layer in range(LAYERS) for row in range(2)]
    for lanes in pools:
        first: set = set()
        for lane in lanes:
            protected = set(cells(case.protected, lane))
            first |= best(case, cells(case.live, lane), protected, max(floor, len(protected)))
        candidates = [cell for lane in lanes for cell in cells(case.live, lane)]
        expected = best(case, candidates, first, max(len(lanes) * budget, len(first)))
        assert {cell for lane in lanes for cell in cells(kept, lane)} == expected


@settings(max_examples=20, deadline=None)
@given(seed=seeds, budget=st.integers(5, SLOTS))
def test_heads_with_low_scores_keep_their_floor(seed, budget):
    case = random_case(seed)
    case.score[:, :, 0] -= 100
    kept = keep(Adaptive(floor=0.4), case, budget).sum(-1)
    assert np.all(kept >= int(np.float32(0.4) * np.float32(budget)))
    assert np.all(keep(Layer(), case, budget).sum(-1)[:, :, 0] == max(0, 2 * budget - SLOTS))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@each_rule
def test_scores_that_are_not_finite_neither_outrank_protection_nor_get_lost(rule, value):
    case = random_case(0, sinks=2, recent=3)
    case = case.replace(score=np.full_like(case.score, value))
    kept = keep(rule, case, 8)
    assert np.all(kept[case.protected])
    np.testing.assert_array_equal(kept.sum(axis=(0, 2, 3)), LAYERS * HEADS * 8)


def test_pyramid_falls_linearly_and_keeps_the_total():
    rule = Pyramid(beta=4)
    budget = jnp.array([100, 1001], jnp.int32)
    bounds = jnp.zeros((5, 2), jnp.int32), jnp.full((5, 2), 10_000, jnp.int32)
    got = np.asarray(layer_budgets(rule, *bounds, budget))
    np.testing.assert_array_equal(got.sum(0), [500, 5005])
    linear = np.linspace(1.75, 0.25, 5)[:, None] * np.asarray(budget)
    assert np.abs(got - linear).max() <= 1
    assert np.all(np.diff(got, axis=0) < 0)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, budget=st.integers(1, 3000))
def test_pyramid_within_bounds_keeps_the_total(seed, budget):
    rng = np.random.default_rng(seed)
    lowest = rng.integers(0, 50, (3, 1)).astype(np.int32)
    highest = lowest + rng.integers(0, 2000, (3, 1)).astype(np.int32)
    rule = Pyramid(layer_ratios=(1e-6, 1.0, 3.0))
    got = np.asarray(layer_budgets(rule, lowest, highest, jnp.array([budget], jnp.int32)))
    # No layer gets more than its share of the mean would be, so that rows stay bounded.
    usable = np.maximum(lowest, np.minimum(highest, np.ceil(rule.shares(3).max() * budget)))
    assert np.all((got >= lowest) & (got <= usable))
    assert got.sum() == np.clip(3 * min(budget, usable.max()), lowest.sum(), usable.sum())


def test_unused_shares_go_to_the_other_layers():
    got = layer_budgets(
        Pyramid(beta=20), jnp.zeros((4, 1), jnp.int32), jnp.full((4, 1), 120, jnp.int32), jnp.array([100], jnp.int32)
    )
    assert int(got.sum()) == 400
    assert int(got[0, 0]) == 120


def test_bad_rules_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"beta must be a finite number in \[1, infinity\), got 0.5"):
        Pyramid(beta=0.5)
    with pytest.raises(InvalidArgumentError, match="layer_ratios must be a finite number in"):
        Pyramid(layer_ratios=(1.0, 0.0))
    with pytest.raises(InvalidArgumentError, match="layer_ratios must have one number a layer"):
        Pyramid(layer_ratios=())
    with pytest.raises(InvalidArgumentError, match="each of the model's 3 layers, got 2"):
        keep(Pyramid(layer_ratios=(1, 2)), random_case(0), 4)
    with pytest.raises(InvalidArgumentError, match=r"budget_floor must be a finite number in \[0, 1\]"):
        Adaptive(floor=1.5)
    with pytest.raises(UnknownArgumentError, match=r"budget_rule must be one of 'uniform'.*Did you mean 'pyramid'"):
        methods.get_rule("piramid")
    with pytest.raises(InvalidArgumentError, match="a budget rule named 'uniform' exists"):

        @methods.register_rule
        class Other(Uniform):
            pass


@pytest.mark.parametrize("share", [0.0, 0.07, 0.2, 0.28, 0.53, 0.59, 1 / 3, 0.9999, 1.0])
def test_shares_are_those_that_are_written(share):
    counts = np.array([0, 1, 7, 25, 100, 200, 1000, 10_000, 2**30, 2**31 - 1])
    exact = Fraction(repr(share)).limit_denominator(10_000)
    got = share_of(jnp.asarray(counts, jnp.int32), share)
    np.testing.assert_array_equal(got, [int(count * exact) for count in counts.tolist()])
