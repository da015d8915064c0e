"""Two results of the same benchmark side by side, from the JSON files that the benchmarks write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsejax.errors import InvalidArgumentError
from sparsejax.text_files import read_text

KINDS = ("kernels", "latency", "throughput", "fragmentation", "startup")
ASKED = ("method", "compression", "requests", "input_tokens", "interrupted")  # of a row, where it says so
NEUTRAL = 0.01  # relative change that is not called better or worse

# Figures of merit by name (of a distribution: the part before the dot); all others are shown without a verdict.
LOWER_IS_BETTER = (
    "wall", "device", "step_seconds", "prefill_seconds", "prompt_seconds", "host_seconds", "device_seconds",
    "wall_seconds", "compress_seconds", "compress_share", "added_share", "compression_seconds", "evict_seconds",
    "idle_share", "trace_idle_share", "ttft", "tpot", "itl", "e2e", "ttft_p99", "tpot_p99", "itl_p99", "p99",
    "preemptions", "compilations", "programs_compiled", "peak_bytes", "copied_bytes", "ttft_hit", "itl_prefill",
    "itl_decode", "mean", "seconds", "build_seconds", "compile_seconds", "mean_step_seconds", "relative", "kv_share",
)  # fmt: skip
HIGHER_IS_BETTER = (
    "rate", "fraction", "speedup", "prefill_rate", "prefill_fraction", "step_fraction", "output_rate", "total_rate",
    "requests_rate", "pool_share",
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
    """A file.

    Attributes:
      kind: the benchmark that wrote it.
      rows: the metrics of each of its rows.
      made_by: what it was measured on and with, model, device, ceilings, jax, method and page size, where the file says
        so.
      asked: what was asked for in each of its rows beside its name: the compression, and how many requests.
    """

    kind: str
    rows: dict[str, dict[str, float]]
    made_by: dict[str, str]
    asked: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Compared:
    """Two files side by side.

    Attributes:
      found: what both have measured, in the order of the first.
      notes: what differs in how they were measured, and what only one of them has.
    """

    found: list[Comparison]
    notes: list[str]


def compare(a: str | Path, b: str | Path) -> Compared:
    """Two files of the same benchmark. What was compiled in one of them only counts as 0 in the other.

    Raises:
      InvalidArgumentError: not results, of different benchmarks, or with no row in common.
    """
    first, second = read(a), read(b)
    if first.kind != second.kind:
        raise InvalidArgumentError(
            f"{a} is a result of bench {first.kind}, {b} one of bench {second.kind}: compare two of the same benchmark."
        )
    notes = [
        f"{name}: {first.made_by[name]} and {second.made_by[name]}"
        for name in first.made_by
        if name in second.made_by and first.made_by[name] != second.made_by[name]
    ]
    found = []
    for row, metrics in first.rows.items():
        if row not in second.rows:
            continue
        notes += [
            f"{row}: {name} {value} and {second.asked[row][name]}"
            for name, value in first.asked[row].items()
            if second.asked[row].get(name, value) != value
        ]
        others = second.rows[row]
        counted = [name for name in others if name.startswith("compilations.") and name not in metrics]
        for metric in [*metrics, *counted]:
            other = 0 if metric.startswith("compilations.") else None
            mine, theirs = metrics.get(metric, other), others.get(metric, other)
            if mine is not None and theirs is not None:
                found.append(Comparison(row, metric, mine, theirs))
        notes += _alone(f"{row}: ", metrics, others)
    if not found:
        raise InvalidArgumentError(
            f"{a} and {b} have measured nothing in common: {_some(first.rows)} and {_some(second.rows)}."
        )
    return Compared(found, [*notes, *_alone("", first.rows, second.rows)])


def _alone(where: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What only one of two has, a line for each that has something."""
    notes = []
    for name, mine, others in (("A", a, b), ("B", b, a)):
        alone = [key for key in mine if key not in others and not key.startswith("compilations.")]
        if alone:
            notes.append(f"{where}only in {name}: {', '.join(alone)}")
    return notes


def read(path: str | Path) -> Result:
    """A JSON file of one of the benchmarks."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{path} is not JSON: {error}") from error
    try:
        return _result(data, path)
    except (AttributeError, KeyError, TypeError) as error:
        raise InvalidArgumentError(f"{path} is no whole result of a benchmark: {error!r}") from error


def _result(data: Any, path: str | Path) -> Result:
    rows = data.get("rows") if isinstance(data, dict) else None
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "kernels" and rows is not None:
        named = [(row["name"], row) for row in rows]
    elif kind == "latency" and rows is not None:
        named = [(_batch(row), row) for row in rows]
    elif kind == "fragmentation" and rows is not None:
        named = [(f"{row['strategy']} {row['budget'] or ''}".strip(), row) for row in rows]
    elif kind == "throughput":
        named = [(data["trace"], data)]
    elif kind == "startup":
        named = [("startup", data)]
    else:
        raise InvalidArgumentError(f"{path} is not a result of bench {', bench '.join(KINDS)} (their --json).")
    # A shape that was measured twice is two rows.
    names = [name for name, _ in named]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    labels = [f"{name} ({count + 1})" if count else name for name, count in zip(names, before, strict=True)]
    rows_of = dict(zip(labels, (row for _, row in named), strict=True))
    return Result(
        kind,
        {name: _metrics(row) for name, row in rows_of.items()},
        _made_by(data),
        {name: {key: str(row[key]) for key in ASKED if key in row} for name, row in rows_of.items()},
    )


def _made_by(data: Mapping[str, Any]) -> dict[str, str]:
    ceilings = data.get("ceilings") or {}
    # Fractions are of these: they change if only the card does.
    measured = ", ".join(f"{name} {value / 1e12:.4g}" for name, value in _metrics(ceilings).items())
    found = {"device": ceilings.get("device"), "ceilings (TB/s, TFLOP/s)": measured or None} | {
        name: str(data[name]) for name in ("model", "device", "jax", "page_size") if name in data
    }
    if data.get("kind") == "fragmentation" and "method" in data:
        found["method"] = data["method"]
    return {name: value for name, value in found.items() if value is not None}


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


def format_comparison(compared: Compared, a: str = "A", b: str = "B") -> str:
    """A table with a line for each metric, grouped by row, and the notes."""
    lines = [f"A = {a}", f"B = {b}", f"{'':32} {'A':>14} {'B':>14} {'B / A':>8}"]
    row = None
    for each in compared.found:
        if each.row != row:
            row = each.row
            lines.append(row)
        ratio = "-" if each.ratio is None else f"{each.ratio:.3f}"
        lines.append(f"  {each.metric:30} {each.a:14.6g} {each.b:14.6g} {ratio:>8}  {each.verdict}".rstrip())
    return "\n".join([*lines, *compared.notes])
