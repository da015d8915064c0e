"""Compares methods on the retrieval tasks: accuracy and what is kept or read, by budget.

A method that evicts sees one of two things before it compresses, and the two are never mixed:

* "aware": the whole prompt but its last token. That one, the mark where the answer begins, is computed over the
  compressed cache, so every token of the answer is. (Compressing after the very last token would leave the first
  token of the answer to dense attention; where answers are one word, nothing would be measured.)
* "agnostic": the context only. The question comes when the context has been compressed.

Every such method compresses once, so that what differs is the choice and nothing else.

A method that selects keeps everything. Its lines ("reading") are apart: their budget is the share of the text that its
selecting layers read of it. The last token of the prompt is decoded, so every token of the answer is computed from what
was read.

A method that stores tokens compressed is compared by what its cache holds ("storing"). How it stores belongs to the
engine, so each way of storing has an engine of its own, and its lines name it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from sparsejax import methods as registry
from sparsejax.engine.llm import LLM
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.outputs import RequestOutput
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.errors import InvalidArgumentError, SparsejaxError
from sparsejax.evaluation.ruler import EncodedPrompt, build_samples, encode_sample
from sparsejax.evaluation.scoring import bootstrap_interval, exact_match
from sparsejax.evaluation.tasks import ANSWER_TOKENS

Mode = Literal["dense", "aware", "agnostic", "reading", "storing"]
MODES: tuple[Mode, ...] = ("aware", "agnostic")  # of methods that evict
ALL_TASKS = "all"


@dataclass(frozen=True)
class Setting:
    """One line of a comparison.

    Attributes:
      mode: what is seen before compressing; "dense" compresses nothing, "reading" reads a part, "storing" stores tokens
        compressed and reads a part of them.
      budget: tokens per layer and head (int), or fraction of the text (float); None if dense.
      compression: the parameters but for what depends on the prompt: `context_tokens`, and `top_tokens`.
      variant: names what is particular to the engine, such as the type of stored tokens; "": nothing.
    """

    mode: Mode
    budget: float | None
    compression: CompressionParams
    variant: str = ""

    def compression_of(self, prompt: EncodedPrompt) -> CompressionParams:
        """The parameters of one prompt."""
        if self.mode == "dense" or self.budget is None:
            return self.compression
        if self.mode == "storing":
            length = len(prompt.tokens)
            top = self.budget if self.budget < 1 else length if self.budget == 1.0 else self.budget
            options = {**dict(self.compression.options), "top_tokens": top}
            return dataclasses.replace(self.compression, context_tokens=length - 1, options=options)
        if self.mode == "reading":
            length = len(prompt.tokens)
            budget = self.budget if isinstance(self.budget, int) else math.ceil(self.budget * length)
            top = max(budget - self.compression.sinks - self.compression.recent_window, 1)
            options = {**dict(self.compression.options), "top_tokens": top}
            return dataclasses.replace(self.compression, context_tokens=length - 1, options=options)
        seen = prompt.context_tokens if self.mode == "agnostic" else len(prompt.tokens) - 1
        return dataclasses.replace(self.compression, context_tokens=seen)


@dataclass(frozen=True)
class MethodRow:
    """What one setting did on one task at one length.

    Attributes:
      method, mode, budget, variant: see `Setting`.
      task: its name, or "all".
      length: tokens asked for.
      hits: whether each sample's answer was exact.
      kv_bytes: cache after compression, whole pages, mean over the samples; of a prompt that was within its budget, and
        if dense: the most that it held.
      dense_kv_bytes: the most that the same prompts hold when dense.
      read_tokens: tokens that decoding reads, mean over layers, steps and samples; None if the method evicts.
      dense_read_tokens: the same of the dense line.
    """

    method: str
    mode: Mode
    budget: float | None
    task: str
    length: int
    hits: tuple[bool, ...]
    kv_bytes: float
    dense_kv_bytes: float
    read_tokens: float | None = None
    dense_read_tokens: float | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        """The method, and what is particular to its engine."""
        return f"{self.method} {self.variant}".rstrip()

    @property
    def score(self) -> float:
        """Fraction of exact answers."""
        return sum(self.hits) / len(self.hits)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap confidence interval of the score."""
        return bootstrap_interval(self.hits)

    @property
    def kept(self) -> float:
        """Share of the dense cache's bytes that is left."""
        return self.kv_bytes / self.dense_kv_bytes

    @property
    def read(self) -> float:
        """Share of the dense line's tokens that decoding reads. A method that evicts reads what it keeps."""
        if self.read_tokens is None or not self.dense_read_tokens:
            return self.kept
        return self.read_tokens / self.dense_read_tokens

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with what follows from the fields."""
        low, high = self.interval
        return {
            **dataclasses.asdict(self),
            "score": self.score,
            "low": low,
            "high": high,
            "kept": self.kept,
            "read": self.read,
        }


SWEPT = ("method", "budget_tokens", "keep_fraction", "context_tokens", "top_tokens")
"""Arguments of `CompressionParams` that a sweep's budgets and modes set."""


def make_settings(
    methods: Sequence[str],
    budgets: Sequence[float],
    modes: Sequence[Mode] = MODES,
    *,
    common: Mapping[str, Any] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    variant: str = "",
) -> list[Setting]:
    """The dense line, then each mode, method and budget; then the methods that select.

    Args:
      methods: names; "full" is the dense line, which is there in any case.
      budgets: a float is a fraction in (0, 1], an int a number of tokens.
      modes: of `MODES`, for methods that evict.
      common: arguments of `CompressionParams` for all methods.
      options: arguments for single methods, by method; they win over the common ones.
      variant: of the engine that is going to store requests compressed.

    Raises:
      InvalidArgumentError: parameters that do not fit a method; the message names method and budget.
    """
    families = {name: registry.get(name).family for name in dict.fromkeys(methods)}
    evicting, selecting, storing = (
        [name for name in families if families[name] == each] for each in ("evict", "select", "store")
    )
    for name in options or {}:
        if name not in (*evicting, *selecting, *storing):
            raise InvalidArgumentError(f"options are given for method {name!r}, which is not among those compared.")
    if (evicting or selecting or storing) and not budgets:
        raise InvalidArgumentError("budgets must have at least one number.")
    for mode in modes:
        if mode not in MODES:
            raise InvalidArgumentError(f"modes must be of {', '.join(MODES)}; got {mode!r}.")
    for name in (*evicting, *storing, *selecting):
        for argument in (options or {}).get(name, {}):
            if argument in SWEPT:
                raise InvalidArgumentError(f"method {name!r} cannot be given {argument}: the sweep sets it itself.")
    settings = [Setting("dense", None, CompressionParams())]
    for mode in modes:
        for name in evicting:
            for budget in budgets:
                given = {"compress_once": True, **(common or {}), **(options or {}).get(name, {})}
                given["budget_tokens" if isinstance(budget, int) else "keep_fraction"] = budget
                try:
                    compression = CompressionParams(method=name, **given)
                except SparsejaxError as error:
                    raise type(error)(f"method {name!r} at budget {budget}: {error}") from None
                settings.append(Setting(mode, budget, compression))
    for name in storing:
        compression = CompressionParams(method=name, **dict((options or {}).get(name, {})))
        settings += [Setting("storing", budget, compression, variant) for budget in budgets]
    for name in selecting:
        shared = {key: value for key, value in (common or {}).items() if key in ("sink_tokens", "recent_tokens")}
        try:
            compression = CompressionParams(method=name, **shared | dict((options or {}).get(name, {})))
        except SparsejaxError as error:
            raise type(error)(f"method {name!r}: {error}") from None
        settings += [Setting("reading", budget, compression) for budget in budgets]
    return settings


def compare_methods(
    llm: LLM,
    settings: Sequence[Setting],
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (1024, 4096),
    samples: int = 8,
    seed: int = 0,
    dense: Sequence[MethodRow] = (),
    progress: bool = True,
    on_rows: Callable[[list[MethodRow]], None] | None = None,
) -> list[MethodRow]:
    """Answers the same samples under every setting, all in one continuous batch.

    Args:
      llm: with a tokenizer; made with the settings' methods, or it rebuilds its cache for them.
      settings: of `make_settings`; the first must be dense, all others are compared with its bytes, unless `dense` is
        given.
      tasks, lengths, samples, seed: see `sparsejax.evaluation.evaluate`.
      dense: rows that another engine gave for the same samples when dense.
      progress: show a progress bar.
      on_rows: called with the rows at the end, or with those whose samples have all been answered if the comparison is
        interrupted or fails.

    Returns:
      A row for each setting, length and task, in that order; none for those in `dense`.

    Raises:
      InvalidArgumentError: no tokenizer, a prompt that does not fit the engine, or the first setting is not dense.
    """
    known = {(row.length, row.task): row for row in dense if row.mode == "dense"}
    if not settings or (settings[0].mode != "dense" and not known):
        raise InvalidArgumentError("settings must begin with a dense one, whose bytes the others are compared with.")
    tokenizer = llm.get_tokenizer()
    if tokenizer is None:
        raise InvalidArgumentError("evaluation needs an LLM with a tokenizer; this one was made without.")
    items = build_samples(tokenizer, tasks=tasks, lengths=lengths, samples=samples, seed=seed)
    encoded = [encode_sample(tokenizer, item) for item in items]
    asked = [(place, i) for place in range(len(settings)) for i in range(len(items))]
    answers: list[_Answer | None] = [None] * len(asked)

    def take(index: int, output: RequestOutput) -> None:
        item, metrics = items[asked[index][1]], output.metrics
        compressed = metrics.kv_bytes_before_compression > 0
        answers[index] = _Answer(
            hit=exact_match(output.outputs[0].text, item.answers, ordered=item.ordered),
            kv_bytes=metrics.kv_bytes_after_compression if compressed else metrics.kv_bytes,
            read_tokens=metrics.read_tokens,
        )

    rows: list[MethodRow] = []
    try:
        llm.generate(
            [encoded[i].tokens for _, i in asked],
            SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS),
            [settings[place].compression_of(encoded[i]) for place, i in asked],
            use_tqdm=progress,
            on_output=take,
        )
    finally:
        groups: dict[tuple[int, int, str], list[_Answer | None]] = {}
        for (place, i), answer in zip(asked, answers, strict=True):
            groups.setdefault((place, items[i].length, items[i].task), []).append(answer)
        rows += _complete_rows(settings, groups, known)
        if on_rows is not None:
            on_rows(rows)
    return rows


class _Answer(NamedTuple):
    """What counts of an answer: `MethodRow` has the mean of the numbers."""

    hit: bool
    kv_bytes: int
    read_tokens: float | None


def _complete_rows(
    settings: Sequence[Setting],
    groups: Mapping[tuple[int, int, str], Sequence[_Answer | None]],
    dense: Mapping[tuple[int, str], MethodRow],
) -> list[MethodRow]:
    """The rows of which every answer is there, and what they are compared with.

    Args:
      groups: the answers by index of the setting, length and task, those of the first setting first.
      dense: dense rows by length and task; where there are none, the first setting gives them.
    """
    base, rows = dict(dense), []
    for (place, length, task), answers in groups.items():
        given = [answer for answer in answers if answer is not None]
        if len(given) < len(answers):
            continue
        setting = settings[place]
        row = MethodRow(
            method=setting.compression.method,
            mode=setting.mode,
            budget=setting.budget,
            task=task,
            length=length,
            hits=tuple(answer.hit for answer in given),
            kv_bytes=float(np.mean([answer.kv_bytes for answer in given])),
            dense_kv_bytes=math.nan,
            read_tokens=_mean([answer.read_tokens for answer in given]),
            variant=setting.variant,
        )
        if place == 0:
            base.setdefault((length, task), row)
        if (length, task) in base:
            against = base[length, task]
            rows.append(
                dataclasses.replace(row, dense_kv_bytes=against.kv_bytes, dense_read_tokens=against.read_tokens)
            )
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there; None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def over_tasks(rows: Sequence[MethodRow]) -> list[MethodRow]:
    """One row for each method, variant, mode, budget and length, of all tasks' samples together."""
    groups: dict[tuple, list[MethodRow]] = {}
    for row in rows:
        groups.setdefault((row.name, row.mode, row.budget, row.length), []).append(row)
    return [
        dataclasses.replace(
            group[0],
            task=ALL_TASKS,
            hits=tuple(hit for row in group for hit in row.hits),
            kv_bytes=float(np.average([row.kv_bytes for row in group], weights=[len(row.hits) for row in group])),
            dense_kv_bytes=float(
                np.average([row.dense_kv_bytes for row in group], weights=[len(row.hits) for row in group])
            ),
            read_tokens=_mean([row.read_tokens for row in group for _ in row.hits]),
            dense_read_tokens=_mean([row.dense_read_tokens for row in group for _ in row.hits]),
        )
        for group in groups.values()
    ]


def format_budget(budget: float | None) -> str:
    """A fraction in percent, a number of tokens as it is."""
    return "-" if budget is None else str(budget) if isinstance(budget, int) else f"{100 * budget:g}%"


def format_methods(rows: Sequence[MethodRow]) -> str:
    """Plain-text tables, one for each length and mode, the dense line first in each; scores in percent, or "-"."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    titles = {
        "aware": "query-aware: compressed with the question",
        "agnostic": "query-agnostic: compressed before it",
        "reading": "reading a part: all is kept, and the budget is what selecting layers read",
        "storing": "storing compressed: the budget is what is read of the compressed tokens",
    }
    widths = [max(6, len(task)) + 2 for task in tasks]
    name_width = max([len(row.name) for row in rows] + [6]) + 2

    def line(method: str, budget: str, shares: Sequence[str], scores: Sequence[str], mean: str, interval: str) -> str:
        held = "".join(f"{text:>{width}}" for text, width in zip(shares, (9, 8, 8), strict=True))
        cells = "".join(f"{score:>{width}}" for score, width in zip(scores, widths, strict=True))
        return f"{method:<{name_width}}{budget:>8}{held}{cells}{mean:>7}{interval:>15}"

    tables = []
    for length in dict.fromkeys(row.length for row in rows):
        at_length = [row for row in rows if row.length == length]
        samples = len(at_length[0].hits)
        for mode in dict.fromkeys(row.mode for row in at_length if row.mode != "dense") or ("dense",):
            lines = [
                f"{titles.get(mode, 'dense')}; {length} tokens, {samples} samples a task",
                line("method", "budget", ("KV MiB", "kept", "read"), tasks, "mean", "95% interval"),
            ]
            for row in over_tasks([row for row in at_length if row.mode in ("dense", mode)]):
                scores = {
                    each.task: each.score
                    for each in at_length
                    if (each.name, each.mode, each.budget) == (row.name, row.mode, row.budget)
                }
                whole = all(task in scores for task in tasks)  # not if it was interrupted
                low, high = row.interval
                lines.append(
                    line(
                        row.name,
                        format_budget(row.budget),
                        (f"{row.kv_bytes / 2**20:.2f}", f"{100 * row.kept:.1f}%", f"{100 * row.read:.1f}%"),
                        [f"{100 * scores[task]:.1f}" if task in scores else "-" for task in tasks],
                        f"{100 * row.score:.1f}" if whole else "-",
                        f"{100 * low:.1f} - {100 * high:.1f}" if whole else "-",
                    )
                )
            tables.append("\n".join(lines))
    return "\n\n".join(tables)
