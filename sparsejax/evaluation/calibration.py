"""Context-calibrated compression: measuring how quality falls with what is kept, and using what was fitted from it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsejax.engine.llm import LLM
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation.calibration_texts import CalibrationText
from sparsejax.methods.calibrated_ratio import CalibratedRatio
from sparsejax.validation import number

logger = logging.getLogger(__name__)

KEEP_FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
SMOOTHING = 0.05

# What the measurement sets, of the fields of CompressionParams.
_MEASURED = ("method", "budget_tokens", "keep_fraction", "context_tokens", "options")


@dataclass(frozen=True)
class CalibrationPoint:
    """One context answered from a part of it.

    Attributes:
      keep_fraction: share of the context's cache that was kept.
      context_nll: the context's mean negative log-likelihood, nats a token.
      quality: of the answer, relative to dense.
    """

    keep_fraction: float
    context_nll: float
    quality: float


def token_nlls(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    compression: CompressionParams | Sequence[CompressionParams],
    *,
    progress: bool = False,
) -> list[list[float]]:
    """Negative log-likelihood of each token of each prompt but the first, which nothing precedes; nats.

    Args:
      prompts: token ids, at least two each.
      compression: as `LLM.generate` takes it. With `context_tokens` the tokens behind them are predicted from the
        compressed context.
      progress: show a progress bar.

    Raises:
      InvalidArgumentError: a prompt is shorter, or a parameter does not fit the engine.
    """
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not hasattr(prompt, "__len__"):
            raise InvalidArgumentError(
                f"prompts must be a list of lists of token ids, number {index} is {prompt!r:.80}."
            )
        if len(prompt) < 2:
            raise InvalidArgumentError(f"prompts must have at least 2 tokens each, number {index} has {len(prompt)}.")
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([list(prompt) for prompt in prompts], params, compression, use_tqdm=progress)
    nlls = []
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        entries = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
        # A sum of probabilities can come out a rounding error above 1.
        nlls.append([max(-entry[token].logprob, 0.0) for token, entry in entries if entry is not None])
    return nlls


def context_nlls(llm: LLM, contexts: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log-likelihood of each context under the dense model, nats a token. Arguments of `token_nlls`."""
    return [_mean(nlls) for nlls in token_nlls(llm, contexts, CompressionParams())]


def measure_points(
    llm: LLM,
    compression: CompressionParams,
    texts: Sequence[CalibrationText],
    *,
    keep_fractions: Sequence[float] = KEEP_FRACTIONS,
    smoothing: float = SMOOTHING,
    progress: bool = False,
) -> list[CalibrationPoint]:
    """Predicts answers from contexts that were compressed before the question is seen.

    The quality of a point is (dense + smoothing) / (compressed + smoothing), of the answer's negative log-likelihoods
    in nats a token: the paper's ratio, which without smoothing has no meaning where the dense model is certain of the
    answer.

    Args:
      compression: the method and its options; its budget and `context_tokens` are replaced.
      texts: of `task_texts` or `file_texts`.
      keep_fractions: in (0, 1], each measured on every context.
      smoothing: nats a token, positive. With a certain dense model a quality of q means smoothing * (1 / q - 1) nats
        lost a token.
      progress: show progress bars.

    Returns:
      A point for each keep_fraction and text, fractions first.

    Raises:
      InvalidArgumentError: a method that drops nothing, no keep_fractions, no texts.
    """
    if not compression.evicts:
        raise InvalidArgumentError(f"method {compression.method!r} keeps everything; there is nothing to calibrate.")
    for name, values in (("keep_fractions", keep_fractions), ("texts", texts)):
        if not values:
            raise InvalidArgumentError(f"{name} must have at least one entry, got none.")
    smoothing = number("smoothing", smoothing, 0.0, above=True)
    kept = [
        dataclasses.replace(compression, budget_tokens=None, keep_fraction=fraction, context_tokens=text.context_tokens)
        for fraction in keep_fractions
        for text in texts
    ]
    # All at once, so that the engine can batch. One dense pass gives the context's likelihood and the answer's.
    prompts = [text.tokens for text in texts]
    dense = token_nlls(llm, prompts, CompressionParams(), progress=progress)
    compressed = token_nlls(llm, prompts * len(keep_fractions), kept, progress=progress)
    points = []
    for index, (params, nlls) in enumerate(zip(kept, compressed, strict=True)):
        text, whole = texts[index % len(texts)], dense[index % len(texts)]
        full, part = (_mean(each[-text.answer_tokens :]) for each in (whole, nlls))
        assert params.keep_fraction is not None
        points.append(
            CalibrationPoint(
                keep_fraction=params.keep_fraction,
                context_nll=_mean(whole[: text.context_tokens - 1]),
                quality=(full + smoothing) / (part + smoothing),
            )
        )
    return points


def fit(compression: CompressionParams, points: Sequence[CalibrationPoint]) -> CalibratedRatio:
    """The ratio that what `measure_points` measured with `compression` comes closest to."""
    return CalibratedRatio.fit(
        [point.keep_fraction for point in points],
        [point.context_nll for point in points],
        [point.quality for point in points],
        method=compression.method,
        options=_arguments(compression),
    )


def calibrate(
    llm: LLM, compression: CompressionParams, texts: Sequence[CalibrationText], **measurement: Any
) -> CalibratedRatio:
    """`measure_points` with the same arguments, and the fit of what it found."""
    return fit(compression, measure_points(llm, compression, texts, **measurement))


def params_for(
    llm: LLM,
    ratio: CalibratedRatio,
    contexts: Sequence[Sequence[int]],
    *,
    target: float = 0.95,
    whole_prompt: bool = False,
) -> list[CompressionParams]:
    """Parameters that keep as much of each context as the target needs.

        ratio = CalibratedRatio.load("compactor.json")
        compression = params_for(llm, ratio, [context], target=0.95)
        llm.generate([context + question], params, compression)

    Args:
      ratio: made for this model; it brings the method and its options.
      contexts: token ids, at least two each. Their likelihood is measured by a dense pass over them.
      target: quality relative to dense, in (0, 1].
      whole_prompt: compress the whole prompt, question included, instead of the first `len(context)` tokens of it.

    Raises:
      InvalidArgumentError: a ratio without a method, or a bad argument.
    """
    if not ratio.method:
        raise InvalidArgumentError("ratio must have been fitted for a method; this one names none.")
    target = number("target", target, 0.0, 1.0, above=True)
    found = []
    for context, nll in zip(contexts, context_nlls(llm, contexts), strict=True):
        if ratio.nll_range is not None and not ratio.nll_range[0] <= nll <= ratio.nll_range[1]:
            low, high = ratio.nll_range
            logger.warning(
                "a context of %.2f nats a token is unlike those of the calibration (%.2f to %.2f)", nll, low, high
            )
        seen = None if whole_prompt else len(context)
        fraction = ratio.keep_fraction(nll, target)
        arguments: dict[str, Any] = dict(ratio.options)
        found.append(CompressionParams(method=ratio.method, keep_fraction=fraction, context_tokens=seen, **arguments))
    return found


def format_calibration(ratio: CalibratedRatio, points: Sequence[CalibrationPoint], target: float) -> str:
    """A table of what was measured and what the fit makes of it, and what it would keep of these contexts."""
    nlls = list(dict.fromkeys(point.context_nll for point in points))
    lines = [
        f"{ratio.method}: {len(nlls)} contexts of {min(nlls):.2f} to {max(nlls):.2f} nats a token",
        f"{'kept':>6} {'quality':>9} {'lowest':>8} {'predicted':>10}",
    ]
    for fraction in dict.fromkeys(point.keep_fraction for point in points):
        measured = [point.quality for point in points if point.keep_fraction == fraction]
        predicted = _mean([ratio.quality(fraction, nll) for nll in nlls])
        lines.append(f"{fraction:>6.1%} {_mean(measured):>9.3f} {min(measured):>8.3f} {predicted:>10.3f}")
    wanted = [ratio.keep_fraction(nll, target) for nll in nlls]
    lines.append(
        f"for a quality of {target:g} it keeps {_mean(wanted):.1%} of these contexts "
        f"({min(wanted):.1%} to {max(wanted):.1%})"
    )
    return "\n".join(lines)


def _arguments(compression: CompressionParams) -> dict[str, Any]:
    """What was given beside the method and the budget."""
    fields = [field.name for field in dataclasses.fields(compression) if field.name not in _MEASURED]
    common = {name: getattr(compression, name) for name in fields if getattr(compression, name) is not None}
    return {**common, **dict(compression.options)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
