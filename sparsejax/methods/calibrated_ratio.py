"""How much of a context must be kept for a given quality, by how well the model predicts that context."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.errors import InvalidArgumentError
from sparsejax.text_files import read_text
from sparsejax.validation import number

_MAX_CURVATURE = 500.0
_STARTS = (-16.0, -8.0, -4.0, -2.0, -0.5, 1.0)
_ITERATIONS = 200


@dataclass(frozen=True)
class CalibratedRatio:
    """Context-calibrated compression (Chari and Van Durme 2025, arXiv:2507.08143): quality by what is kept.

    Quality is that of an answer from the compressed context relative to the dense one, here the ratio of the answer's
    negative log-likelihoods (dense over compressed). It is modelled as f(r) = (exp(r b) - 1) / (exp(b) - 1), which is 0
    at r = 0 and 1 at r = 1, with the curvature b = alpha * NLL + beta, where NLL is the context's mean negative
    log-likelihood (nats a token). A negative b means that a part of the context is nearly as good as all of it.

        ratio = CalibratedRatio.fit(fractions, nlls, qualities)
        CompressionParams(method="compactor", keep_fraction=ratio.keep_fraction(nll, target=0.95))

    `sparsejax.evaluation.calibration` measures what it is fitted from, and chooses parameters for a context.

    A fit holds for the model, the method and the options it was measured with, and for contexts like those it was
    measured on: a context whose NLL is outside `nll_range` is taken for one at its end, and no fraction below
    `least_fraction` is ever given.

    Attributes:
      alpha, beta: of the curvature.
      method: name of the method it was fitted for.
      options: the arguments of `CompressionParams` it was fitted with beside the method and the budget, (name, value)
        pairs or a mapping; kept sorted by name.
      nll_range: lowest and highest NLL of the contexts it was fitted on, nats a token; None: no limits.
      least_fraction: smallest keep_fraction that was measured, in [0, 1].
    """

    alpha: float
    beta: float
    method: str = ""
    options: Mapping[str, Any] | Iterable[tuple[str, Any]] = ()
    nll_range: tuple[float, float] | None = None
    least_fraction: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", number("alpha", self.alpha, -math.inf))
        object.__setattr__(self, "beta", number("beta", self.beta, -math.inf))
        if not isinstance(self.method, str):
            raise InvalidArgumentError(f"method must be a name, got {self.method!r}.")
        options = {
            name: tuple(value) if isinstance(value, list) else value for name, value in dict(self.options).items()
        }
        for name in ("method", "keep_fraction", "budget_tokens", "context_tokens"):
            if name in options:
                raise InvalidArgumentError(f"options must not hold {name}, which is set for each context.")
        object.__setattr__(self, "options", tuple(sorted(options.items())))
        if self.nll_range is not None:
            low, high = (number("nll_range", value, 0.0) for value in self.nll_range)
            if low > high:
                raise InvalidArgumentError(f"nll_range must be (lowest, highest), got {(low, high)}.")
            object.__setattr__(self, "nll_range", (low, high))
        object.__setattr__(self, "least_fraction", number("least_fraction", self.least_fraction, 0.0, 1.0))

    @classmethod
    def fit(
        cls,
        keep_fractions: Sequence[float],
        context_nlls: Sequence[float],
        qualities: Sequence[float],
        *,
        overestimate_weight: float = 4.0,
        slope_scale: float = 1.0,
        method: str = "",
        options: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    ) -> CalibratedRatio:
        """Least squares over measured points, in which predicting too high a quality weighs more.

        Args:
          keep_fractions: in (0, 1], one a point; points at 1 say nothing.
          context_nlls: nats a token, >= 0; at least two different ones.
          qualities: relative to dense, >= 0; above 1 counts as 1.
          overestimate_weight: weight of a squared error where the prediction is above the measurement, against 1 below
            it; positive. 1 is ordinary least squares.
          slope_scale: standard deviation of a prior of how much the curvature changes with one of the contexts' NLLs;
            positive. It keeps the fit of few contexts, or of contexts that are alike, from following noise. Its weight
            is the noise of the fit without it, each context (a distinct NLL) counting as one observation, since its
            points err together. infinity: no prior.
          method, options: what was measured, see the class.

        Raises:
          InvalidArgumentError: lists of different lengths, numbers out of range, or too little to fit from.
        """
        fraction = _numbers("keep_fractions", keep_fractions, 0.0, 1.0, above=True)
        nll = _numbers("context_nlls", context_nlls, 0.0)
        quality = np.minimum(_numbers("qualities", qualities, 0.0), 1.0)
        weight = number("overestimate_weight", overestimate_weight, 0.0, above=True)
        precision = 0.0 if slope_scale == math.inf else 1 / number("slope_scale", slope_scale, 0.0, above=True)
        if not len(fraction) == len(nll) == len(quality):
            raise InvalidArgumentError(
                "keep_fractions, context_nlls and qualities must have one number a point each, got "
                f"{len(fraction)}, {len(nll)} and {len(quality)}."
            )
        sparse = fraction < 1.0
        if np.unique(nll[sparse]).size < 2:
            raise InvalidArgumentError(
                "context_nlls must have at least two different values among the points with keep_fractions below 1: "
                "measure more texts (samples, tasks or lengths)."
            )
        # The curvature is fitted as slope * (nll - mean) + level, whose two parts hardly depend on each other.
        centre, spread = nll.mean(), nll.std()
        x = (nll - centre) / spread
        data = x, fraction, quality, weight
        fits = [_minimise(np.array([0.0, start]), *data, 0.0) for start in _STARTS]
        best, loss = min(fits, key=lambda each: each[1])
        if precision:
            noise = np.sqrt(loss / np.unique(nll).size)
            starts = [best, *(np.array([0.0, start]) for start in _STARTS)]
            best, _ = min((_minimise(start, *data, noise * precision) for start in starts), key=lambda each: each[1])
        slope, level = best
        return cls(
            alpha=float(slope / spread),
            beta=float(level - slope * centre / spread),
            method=method,
            options=options,
            nll_range=(float(nll[sparse].min()), float(nll[sparse].max())),
            least_fraction=float(fraction.min()),
        )

    def quality(self, keep_fraction: float, context_nll: float) -> float:
        """Predicted quality, in [0, 1], of keeping `keep_fraction` (in [0, 1]) of a context."""
        fraction = number("keep_fraction", keep_fraction, 0.0, 1.0)
        return float(_quality(np.asarray(fraction), np.asarray(self._curvature(context_nll))))

    def keep_fraction(self, context_nll: float, target: float) -> float:
        """Smallest fraction, from `least_fraction` to 1, whose predicted quality is `target`, in (0, 1]."""
        target = number("target", target, 0.0, 1.0, above=True)
        return max(_inverse(target, self._curvature(context_nll)), self.least_fraction)

    def save(self, path: str | Path) -> None:
        """Writes the fit as JSON."""
        values = {**asdict(self), "options": dict(self.options)}
        Path(path).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> CalibratedRatio:
        """Reads what `save` wrote.

        Raises:
          InvalidArgumentError: there is no such file, or it holds something else.
        """
        try:
            values = json.loads(read_text(path, name=f"the calibration {path}"))
        except json.JSONDecodeError as error:
            raise InvalidArgumentError(f"{path} is not JSON: {error}.") from None
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not {"alpha", "beta"} <= values.keys() <= known:
            raise InvalidArgumentError(
                f"{path} does not hold a calibrated ratio, which is an object with alpha and beta, and perhaps "
                f"{', '.join(sorted(known - {'alpha', 'beta'}))}."
            )
        try:
            return cls(**values)
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(f"{path} does not hold a calibrated ratio: {error}") from None

    def _curvature(self, context_nll: float) -> float:
        nll = number("context_nll", context_nll, 0.0)
        if self.nll_range is not None:
            nll = min(max(nll, self.nll_range[0]), self.nll_range[1])
        return float(np.clip(self.alpha * nll + self.beta, -_MAX_CURVATURE, _MAX_CURVATURE))


def _quality(fraction: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    """f of fraction and curvature, broadcast; neither overflows nor cancels."""
    fraction, curvature = np.broadcast_arrays(fraction, curvature)
    size = np.abs(curvature)
    flat = size < 1e-9
    size = np.where(flat, 1.0, size)
    falling = np.expm1(-fraction * size) / np.expm1(-size)
    return np.where(flat, fraction, np.where(curvature < 0, falling, np.exp((fraction - 1) * size) * falling))


def _inverse(target: float, curvature: float) -> float:
    """The fraction at which f is `target`, in closed form."""
    if abs(curvature) < 1e-9:
        return target
    # Two forms of the same: the first overflows for large curvatures, the second cancels for small ones.
    if target == 1.0:
        return 1.0
    if curvature < 1.0:
        return min(math.log1p(target * math.expm1(curvature)) / curvature, 1.0)
    return min(1.0 + math.log(target + (1.0 - target) * math.exp(-curvature)) / curvature, 1.0)


def _minimise(
    start: np.ndarray,
    x: np.ndarray,
    fraction: np.ndarray,
    quality: np.ndarray,
    overestimate_weight: float,
    slope_weight: float,
) -> tuple[np.ndarray, float]:
    """(slope, level) and their loss, by the Levenberg-Marquardt method from `start`."""

    def residuals(point: np.ndarray) -> np.ndarray:
        curvature = np.clip(point[0] * x + point[1], -_MAX_CURVATURE, _MAX_CURVATURE)
        error = _quality(fraction, curvature) - quality
        error = np.where(error > 0, np.sqrt(overestimate_weight), 1.0) * error
        return np.append(error, slope_weight * point[0])

    point, damping = start, 1e-3
    error = residuals(point)
    loss = float(error @ error)
    for _ in range(_ITERATIONS):
        steps = 1e-6 * np.maximum(np.abs(point), 1.0)
        jacobian = np.stack(
            [(residuals(point + s) - residuals(point - s)) / (2 * s.sum()) for s in np.diag(steps)], axis=1
        )
        normal = jacobian.T @ jacobian
        # The floor lets a direction that no point depends on rest.
        scale = np.diag(np.maximum(np.diag(normal), 1e-12))
        trial = point - np.linalg.solve(normal + damping * scale, jacobian.T @ error)
        trial_error = residuals(trial)
        trial_loss = float(trial_error @ trial_error)
        if trial_loss < loss:
            done = loss - trial_loss <= 1e-14 * loss
            point, error, loss, damping = trial, trial_error, trial_loss, damping / 4
            if done:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return point, loss


def _numbers(name: str, values: Sequence[float], low: float, high: float = math.inf, *, above: bool = False):
    """f64[n], each checked."""
    return np.array([number(name, value, low, high, above=above) for value in values], np.float64)
