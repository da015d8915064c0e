"""What a run tells: a line of metrics now and then, a progress bar, a plot at the end."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.compressor.step import StepMetrics


class RunLog:
    """metrics.jsonl and the progress bar of one process; of a run that goes on, later lines are dropped first."""

    def __init__(self, folder: Path, *, start: int, steps: int, every: int, tokens_per_step: int, shown: bool) -> None:
        """
        Args:
          start: steps done before.
          steps: of the whole run.
          every: steps between lines.
          tokens_per_step: over all processes.
          shown: show a bar.
        """
        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start]
        partial = self.path.with_suffix(".partial")  # a kill meanwhile loses no line
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        self._every, self._tokens = every, tokens_per_step
        self._bar = tqdm(total=steps, initial=start, unit="step", desc="training", disable=not shown)
        self._last = (time.perf_counter(), start)

    def step(self, number: int, metrics: StepMetrics) -> None:
        """Takes note of step `number` (from 1), its metrics on the host."""
        self._bar.update(1)
        if number % self._every and number != self._bar.total:
            return
        now = time.perf_counter()
        rate = self._tokens * (number - self._last[1]) / max(now - self._last[0], 1e-9)
        self._last = (now, number)
        values = {name: float(value) for name, value in metrics._asdict().items()}
        self._file.write(json.dumps({"step": number, **values, "tokens_per_second": round(rate, 1)}) + "\n")
        self._file.flush()
        self._bar.set_postfix_str(
            f"loss {values['loss']:.4f} (ce {values['ce']:.4f} + mse {values['mse']:.4f}), {rate:,.0f} tok/s"
        )

    def close(self) -> None:
        self._bar.close()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, but for one that was cut off; none if there is no file."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def plot_metrics(path: Path, out: Path) -> bool:
    """Draws the losses of a metrics file as out (PNG). False without matplotlib, or with nothing to draw."""
    lines = read_metrics(path)
    if not lines or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    steps = [line["step"] for line in lines]
    titles = {
        "ce": "next-token cross-entropy",
        "mse": "reconstruction error, summed over layers",
        "gradient_norm": "gradient norm",
    }
    for axis, (name, title) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        axis.plot(steps, [line[name] for line in lines])
        axis.set(title=title, xlabel="step")
        if name != "ce":
            axis.set_yscale("log")
    figure.savefig(out)
    return True
