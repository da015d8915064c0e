"""Measures what a context-calibrated ratio is fitted from: how quality falls with what is kept, context by context."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsejax.engine.llm import LLM
from sparsejax.engine.sampling_params import CompressionParams, SamplingParams
from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation.ruler import build_samples, encode_sample
from sparsejax.methods.calibrated_ratio import CalibratedRatio
from sparsejax.validation import number

KEEP_FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)

_SMOOTHING = 0.05


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


def context_nlls(llm: LLM, contexts: Sequence[Sequence[int]]) -> list[float]:
    """Mean negative log-likelihood of each context under the model, nats a token; the first token has none.

    Args:
      contexts: token ids, at least two each.

    Raises:
      InvalidArgumentError: a context is shorter.
    """
    for index, context in enumerate(contexts):
        if len(context) < 2:
            raise InvalidArgumentError(f"contexts must have at least 2 tokens each, number {index} has {len(context)}.")
    return tail_nlls(llm, contexts, [len(context) - 1 for context in contexts])


def tail_nlls(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    counts: Sequence[int],
    compression: CompressionParams | Sequence[CompressionParams] | None = None,
) -> list[float]:
    """Mean negative log-likelihood of the last `counts[i]` tokens of each prompt, nats a token.

    Args:
      prompts: token ids.
      counts: at least 1, less than the prompt has tokens.
      compression: as `LLM.generate` takes it. With `context_tokens` the tokens behind them are predicted from the
        compressed context.
    """
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([list(prompt) for prompt in prompts], params, compression, use_tqdm=False)
    nlls = []
    for prompt, count, output in zip(prompts, counts, outputs, strict=True):
        assert output.prompt_logprobs is not None
        pairs = list(zip(prompt, output.prompt_logprobs, strict=True))[-count:]
        nlls.append(-sum(entry[token].logprob for token, entry in pairs if entry is not None) / count)
    return nlls


def measure_points(
    llm: LLM,
    compression: CompressionParams,
    *,
    keep_fractions: Sequence[float] = KEEP_FRACTIONS,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (1024, 4096),
    samples: int = 8,
    seed: int = 0,
    smoothing: float = _SMOOTHING,
) -> list[CalibrationPoint]:
    """Answers retrieval tasks from contexts that were compressed before the question is seen.

    The quality of a point is (dense + smoothing) / (compressed + smoothing), of the right answer's negative
    log-likelihoods in nats a token: the paper's ratio, which without smoothing has no meaning where the dense model is
    certain of the answer.

    Args:
      llm: with a tokenizer.
      compression: the method and its options; its budget and `context_tokens` are replaced.
      keep_fractions: in (0, 1], each measured on every context.
      tasks, lengths, samples, seed: of the evaluation samples, see `sparsejax.evaluation.evaluate`.
      smoothing: nats a token, positive.

    Returns:
      A point for each keep_fraction and sample, fractions first.

    Raises:
      InvalidArgumentError: a method that drops nothing, no keep_fractions, or an engine without a tokenizer.
    """
    if not compression.evicts:
        raise InvalidArgumentError(f"method {compression.method!r} keeps everything; there is nothing to calibrate.")
    if not keep_fractions:
        raise InvalidArgumentError("keep_fractions must have at least one number, got none.")
    smoothing = number("smoothing", smoothing, 0.0, above=True)
    tokenizer = llm.get_tokenizer()
    if tokenizer is None:
        raise InvalidArgumentError("calibration needs an LLM with a tokenizer; this one was made without.")
    items = build_samples(tokenizer, tasks=tasks, lengths=lengths, samples=samples, seed=seed)
    encoded = [encode_sample(tokenizer, item) for item in items]
    answers = [tokenizer.encode(" ".join(item.answers), add_special_tokens=False) for item in items]
    prompts = [[*each.tokens, *answer] for each, answer in zip(encoded, answers, strict=True)]
    counts = [len(answer) for answer in answers]
    nlls = context_nlls(llm, [each.tokens[: each.context_tokens] for each in encoded])
    dense = tail_nlls(llm, prompts, counts, CompressionParams())
    points = []
    for fraction in keep_fractions:
        kept = [
            dataclasses.replace(
                compression, budget_tokens=None, keep_fraction=fraction, context_tokens=each.context_tokens
            )
            for each in encoded
        ]
        compressed = tail_nlls(llm, prompts, counts, kept)
        points += [
            CalibrationPoint(fraction, nll, (full + smoothing) / (part + smoothing))
            for nll, full, part in zip(nlls, dense, compressed, strict=True)
        ]
    return points


def calibrate(llm: LLM, compression: CompressionParams, **measurement: Any) -> CalibratedRatio:
    """`measure_points` with the same arguments, and the fit of what it found."""
    points = measure_points(llm, compression, **measurement)
    return CalibratedRatio.fit(
        [point.keep_fraction for point in points],
        [point.context_nll for point in points],
        [point.quality for point in points],
        method=compression.method,
    )
