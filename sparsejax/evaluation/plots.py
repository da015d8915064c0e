"""Figures of evaluation results. matplotlib is the optional extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.evaluation.calibration import CalibrationPoint
from sparsejax.evaluation.method_sweep import MethodRow, over_tasks
from sparsejax.methods.calibrated_ratio import CalibratedRatio

_TITLES = {
    "aware": "query-aware",
    "agnostic": "query-agnostic",
    "reading": "reading a part",
    "storing": "stored compressed",
}
_READING = ("reading", "storing")  # drawn over what is read
_MARKERS = "osv^D<>pPX*h"
# matplotlib's ten colours, then black and grey: as many as markers.
_COLOURS = (*(f"C{i}" for i in range(10)), "black", "grey")


def plot_methods(rows: Sequence[MethodRow], path: str | Path) -> None:
    """Accuracy over the share of the cache that is kept or read: one line a method, one panel a mode and length.

    Where tokens are stored compressed, lines tell what share of the dense bytes that takes.

    Args:
      rows: of `compare_methods`, with at least one mode beside dense.
      path: the file; its ending says the format.
    """
    from matplotlib.figure import Figure

    lengths = list(dict.fromkeys(row.length for row in rows))
    modes = list(dict.fromkeys(row.mode for row in rows if row.mode != "dense"))
    names = list(dict.fromkeys(row.name for row in rows if row.mode != "dense"))
    figure = Figure(figsize=(5 * len(modes) + 1.6, 3.6 * len(lengths)), layout="constrained")
    axes = figure.subplots(len(lengths), len(modes), squeeze=False, sharey=True)
    points = over_tasks(rows)
    for i, length in enumerate(lengths):
        (dense,) = [point for point in points if (point.length, point.mode) == (length, "dense")]
        for j, mode in enumerate(modes):
            axis = axes[i, j]
            axis.axhline(100 * dense.score, color="black", linestyle=":", label="dense")
            for place, name in enumerate(names):
                style = {"marker": _MARKERS[place % len(_MARKERS)], "color": _COLOURS[place % len(_COLOURS)]}
                found = [point for point in points if (point.length, point.mode, point.name) == (length, mode, name)]
                line = sorted(
                    (100 * (point.read if mode in _READING else point.kept), 100 * point.score) for point in found
                )
                if line:
                    axis.plot(*zip(*line, strict=True), label=name, **style)
                if line and mode == "storing":
                    text, height = f"{name}: {100 * found[0].kept:.0f} % of KV bytes", 0.05 + 0.07 * place
                    axis.text(0.97, height, text, transform=axis.transAxes, ha="right", color=style["color"])
            axis.set_title(f"{_TITLES[mode]}, {length} tokens")
            what = "tokens read, % of dense" if mode in _READING else "KV cache kept, % of dense bytes"
            axis.set_xlabel(what)
            axis.set_xlim(left=0)
            axis.set_ylim(-3, 103)
            axis.grid(alpha=0.3)
        axes[i, 0].set_ylabel("exact answers, %")
    handles: dict[str, Any] = {}
    for axis in axes[0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    figure.savefig(path, dpi=80)


def plot_calibration(
    ratio: CalibratedRatio, points: Sequence[CalibrationPoint], target: float, path: str | Path
) -> None:
    """Quality over what is kept: the points that were measured, their means, and the fit over its range of contexts.

    Args:
      ratio, points: of `calibration.fit` and what it was fitted from.
      target: drawn as a line, with what the fit keeps for it.
      path: the file; its ending says the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    nlls = sorted({point.context_nll for point in points})
    fractions = sorted({point.keep_fraction for point in points})
    dots = axis.scatter(
        [point.keep_fraction for point in points],
        [point.quality for point in points],
        c=[point.context_nll for point in points],
        s=14,
        alpha=0.6,
    )
    figure.colorbar(dots, label="context NLL, nats a token")
    means = [np.mean([point.quality for point in points if point.keep_fraction == each]) for each in fractions]
    axis.plot(fractions, means, "ks", label="measured, mean")
    grid = np.linspace(0, 1, 201)
    ends = [[ratio.quality(float(each), nll) for each in grid] for nll in (nlls[0], nlls[-1])]
    axis.plot(grid, np.mean(ends, axis=0), color="tab:red", label="fit")
    axis.fill_between(grid, *np.sort(ends, axis=0), color="tab:red", alpha=0.2)
    axis.axhline(target, color="grey", linestyle=":", label=f"target {target:g}")
    for nll in (nlls[0], nlls[-1]):
        axis.axvline(ratio.keep_fraction(nll, target), color="grey", linestyle=":")
    axis.set_title(f"{ratio.method}, {len(nlls)} contexts")
    axis.set_xlabel("fraction kept")
    axis.set_ylabel("quality relative to dense")
    axis.legend()
    figure.savefig(path, dpi=80)


def plot_coverage(coverage: np.ndarray, layers: Sequence[int], path: str | Path) -> None:
    """A heat map of how much attention of each layer goes to what another chooses, and who follows whom.

    Args:
      coverage: f64[L, L] of `layer_choice.measure_coverage`.
      layers: the full-attention layers.
      path: the file; its ending says the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(100 * np.where(np.tri(len(coverage), k=-1, dtype=bool), np.nan, coverage), vmin=0, vmax=100)
    for first, after in zip(layers, (*layers[1:], len(coverage)), strict=True):
        axis.plot([first - 0.5, after - 0.5], [first, first], color="tab:red", linewidth=2)
    axis.set_title("full layers " + ", ".join(map(str, layers)))
    axis.set_xlabel("layer")
    axis.set_ylabel("layer that chooses")
    figure.colorbar(image, label="attention kept, %")
    figure.savefig(path, dpi=80)
