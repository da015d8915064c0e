"""CriticalKV's two stages against their definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import random_case
from method_oracles import full_view

from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import get_rule
from sparsejax.methods.criticalkv import CriticalKV, projected_norms
from sparsejax.methods.snapkv import SnapKV

OPTIONS = {"recent": 4, "window": 4, "recorded": 4}


def make_view(case, budget, seed=0):
    """(view, kernels [L, Hq, D, d])."""
    layers, rows, heads = case.live.shape[:3]
    kernels = np.random.default_rng(seed).standard_normal((layers, heads * case.group, case.k.shape[-1], 12))
    view = full_view(case, kernels=kernels)
    return dataclasses.replace(view, budget=jnp.full(rows, budget, jnp.int32)), kernels


def kept(method, view):
    """bool[L, K, H, S] under the rule `uniform`."""
    keep = get_rule("uniform")().keep
    return np.asarray(jax.jit(lambda view: keep(method.scores(view), view, view.budget))(view))


def norms_by_definition(case, kernels):
    heads = case.live.shape[2]
    out = np.zeros(case.live.shape)
    for index in np.ndindex(*case.live.shape):
        layer, _, head, _ = index
        group = kernels[layer].reshape(heads, case.group, *kernels.shape[2:])[head]
        out[index] = np.mean([np.abs(case.v[index] @ kernel).sum() for kernel in group])
    return out


@pytest.mark.parametrize("slots", [24, 260])
def test_norms_of_projected_values(slots):
    # 260 slots are more than one block.
    case = random_case(0, layers=1, rows=1, slots=slots)
    view, kernels = make_view(case, 8)
    got = jax.jit(lambda view: projected_norms(view.layer(0)))(view)
    np.testing.assert_allclose(got, norms_by_definition(case, kernels)[0], rtol=1e-4)


@pytest.mark.parametrize(("ratio", "first"), [(0.5, 6), (0.0, 0), (0.3, 3), (1.0, 12)])
def test_keeps_what_the_two_stages_choose(ratio, first):
    case = random_case(1, layers=2, slots=24, **OPTIONS)
    budget = 12
    view, kernels = make_view(case, budget)
    keep = kept(CriticalKV(first_stage_ratio=ratio), view)
    attention = np.asarray(jax.jit(SnapKV().scores)(view), np.float64)
    second = (attention + 1e-4) * norms_by_definition(case, kernels)
    for lane in np.ndindex(*case.live.shape[:3]):
        protected = case.protected[lane]
        by_attention = sorted(range(24), key=lambda s: (protected[s], attention[lane][s], s))[::-1]
        chosen = set(by_attention[:first]) | set(np.flatnonzero(protected))
        by_both = sorted(set(range(24)) - chosen, key=lambda s: (second[lane][s], s))[::-1]
        chosen |= set(by_both[: budget - len(chosen)])
        assert chosen == set(np.flatnonzero(keep[lane]))


def test_all_in_the_first_stage_is_snapkv():
    case = random_case(2, layers=1, slots=24, **OPTIONS)
    view, _ = make_view(case, 10)
    np.testing.assert_array_equal(kept(CriticalKV(first_stage_ratio=1.0), view), kept(SnapKV(), view))


def test_needs_budgets_and_projections():
    case = random_case(3, layers=1, slots=8, **OPTIONS)
    view, _ = make_view(case, 6)
    with pytest.raises(ValueError, match="budgets"):
        jax.eval_shape(CriticalKV().scores, dataclasses.replace(view, budget=None))
    with pytest.raises(ValueError, match="output projection"):
        jax.eval_shape(CriticalKV().scores, dataclasses.replace(view, output_kernel=None))


@pytest.mark.parametrize("option", [{"first_stage_ratio": 1.5}, {"epsilon": -1.0}, {"kernel_size": 2}])
def test_bad_options_are_named(option):
    with pytest.raises(InvalidArgumentError, match=next(iter(option))):
        CriticalKV(**option)
