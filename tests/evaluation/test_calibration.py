"""Calibration against a model whose log-probabilities are known, and contexts' likelihoods under the embedded model."""

from types import SimpleNamespace

import numpy as np
import pytest
from embedded import embedded_llm

from sparsejax import CompressionParams, SamplingParams
from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation.calibration import calibrate, context_nlls, measure_points, tail_nlls


class KnownModel:
    """Predicts each token of a text with the same likelihood, the worse the less of the context is kept.

    A prompt's own NLL is (its number of tokens) / 100 nats a token when dense; compressed, that over the fraction kept.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls = []

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, sampling_params, compression_params=None, *, use_tqdm=True):
        many = compression_params if isinstance(compression_params, list) else [compression_params] * len(prompts)
        self.calls.append(many)
        outputs = []
        for prompt, compression in zip(prompts, many, strict=True):
            kept = 1.0 if compression is None or not compression.evicts else compression.keep_fraction
            logprob = -len(prompt) / 100 / kept
            entries = [None] + [{token: SimpleNamespace(logprob=logprob)} for token in prompt[1:]]
            outputs.append(SimpleNamespace(prompt_logprobs=entries))
        return outputs


def task_name():
    from sparsejax.evaluation import TASKS

    return next(iter(TASKS))


def known_model():
    return KnownModel(embedded_llm().get_tokenizer())


def test_points_are_the_ratio_of_answer_likelihoods():
    model = known_model()
    compression = CompressionParams(method="compactor", keep_fraction=0.5, blend=0.25)
    points = measure_points(
        model, compression, keep_fractions=(0.5, 1.0), tasks=[task_name()], lengths=(128, 256), samples=2, smoothing=0.1
    )
    assert [point.keep_fraction for point in points] == [0.5] * 4 + [1.0] * 4
    contexts, dense, half, whole = model.calls
    assert not dense[0].evicts
    assert contexts[0] is None
    for each in half:
        assert (each.method, each.keep_fraction, each.policy.blend) == ("compactor", 0.5, 0.25)
        assert each.context_tokens > 64
    for point in points[:4]:
        # The answer's NLL doubles when half is kept.
        full = (point.quality * 0.1 - 0.1) / (1 - 2 * point.quality)
        assert point.quality < 1
        assert 0.5 < full < 3
    assert all(point.quality == pytest.approx(1.0) for point in points[4:])
    # Longer contexts are less likely, by the model's definition.
    assert points[0].context_nll < points[2].context_nll
    assert [each.keep_fraction for each in whole] == [1.0] * 4


def test_calibrate_fits_what_was_measured():
    ratio = calibrate(
        known_model(), CompressionParams(method="snapkv", budget_tokens=64), keep_fractions=(0.1, 0.25, 0.5, 0.75),
        tasks=[task_name()], lengths=(128, 192, 256), samples=2,
    )  # fmt: skip
    assert ratio.method == "snapkv"
    # Likelihoods in proportion to what is kept make quality nearly proportional to it.
    for nll in (1.0, 2.0):
        assert ratio.quality(0.5, nll) == pytest.approx(0.5, abs=0.05)
        assert ratio.keep_fraction(nll, 0.8) == pytest.approx(0.8, abs=0.06)


def test_likelihoods_under_the_embedded_model():
    llm = embedded_llm()
    tokenizer = llm.get_tokenizer()
    text = tokenizer.encode("The secret word of apple is river. The secret word of apple is river.")
    shuffled = [int(token) for token in np.random.default_rng(0).permutation(text)]
    likely, unlikely = context_nlls(llm, [text, shuffled])
    assert 0 < likely < unlikely
    # A tail counts its own tokens only.
    (output,) = llm.generate([text], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    expected = -np.mean(
        [entry[token].logprob for token, entry in zip(text[-3:], output.prompt_logprobs[-3:], strict=True)]
    )
    assert tail_nlls(llm, [text], [3])[0] == pytest.approx(expected, rel=1e-5)


def test_bad_arguments_are_named():
    model = known_model()
    snapkv = CompressionParams(method="snapkv", keep_fraction=0.5)
    with pytest.raises(InvalidArgumentError, match="at least 2 tokens"):
        context_nlls(model, [[1, 2], [1]])
    with pytest.raises(InvalidArgumentError, match="keeps everything"):
        measure_points(model, CompressionParams())
    with pytest.raises(InvalidArgumentError, match="keep_fractions"):
        measure_points(model, snapkv, keep_fractions=())
    with pytest.raises(InvalidArgumentError, match="tokenizer"):
        measure_points(KnownModel(None), snapkv)
