"""Two results of the same benchmark side by side, from the JSON files that the benchmarks write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsejax.errors import InvalidArgumentError
from sparsejax.text_files import read_text

KINDS = ("kernels", "latency", "throughput", "fragmentation")
NEUTRAL = 0.01  # relative change that is not called better or worse

# Figures of merit by name (of a distribution: the part before the dot); all others are shown without a verdict.
LOWER_IS_BETTER = (
    "wall", "device", "step_seconds", "prefill_seconds", "prompt_seconds", "host_seconds", "device_seconds",
    "wall_seconds", "compress_seconds", "compress_share", "added_share", "compression_seconds", "evict_seconds",
    "idle_share", "trace_idle_share", "ttft", "tpot", "itl", "e2e", "ttft_p99", "tpot_p99", "itl_p99", "p99",
    "preemptions", "compilations", "programs_compiled", "peak_bytes", "copied_bytes",
)  # fmt: skip
HIGHER_IS_BETTER = (
    "rate", "fraction", "speedup", "prefill_rate", "prefill_fraction", "step_fraction", "output_rate", "total_rate",
    "requests_rate",
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """One metric of one row (a kernel's case, a batch and context, or a trace), in both files."""

    row: str
    metric: str
    a: float
    b: float

    @property
    def ratio(self) -> float | None:
        """b / a; None where a is 0."""
        return self.b / self.a if self.a else None

    @property
    def verdict(self) -> str:
        """Whether b is "better" or "worse" than a; "" if they are within 1 %, or the metric is no figure of merit."""
        if abs(self.b - self.a) <= NEUTRAL * abs(self.a):
            return ""
        first = self.metric.split(".")[0]
        if first in LOWER_IS_BETTER:
            return "better" if self.b < self.a else "worse"
        if first in HIGHER_IS_BETTER:
            return "better" if self.b > self.a else "worse"
        return ""


@dataclass(frozen=True)
class Result:
    """A file: which benchmark wrote it, and the metrics of each of its rows."""

    kind: str
    rows: dict[str, dict[str, float]]


def compare(a: str | Path, b: str | Path) -> list[Comparison]:
    """What both files have measured, in the order of the first.

    Raises:
      InvalidArgumentError: not results, of different benchmarks, or with no row in common.
    """
    first, second = read(a), read(b)
    if first.kind != second.kind:
        raise InvalidArgumentError(
            f"{a} is a result of bench {first.kind}, {b} one of bench {second.kind}: compare two of the same benchmark."
        )
    found = [
        Comparison(row, metric, value, second.rows[row][metric])
        for row, metrics in first.rows.items()
        for metric, value in metrics.items()
        if metric in second.rows.get(row, {})
    ]
    if not found:
        raise InvalidArgumentError(
            f"{a} and {b} have measured nothing in common: {_some(first.rows)} and {_some(second.rows)}."
        )
    return found


def read(path: str | Path) -> Result:
    """A JSON file of `bench kernels`, `latency`, `throughput` or `fragmentation`."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}") from error
    rows = data.get("rows") if isinstance(data, dict) else None
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind is None and rows and all("kernel" in row for row in rows):
        kind = "kernels"
    if kind == "kernels" and rows is not None:
        return Result(kind, {row["name"]: _metrics(row) for row in rows})
    if kind == "latency" and rows is not None:
        return Result(kind, {_batch(row): _metrics(row) for row in rows})
    if kind == "fragmentation" and rows is not None:
        return Result(kind, {f"{row['strategy']} {row['budget'] or ''}".strip(): _metrics(row) for row in rows})
    if kind == "throughput":
        return Result(kind, {data["trace"]: _metrics(data)})
    raise InvalidArgumentError(f"{path} is not a result of bench {', bench '.join(KINDS)} (their --json).")


def _batch(row: Mapping[str, Any]) -> str:
    """What a row of bench latency is about."""
    return " ".join([f"{row['batch']} x {row['context']}", *([row["method"]] if "method" in row else [])])


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row; those one level down as "outer.inner"."""
    numbers: dict[str, float] = {}
    for key, value in row.items():
        if key in ("batch", "context", "profile", "by_kernel", "ceilings", "timeline"):
            continue
        if isinstance(value, Mapping):
            numbers |= {f"{key}.{inner}": number for inner, number in _metrics(value).items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers[key] = value
    return numbers


def _some(rows: Mapping[str, Any]) -> str:
    names = list(rows)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def format_comparison(found: list[Comparison], a: str = "A", b: str = "B") -> str:
    """A table with a line for each metric, grouped by row."""
    lines = [f"A = {a}", f"B = {b}", f"{'':32} {'A':>14} {'B':>14} {'B / A':>8}"]
    row = None
    for each in found:
        if each.row != row:
            row = each.row
            lines.append(row)
        ratio = "-" if each.ratio is None else f"{each.ratio:.3f}"
        lines.append(f"  {each.metric:30} {each.a:14.6g} {each.b:14.6g} {ratio:>8}  {each.verdict}".rstrip())
    return "\n".join(lines)
