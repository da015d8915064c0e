"""Scoring of generated answers: exact match, means with confidence intervals, and tables."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

_WORD = re.compile(r"\w+")


def answer_words(text: str) -> tuple[str, ...]:
    """The words of an answer in lower case; punctuation and spacing do not count."""
    return tuple(_WORD.findall(text.lower()))


def exact_match(text: str, answers: Sequence[str], *, ordered: bool = True) -> bool:
    """Whether `text` consists of exactly the words of `answers`.

    Args:
        text: the generated answer.
        answers: the words of the right answer.
        ordered: False accepts them in any order; each must still occur exactly as often as in `answers`.
    """
    got, want = answer_words(text), tuple(word.lower() for word in answers)
    return got == want if ordered else sorted(got) == sorted(want)


@dataclass(frozen=True)
class Row:
    """Score of one task at one length.

    Attributes:
        task: name of the task.
        length: tokens asked for.
        samples: number of samples.
        score: fraction of exact matches.
    """

    task: str
    length: int
    samples: int
    score: float


def mean_scores(rows: Iterable[Row]) -> dict[int, float]:
    """Mean over tasks of the score at each length."""
    by_length: dict[int, list[float]] = {}
    for row in rows:
        by_length.setdefault(row.length, []).append(row.score)
    return {length: sum(scores) / len(scores) for length, scores in sorted(by_length.items())}


def bootstrap_interval(
    hits: Sequence[bool], *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the mean by the percentile bootstrap: the same hits always give the same interval.

    If all hits are equal the interval has no width; it then says nothing about how sure the mean is.

    Args:
        hits: outcomes, at least one.
        level: share of resampled means inside, in (0, 1).
        resamples: draws of as many outcomes as there are, with replacement.
        seed: of the draws.
    """
    # How many hits a resample has depends on their number only.
    counts = np.random.default_rng(seed).binomial(len(hits), np.mean(hits), resamples)
    low, high = np.quantile(counts / len(hits), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def format_table(rows: Sequence[Row]) -> str:
    """Plain-text table: a line per task, a column per length, scores in percent, the mean over all tasks last."""
    lengths = sorted({row.length for row in rows})
    tasks = list(dict.fromkeys(row.task for row in rows))
    scores = {(row.task, row.length): row.score for row in rows}
    width = max((len(task) for task in tasks), default=0)
    width = max(width, len("mean"))

    def line(name: str, values: Sequence[float | None]) -> str:
        cells = "".join(f"{'-' if value is None else f'{100 * value:.1f}':>9}" for value in values)
        return f"{name:<{width}}{cells}"

    means = mean_scores(rows)
    whole = {length: len(tasks) == sum(row.length == length for row in rows) for length in lengths}
    return "\n".join(
        [
            f"{'task':<{width}}" + "".join(f"{length:>9}" for length in lengths),
            *(line(task, [scores.get((task, length)) for length in lengths]) for task in tasks),
            line("mean", [means[length] if whole[length] else None for length in lengths]),
        ]
    )
