"""The calibrated ratio: the closed form inverts the model, and the fit finds what the points were made with."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.errors import InvalidArgumentError
from sparsejax.methods.calibrated_ratio import CalibratedRatio

NLLS = np.array([0.5, 1.0, 2.0, 3.0])
FRACTIONS = np.array([0.05, 0.1, 0.25, 0.5, 0.75, 1.0])


def points(alpha, beta, noise=0.0, seed=0):
    """(fractions, NLLs, qualities) of every NLL at every fraction, by the model's formula written plainly."""
    fraction, nll = (each.ravel() for each in np.meshgrid(FRACTIONS, NLLS))
    b = alpha * nll + beta
    quality = (np.exp(fraction * b - b) - np.exp(-b)) / (1 - np.exp(-b))
    return fraction, nll, np.maximum(quality + noise * np.random.default_rng(seed).standard_normal(quality.shape), 0)


@given(st.floats(-600, 600), st.floats(0.01, 1.0))
def test_the_fraction_reaches_the_target_and_no_smaller_one_does(curvature, target):
    ratio = CalibratedRatio(alpha=0.0, beta=curvature)
    fraction = ratio.keep_fraction(1.0, target)
    assert 0 < fraction <= 1
    assert ratio.quality(fraction, 1.0) == pytest.approx(target, rel=1e-6, abs=1e-9)
    assert ratio.quality(0.99 * fraction, 1.0) <= target


def test_closed_form():
    b = -6.0
    expected = 1 + math.log(0.95 + 0.05 * math.exp(-b)) / b
    assert CalibratedRatio(alpha=-2.0, beta=-2.0).keep_fraction(2.0, 0.95) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("curvature", [-30.0, -1e-7, 0.0, 1e-7, 30.0])
def test_the_model_ends_at_nothing_and_at_dense(curvature):
    ratio = CalibratedRatio(alpha=0.0, beta=curvature)
    assert ratio.quality(0.0, 1.0) == 0.0
    assert ratio.quality(1.0, 1.0) == pytest.approx(1.0)
    assert ratio.keep_fraction(1.0, 1.0) == pytest.approx(1.0)
    curve = [ratio.quality(fraction, 1.0) for fraction in np.linspace(0, 1, 21)]
    assert curve == sorted(curve)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, -12.0), (-3.0, -1.0), (0.5, -2.0), (1.0, 0.5)])
def test_fit_recovers_the_curve(alpha, beta):
    ratio = CalibratedRatio.fit(*points(alpha, beta))
    assert ratio.alpha == pytest.approx(alpha, rel=1e-3)
    assert ratio.beta == pytest.approx(beta, rel=1e-3)


def test_fit_is_the_minimum():
    fraction, nll, quality = points(1.5, -9.0, noise=0.05)

    def loss(ratio):
        errors = [ratio.quality(f, n) - q for f, n, q in zip(fraction, nll, quality, strict=True)]
        return sum((4.0 if error > 0 else 1.0) * error**2 for error in errors)

    best = CalibratedRatio.fit(fraction, nll, quality, slope_scale=math.inf)
    for alpha, beta in [(0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)]:
        assert loss(best) < loss(CalibratedRatio(best.alpha + alpha, best.beta + beta))


def test_few_noisy_contexts_do_not_bend_the_curve():
    rng = np.random.default_rng(0)
    nll = np.repeat([2.30, 2.31, 2.33, 2.34], 3)
    fraction = np.tile([0.05, 0.15, 0.4], 4)
    quality = np.clip(CalibratedRatio(0.0, -8.0).quality(0.15, 2.0) + 0.3 * rng.standard_normal(12), 0, 1)
    free, held = (CalibratedRatio.fit(fraction, nll, quality, slope_scale=scale) for scale in (math.inf, 1.0))

    def span(ratio):
        return abs(ratio.keep_fraction(2.30, 0.9) - ratio.keep_fraction(2.34, 0.9))

    assert span(held) < 0.5 * span(free)
    assert abs(held.alpha) * nll.std() < 1.0


def test_weighing_overestimates_keeps_more():
    measured = points(1.5, -9.0, noise=0.05)
    plain, careful = (CalibratedRatio.fit(*measured, overestimate_weight=weight) for weight in (1.0, 20.0))
    assert all(careful.keep_fraction(nll, 0.9) > plain.keep_fraction(nll, 0.9) for nll in NLLS)


def test_save_and_load(tmp_path):
    ratio = CalibratedRatio(
        1.25, -7.5, "compactor", {"blend": 0.25, "ratios": (0.5, 0.25)}, nll_range=(0.5, 2.0), least_fraction=0.1
    )
    ratio.save(tmp_path / "ratio.json")
    assert CalibratedRatio.load(tmp_path / "ratio.json") == ratio
    assert json.loads((tmp_path / "ratio.json").read_text())["method"] == "compactor"


def test_nothing_is_said_beyond_what_was_measured():
    fraction, nll, quality = points(1.5, -9.0)
    ratio = CalibratedRatio.fit(fraction, nll, quality)
    assert ratio.nll_range == (NLLS.min(), NLLS.max())
    assert ratio.keep_fraction(50.0, 0.9) == ratio.keep_fraction(NLLS.max(), 0.9)
    assert ratio.quality(0.5, 0.0) == ratio.quality(0.5, NLLS.min())
    # Everything measured was as good as dense: then the least that was measured is, and no more is known.
    easy = CalibratedRatio.fit(fraction, nll, np.where(fraction < 1, 1.3, 1.0))
    assert easy.keep_fraction(1.0, 0.95) == FRACTIONS.min()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"none\.json cannot be read"):
        CalibratedRatio.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "nonsense",
        '{"alpha": 1}',
        '{"alpha": 1, "beta": "x"}',
        "[1, 2]",
        '{"alpha": 1, "beta": 1, "nll_range": 3}',
    ],
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "ratio.json").write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"ratio\.json"):
        CalibratedRatio.load(tmp_path / "ratio.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (([0.5], [1.0, 2.0], [0.5]), "one number a point"),
        (([0.5, 0.5], [1.0, 1.0], [0.5, 0.4]), "two different values"),
        (([0.5, 1.0], [1.0, 2.0], [0.5, 1.0]), "two different values"),
        (([0.0, 0.5], [1.0, 2.0], [0.5, 0.5]), "keep_fractions"),
        (([0.5, 0.5], [1.0, -2.0], [0.5, 0.5]), "context_nlls"),
        (([0.5, 0.5], [1.0, 2.0], [0.5, float("nan")]), "qualities"),
    ],
)
def test_bad_points_are_named(values, message):
    with pytest.raises(InvalidArgumentError, match=message):
        CalibratedRatio.fit(*values)


@pytest.mark.parametrize("target", [0.0, 1.1, float("nan")])
def test_bad_targets_are_named(target):
    with pytest.raises(InvalidArgumentError, match="target"):
        CalibratedRatio(0.0, -5.0).keep_fraction(1.0, target)
