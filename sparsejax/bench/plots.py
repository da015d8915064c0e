"""Figures of benchmark results. matplotlib is the optional extra `eval`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.bench.compressed_latency import CompressedLatency
from sparsejax.bench.fragmentation import DENSE, Fragmentation
from sparsejax.bench.latency import Latency
from sparsejax.bench.throughput import Throughput
from sparsejax.errors import InvalidArgumentError


def require_matplotlib() -> None:
    """Raises an error that says what to install if there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InvalidArgumentError("--plot needs matplotlib, which is not installed: pip install 'sparsejax[eval]'.")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure that needs no display, and its axes as an array [rows, columns]."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_throughput(result: Throughput, path: str | Path) -> None:
    """Distributions of TTFT and ITL, and requests and pages over time."""
    figure, axes = _figure(2, 2, 11, 7)
    figure.suptitle(f"{result.trace}: {result.output_rate:.0f} output tok/s, {result.wall_seconds:.1f} s")
    for axis, name, values in (
        (axes[0, 0], "time to first token", [record.ttft for record in result.records]),
        (axes[0, 1], "time between tokens", result.itls),
    ):
        if len(values):
            ordered = np.sort(np.asarray(values)) * 1e3
            axis.plot(ordered, np.arange(1, len(ordered) + 1) / len(ordered))
            for share in (50, 99):
                axis.axvline(np.percentile(ordered, share), linestyle=":", color="grey")
            if ordered[0] > 0:
                axis.set_xscale("log")
        axis.set_xlabel(f"{name}, ms (dotted: median, p99)")
        axis.set_ylabel("share at or below")
    timeline = result.timeline
    axes[1, 0].plot(timeline.seconds, timeline.running, label="running")
    axes[1, 0].plot(timeline.seconds, timeline.waiting, label="waiting")
    axes[1, 0].set_ylabel("requests")
    axes[1, 0].legend()
    axes[1, 1].plot(timeline.seconds, timeline.pages)
    axes[1, 1].axhline(result.pool_pages, linestyle=":", color="grey")
    axes[1, 1].set_ylabel("pages in use (dotted: all)")
    for axis in axes[1]:
        axis.set_xlabel("seconds")
        axis.set_ylim(bottom=0)
    figure.savefig(path)


def plot_latency(rows: Sequence[Latency], path: str | Path) -> None:
    """The fraction of the limit that decode and prefill reach at each shape."""
    figure, axes = _figure(1, 2, 11, 1.5 + 0.4 * len(rows))
    labels = [f"{row.batch} x {row.context}" for row in rows]
    _bars(axes[0, 0], labels, [row.step_fraction for row in rows], "decode step, fraction of the limit")
    _bars(axes[0, 1], labels, [row.prefill_fraction for row in rows], "prefill, fraction of the matmul rate")
    figure.savefig(path)


def plot_compressed_latency(rows: Sequence[CompressedLatency], path: str | Path) -> None:
    """The fraction of their own limit that decode steps reach, and what compressing costs beside the prefill."""
    figure, axes = _figure(1, 2, 11, 1.5 + 0.4 * len(rows))
    labels = [f"{row.method} {row.batch} x {row.context}" for row in rows]
    _bars(axes[0, 0], labels, [row.step_fraction for row in rows], "decode step, fraction of its own limit")
    _bars(axes[0, 1], labels, [row.compress_share for row in rows], "compression, fraction of the prefill")
    figure.savefig(path)


def plot_fragmentation(rows: Sequence[Fragmentation], path: str | Path) -> None:
    """Fragmentation over time, a panel a budget; under it, bars of each strategy in groups of budgets."""
    budgets = sorted({row.budget for row in rows if row.budget is not None})
    strategies = list(dict.fromkeys(row.strategy for row in rows if row.strategy != DENSE))
    dense = next((row for row in rows if row.strategy == DENSE), None)
    bars = (
        ("p99 fragmentation, %", lambda row: 100 * row.p99),
        ("output tok/s", lambda row: row.output_rate),
        ("p99 TTFT, s", lambda row: row.ttft_p99 or 0.0),
        ("p99 TPOT, ms", lambda row: 1e3 * (row.tpot_p99 or 0.0)),
        ("p99 ITL, ms", lambda row: 1e3 * (row.itl_p99 or 0.0)),
        ("preemptions", lambda row: row.preemptions),
        ("evicting, s", lambda row: row.evict_seconds),
        ("copied, GiB", lambda row: row.copied_bytes / 2**30),
    )
    columns = max(4, len(budgets))
    figure, axes = _figure(3, columns, 4 * columns, 10)
    for axis, budget in zip(axes[0], budgets, strict=False):
        for row in rows:
            if row.budget in (budget, None):
                axis.plot(row.seconds, row.fragmentation, label=row.strategy, linewidth=1)
        axis.set_title(f"budget {budget}: internal fragmentation")
        axis.set_xlabel("seconds")
        axis.set_ylim(0, 1)
        axis.legend()
    for axis, (title, value) in zip(axes[1:, :4].flat, bars, strict=True):
        for i, strategy in enumerate(strategies):
            found = {row.budget: value(row) for row in rows if row.strategy == strategy}
            places = [j + (i - (len(strategies) - 1) / 2) * 0.8 / len(strategies) for j in range(len(budgets))]
            heights = [found.get(budget, 0.0) for budget in budgets]
            axis.bar(places, heights, 0.8 / len(strategies), label=strategy)
        if dense is not None:
            axis.axhline(value(dense), linestyle="--", color="grey")
        axis.set_xticks(range(len(budgets)), [str(budget) for budget in budgets])
        axis.set_title(f"{title} (dashed: dense)")
    axes[1, 0].legend()
    for axis in (*axes[0, len(budgets) :], *axes[1:, 4:].flat):
        axis.set_visible(False)
    figure.savefig(path)


def plot_fractions(fractions: Mapping[str, float], title: str, path: str | Path) -> None:
    """One bar for each name."""
    figure, axes = _figure(1, 1, 9, 1.5 + 0.3 * len(fractions))
    _bars(axes[0, 0], list(fractions), list(fractions.values()), title)
    figure.savefig(path)


def _bars(axis: Any, labels: list[str], values: list[float], title: str) -> None:
    """Horizontal bars with their values, the first on top, and a line at 1."""
    bars = axis.barh(range(len(labels)), values)
    axis.bar_label(bars, fmt="%.3f", padding=2)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.axvline(1.0, linestyle=":", color="grey")
    axis.set_xlim(0, 1.15 * max(1.0, *values))
    axis.set_title(title)
