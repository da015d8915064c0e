"""The page-granular plan: equal to the greedy walk, alone and in any batch, and the invariants of KV-Compress."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import lower_for_h200
from method_cases import Case, random_case, random_order
from method_oracles import greedy_pages_oracle, one_row

from sparsejax.methods.global_pages import GlobalPages

LAYERS, ROWS, HEADS, SLOTS = 2, 3, 2, 24


@functools.cache
def jitted_keep():
    return jax.jit(GlobalPages().keep)


def keep(scores, slots, budget):
    """bool[L, K, H, S] for budget, one number or one a row."""
    budget = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), slots.live.shape[1:2])
    return np.asarray(jitted_keep()(jnp.asarray(scores, jnp.float32), slots, budget))


PLANS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "text_length": st.sampled_from([24, 40]),
        "ragged": st.booleans(),
        "sinks": st.integers(0, 3),
        "recent": st.integers(0, 9),
        "kind": st.sampled_from(["distinct", "tied", "zero", "negative", "nan"]),
        "budgets": st.lists(st.integers(1, 30), min_size=ROWS, max_size=ROWS),
    }
)


def make_plan(*, seed, kind, budgets, **options):
    """(case, scores, budgets): ragged heads, distinct or heavily tied scores, protection that may exceed the budget."""
    rng = np.random.default_rng(seed)
    case = random_case(seed, layers=LAYERS, rows=ROWS, heads=HEADS, slots=SLOTS, head_dim=2, **options)
    shape = case.live.shape
    scores = {
        "distinct": lambda: rng.permutation(case.live.size).reshape(shape),
        "tied": lambda: rng.integers(0, 4, shape),
        "zero": lambda: np.where(rng.random(shape) < 0.5, 0.0, -0.0),
        "negative": lambda: rng.standard_normal(shape),
        "nan": lambda: np.where(rng.random(shape) < 0.3, np.nan, rng.random(shape)),
    }[kind]()
    return case, scores.astype(np.float32), np.array(budgets)


def check_invariants(case: Case, scores, budgets, kept):
    """The numbers are those of part C of the invariants in the tests' names below."""
    page = case.page_size
    assert not (kept & ~case.live).any()
    # No protected token is lost.
    assert kept[case.protected].all()
    before, after = case.live.sum(-1), kept.sum(-1)
    pages = lambda tokens: -(-tokens // page)  # noqa: E731
    for row, budget in enumerate(budgets):
        allowed = math.ceil(budget / page) * LAYERS * HEADS
        forced = pages(case.protected[:, row].sum(-1)).sum()
        left = pages(after[:, row]).sum()
        # The budget is met unless protection forbids it, and never undercut.
        assert left <= max(allowed, forced)
        assert left >= min(allowed, pages(before[:, row]).sum())
    # A head that lost tokens ends with full pages.
    assert (after[after < before] % page == 0).all()
    values = np.nan_to_num(scores.astype(np.float64), nan=-np.inf)
    victims = case.live & ~kept
    rest = kept & ~case.protected
    dearest, next_page = np.full(ROWS, -np.inf), np.full(ROWS, np.inf)
    for lane in np.ndindex(*case.live.shape[:3]):
        gone, stayed = np.sort(values[lane][victims[lane]]), np.sort(values[lane][rest[lane]])
        if gone.size and stayed.size:
            assert gone[-1] <= stayed[0]
        if gone.size:
            dearest[lane[1]] = max(dearest[lane[1]], gone[-1])
        hang = (after[lane] - 1) % page + 1
        if after[lane] and stayed.size >= hang:
            next_page[lane[1]] = min(next_page[lane[1]], stayed[hang - 1])
    # The dearest page that went is no dearer than the cheapest that stayed.
    assert (dearest <= next_page).all()


@settings(max_examples=80, deadline=None)
@given(PLANS)
def test_equals_the_greedy_walk_and_keeps_the_invariants(plan):
    case, scores, budgets = make_plan(**plan)
    kept = keep(scores, case.slots(), budgets)
    for row in range(ROWS):
        expected = greedy_pages_oracle(
            scores[:, row], case.position[:, row], case.live[:, row], case.protected[:, row],
            budget=budgets[row], page_size=case.page_size,
        )  # fmt: skip
        np.testing.assert_array_equal(kept[:, row], expected)
    check_invariants(case, scores, budgets, kept)


@settings(max_examples=25, deadline=None)
@given(PLANS, st.integers(0, ROWS - 1), st.integers(0, 2**31))
def test_a_row_is_planned_as_it_is_alone_and_in_any_order_of_slots(plan, row, seed):
    case, scores, budgets = make_plan(**plan)
    kept = keep(scores, case.slots(), budgets)
    alone = keep(scores[:, row : row + 1], one_row(case.slots(), row), budgets[row])
    np.testing.assert_array_equal(alone[:, 0], kept[:, row])
    order = random_order(seed, case.live.shape)
    moved = keep(np.take_along_axis(scores, order, -1), case.permuted(order).slots(), budgets)
    np.testing.assert_array_equal(moved, np.take_along_axis(kept, order, -1))


def test_planning_twice_frees_nothing_more():
    case = random_case(1, layers=LAYERS, rows=ROWS, heads=HEADS, slots=SLOTS, sinks=2, recent=4)
    kept = keep(case.score, case.slots(), 10)
    again = keep(case.score, case.replace(live=kept).slots(), 10)
    np.testing.assert_array_equal(again, kept)
    assert kept.sum() < case.live.sum()


@pytest.mark.parametrize("budget", [24, 1000, 2**30])
def test_a_budget_of_all_tokens_keeps_them(budget):
    case = random_case(2, layers=LAYERS, rows=ROWS, heads=HEADS, slots=SLOTS)
    np.testing.assert_array_equal(keep(case.score, case.slots(), budget), case.live)


def test_protection_of_everything_keeps_it():
    case = random_case(3, layers=LAYERS, rows=ROWS, heads=HEADS, slots=SLOTS, recent=24)
    np.testing.assert_array_equal(keep(case.score, case.slots(), 4), case.live)


def test_the_budget_is_shared_by_all_heads():
    # One head of one layer matters a thousand times as much as the others.
    case = random_case(4, layers=LAYERS, rows=ROWS, heads=HEADS, slots=SLOTS)
    score = case.score.copy()
    score[1, :, 0] *= 1000
    kept = keep(score, case.slots(), 8).sum(-1)
    assert (kept[1, :, 0] == 24).all()
    assert (kept.sum((0, 2)) == 8 * LAYERS * HEADS).all()


def test_ties_go_by_layer_head_and_age():
    case = random_case(5, layers=2, rows=1, heads=2, slots=8)
    kept = keep(np.zeros_like(case.score), case.slots(), 6)
    # Rounded up to two pages a head nothing has to go; one page a head frees four of eight pages, the first two heads'.
    assert kept.all()
    kept = keep(np.zeros_like(case.score), case.slots(), 4)
    np.testing.assert_array_equal(kept.sum(-1), [[[0, 0]], [[8, 8]]])
    kept = keep(np.zeros_like(case.score), case.replace(recent=2, text_length=np.array([8])).slots(), 4)
    # Two protected tokens hold a page, so one page of each head goes: its oldest tokens.
    np.testing.assert_array_equal(kept, np.broadcast_to(np.arange(8) >= 4, kept.shape))


def test_bounds_hold():
    case = random_case(6, layers=LAYERS, rows=ROWS, heads=HEADS, slots=SLOTS, ragged=True, recent=3)
    sizes = {"num_layers": LAYERS, "num_kv_heads": HEADS}
    for budget in (3, 5, 8, 13):
        kept = keep(case.score, case.slots(), budget).sum(-1)
        entries = (-(-kept // 4)).sum((0, 2)).max()
        assert entries <= GlobalPages().max_entries(budget, SLOTS, page_size=4, **sizes)
        most = GlobalPages().most_kept(budget, page_size=4)
        assert kept.sum((0, 2)).max() <= most * LAYERS * HEADS
        for grown in range(6):
            entries = (-(-(kept + grown) // 4)).sum((0, 2)).max()
            assert entries <= GlobalPages().max_entries(most + grown, SLOTS + grown, page_size=4, **sizes)


def test_lowers_for_cuda_without_a_sort():
    case = random_case(7, layers=2, rows=1, heads=2, slots=SLOTS)
    slots = case.slots()
    text = lower_for_h200(
        lambda scores, slots, budget: GlobalPages().keep(scores, slots, budget),
        slots.score, dataclasses.replace(slots), jnp.ones(1, jnp.int32),
    )  # fmt: skip
    assert "stablehlo.sort" not in text
