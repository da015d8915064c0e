"""Every kernel at production shapes (`kernel_shapes`), as a fraction of what the card can do in the same run."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import (
    BlockTile,
    CompressTile,
    DecodeTile,
    DeltaTile,
    LinearTile,
    PrefillTile,
    ReconstructTile,
    RecordTile,
    SearchTile,
    SpanLimits,
)
from sparsejax.bench import delta_shapes, kernel_shapes
from sparsejax.bench.ceilings import Ceilings, measure
from sparsejax.bench.kernel_shapes import Case, Program
from sparsejax.bench.selection_shapes import selection_cases, tiny_selection_cases
from sparsejax.bench.timing import Timing, device_seconds, time_calls
from sparsejax.errors import InvalidArgumentError, SparsejaxError, nearest

__all__ = ["Case", "Row", "cases", "format_table", "run", "tiny_cases", "tune"]


def cases() -> list[Case]:
    """All cases at production shapes."""
    return [*kernel_shapes.cases(), *selection_cases(), *delta_shapes.cases()]


def tiny_cases() -> list[Case]:
    """One small case of each kernel, for tests."""
    return [*kernel_shapes.tiny_cases(), *tiny_selection_cases(), *delta_shapes.tiny_cases()]


@dataclass(frozen=True)
class Row:
    """One measured case; times are in milliseconds a call.

    Attributes:
      wall: median by the clock of the host, `spread` the width of the middle half over the median.
      device: inside GPU kernels according to the profiler, without the gaps between them; 0 where there is no GPU.
      rate: needed bytes or floating-point operations per second of wall time, in `unit`.
      fraction: of the `ceiling`.
      by_kernel: `device` by GPU kernel.
    """

    name: str
    kernel: str
    wall: float
    spread: float
    device: float
    rate: float
    unit: str
    ceiling: str
    fraction: float
    by_kernel: dict[str, float]


def _unknown(name: str, known: Iterable[str]) -> InvalidArgumentError:
    known = sorted(known)
    guess = nearest(name, known)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return InvalidArgumentError(f"there is no kernel or case {name!r} to measure.{hint} Known: {', '.join(known)}.")


def _chosen(every: Sequence[Case], names: Sequence[str] | None) -> list[Case]:
    """The cases whose name or kernel is in `names`, and the yardsticks that they need, in order."""
    if names is None:
        return list(every)
    for name in names:
        if not any(name in (case.name, case.kernel) for case in every):
            raise _unknown(name, {x for case in every for x in (case.name, case.kernel)})
    wanted = {case.name for case in every if case.name in names or case.kernel in names}
    wanted |= {case.ceiling for case in every if case.name in wanted}
    return [case for case in every if case.name in wanted]


def _calls(program: Program) -> int:
    """Calls in a row that last long enough to hide the wait for the last one, half a millisecond on a remote GPU."""
    seconds = 0.1 if jax.default_backend() == "gpu" else 0.01
    first = time_calls(program.call, repeats=1, calls=2).median
    return max(1, min(400, round(seconds / first)))


_UNITS = {"GB/s": 1e9, "TFLOP/s": 1e12}


def _measure(case: Case, limit: float, unit: str, repeats: int) -> Row:
    program = case.build()
    timing: Timing = time_calls(program.call, repeats=repeats, calls=_calls(program))
    by_kernel = {name: 1e3 * seconds / program.operations for name, seconds in device_seconds(program.call).items()}
    seconds = timing.median / program.operations
    rate = program.amount / seconds
    return Row(
        name=case.name,
        kernel=case.kernel,
        wall=1e3 * seconds,
        spread=timing.spread,
        device=sum(by_kernel.values()),
        rate=rate / _UNITS[unit],
        unit=unit,
        ceiling=case.ceiling,
        fraction=rate / limit,
        by_kernel=by_kernel,
    )


def run(
    names: Sequence[str] | None = None,
    json_path: str | None = None,
    *,
    every: Sequence[Case] | None = None,
    ceilings: Ceilings | None = None,
    repeats: int = 7,
    report: Callable[[str], None] | None = None,
) -> list[Row]:
    """Measures kernels.

    Args:
      names: cases or kernels (as `Case.name`, `Case.kernel`) to measure; None means all.
      json_path: file that gets the ceilings and the rows, after each of them.
      every: the cases to choose from; None means `cases()`.
      ceilings: those of this device; None measures them first.
      repeats: timings of each case.
      report: called with a line of text about each result as it comes.

    Returns:
      A row for each chosen case. Those that are a yardstick of others come along.
    """
    chosen = _chosen(cases() if every is None else every, names)
    ceilings = ceilings or measure()
    report = report or (lambda line: None)
    report(str(ceilings))
    limits = {"read": ceilings.read, "copy": ceilings.copy, "matmul": ceilings.matmul}
    units = {"read": "GB/s", "copy": "GB/s", "matmul": "TFLOP/s"}
    rows = []
    for case in chosen:
        row = _measure(case, limits[case.ceiling], units[case.ceiling], repeats)
        limits[case.name], units[case.name] = row.rate * _UNITS[row.unit], row.unit
        rows.append(row)
        report(_line(row))
        gc.collect()  # the pools of a case are gone before the next case needs the memory
        if json_path is not None:
            result = {"kind": "kernels", "jax": jax.__version__, "ceilings": asdict(ceilings)}
            result["rows"] = [asdict(each) for each in rows]
            Path(json_path).write_text(json.dumps(result) + "\n", encoding="utf-8")
    return rows


_HEADER = f"{'case':44} {'wall ms':>9} {'spread':>7} {'device ms':>10} {'rate':>8}         {'fraction of':>11}"


def _line(row: Row) -> str:
    return (
        f"{row.name:44} {row.wall:9.4f} {row.spread:7.1%} {row.device:10.4f} {row.rate:8.1f} {row.unit:7} "
        f"{row.fraction:6.3f} {row.ceiling}"
    )


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    return "\n".join([_HEADER, *map(_line, rows)])


# What `tune` tries: options of `Case.build`, for bfloat16 and a head_dim of 128.
_CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "decode_attention": [
        {"tile": DecodeTile(*tile)}
        for tile in (
            (32, 1, 4), (64, 2, 2), (64, 2, 3), (64, 2, 4), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3),
        )
    ],
    "decode_work": [
        {"limits": SpanLimits(wave, finest, wave_span, max_span, multiple=finest)}
        for wave in (264, 396, 528)
        for finest in (64, 128)
        for wave_span, max_span in ((3072, 2048), (3072, 1024), (4096, 3072), (1 << 20, 2048))
    ],
    "prefill_attention": [
        {"tile": PrefillTile(*tile)}
        for tile in (
            (64, 32, 4, 3), (64, 64, 4, 2), (128, 32, 4, 3), (128, 64, 4, 1), (128, 64, 4, 2), (128, 64, 4, 3),
            (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (256, 64, 8, 2),
        )
    ],
    "gated_linear": [{"tile": LinearTile(*tile)} for tile in ((256, 3), (256, 4), (128, 4), (128, 6))],
    "add_linear": [{"tile": LinearTile(*tile)} for tile in ((256, 2), (256, 3), (128, 4), (128, 5))],
    "record_attention": [
        {"tile": RecordTile((128, few), (pairs, many), warps, stages)}
        for few, pairs, many, warps, stages in (
            (64, 128, 64, 4, 3), (64, 64, 128, 4, 3), (128, 64, 256, 8, 3), (128, 128, 128, 4, 2),
            (128, 128, 256, 8, 2), (32, 256, 128, 8, 2),
        )
    ],
    "block_attention_mass": [
        {"tile": BlockTile(*tile)} for tile in ((64, 4, 2), (64, 8, 2), (128, 4, 2), (128, 8, 2), (128, 8, 3))
    ],
    "delta_attention": [
        {"tile": DeltaTile(*tile)}
        for tile in (
            (32, 4, 3, 64, 4), (64, 4, 2, 64, 4), (64, 4, 3, 32, 4), (64, 4, 3, 64, 4), (64, 4, 3, 64, 8),
            (64, 8, 3, 64, 4), (128, 8, 3, 64, 4), (128, 8, 3, 128, 8),
        )
    ],
    "delta_reconstruct": [
        {"tile": ReconstructTile(*tile)}
        for tile in ((32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 8, 3), (128, 8, 2), (128, 8, 3))
    ],
    "delta_compress": [
        {"tile": CompressTile(*tile)}
        for tile in ((32, 512, 8, 1), (64, 256, 4, 1), (64, 256, 8, 1), (64, 512, 8, 1), (128, 256, 8, 1))
    ],
    "reference_search": [
        {"tile": SearchTile(*tile)}
        for tile in (
            (64, 128, 64, 4, 3), (128, 64, 64, 4, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
            (128, 128, 128, 8, 2), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3),
        )
    ],
}  # fmt: skip
_MEASURED_WITH = {"decode_work": "decode_attention"}


def tune(
    kernel: str,
    names: Sequence[str] | None = None,
    *,
    every: Sequence[Case] | None = None,
    candidates: Sequence[dict[str, Any]] | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Times the candidates of `kernel` and reports them.

    Args:
      kernel: "decode_attention", "prefill_attention", "gated_linear", "add_linear", "record_attention",
        "block_attention_mass", "delta_attention", "delta_reconstruct", "delta_compress" or "reference_search" for their
        tiles, "decode_work" for the limits of the spans of decode_attention.
      names: cases to weigh; None means all of this kernel.
      every: the cases to choose from; None means `cases()`.
      candidates: options of `Case.build`; None means the built-in ones.
      report: gets a line for each candidate.

    Returns:
      The candidate with the smallest sum, over the cases, of its time relative to the best of that case.

    Raises:
      InvalidArgumentError: an unknown kernel or case.
      SparsejaxError: no candidate runs here.
    """
    if kernel not in _CANDIDATES:
        raise _unknown(kernel, _CANDIDATES)
    kernel_of_cases = _MEASURED_WITH.get(kernel, kernel)
    chosen = _chosen(cases() if every is None else every, names or [kernel_of_cases])
    chosen = [case for case in chosen if case.kernel == kernel_of_cases]
    candidates = candidates or _CANDIDATES[kernel]
    times = np.full((len(candidates), len(chosen)), np.inf)
    for column, case in enumerate(chosen):
        report(case.name)
        for i, options in enumerate(candidates):
            try:
                program = case.build(**options)
                timing = time_calls(program.call, repeats=3, calls=_calls(program))
            except jax.errors.JaxRuntimeError as error:  # too much shared memory, for one
                report(f"  {options}: {str(error).splitlines()[0][:120]}")
                continue
            times[i, column] = timing.median / program.operations
            report(f"  {1e3 * times[i, column]:9.4f} ms  {program.amount / times[i, column] / 1e9:9.1f} G/s  {options}")
        if not np.isfinite(times[:, column]).any():
            raise SparsejaxError(f"none of the {len(candidates)} candidates for {kernel} runs {case.name!r} here.")
    best = int((times / times.min(axis=0)).sum(axis=1).argmin())
    report(f"best: {candidates[best]}")
    return candidates[best]
