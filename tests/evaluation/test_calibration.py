"""Calibration against a model whose log-probabilities are known, and contexts' likelihoods under the embedded model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from embedded import embedded_llm

from sparsejax import CompressionParams, SamplingParams
from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation import build_samples, encode_sample
from sparsejax.evaluation.calibration import calibrate, context_nlls, measure_points, params_for, token_nlls
from sparsejax.evaluation.calibration_texts import file_texts, question_text, task_texts
from sparsejax.methods.calibrated_ratio import CalibratedRatio


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


def known_model():
    return KnownModel(embedded_llm().get_tokenizer())


def short_texts(model, lengths=(128, 192, 256)):
    return task_texts(model.tokenizer, tasks=["single"], lengths=lengths, samples=2)


def test_points_are_the_ratio_of_answer_likelihoods():
    model = known_model()
    texts = short_texts(model, lengths=(128, 256))
    compression = CompressionParams(method="compactor", keep_fraction=0.5, blend=0.25)
    points = measure_points(model, compression, texts, keep_fractions=(0.5, 1.0), smoothing=0.1)
    assert [point.keep_fraction for point in points] == [0.5] * 4 + [1.0] * 4
    dense, compressed = model.calls
    assert not any(each.evicts for each in dense)
    assert [each.keep_fraction for each in compressed] == [0.5] * 4 + [1.0] * 4
    for each, text in zip(compressed, texts * 2, strict=True):
        assert (each.method, each.policy.blend) == ("compactor", 0.25)
        assert each.context_tokens == text.context_tokens > 64
    for point, text in zip(points[:4], texts, strict=True):
        # The answer's NLL doubles when half is kept.
        full = len(text.tokens) / 100
        assert point.quality == pytest.approx((full + 0.1) / (2 * full + 0.1))
        assert point.context_nll == pytest.approx(full)
    assert all(point.quality == pytest.approx(1.0) for point in points[4:])


def test_calibrate_fits_what_was_measured():
    model = known_model()
    compression = CompressionParams(method="snapkv", budget_tokens=64, pooling="avg", sink_tokens=2)
    fractions = (0.1, 0.25, 0.5, 0.75)
    ratio = calibrate(model, compression, short_texts(model), keep_fractions=fractions)
    assert (ratio.method, dict(ratio.options)) == ("snapkv", {"pooling": "avg", "sink_tokens": 2})
    assert ratio.least_fraction == 0.1
    # Likelihoods in proportion to what is kept make quality nearly proportional to it.
    for nll in ratio.nll_range:
        assert 1 < nll < 2.6
        assert ratio.quality(0.5, nll) == pytest.approx(0.5, abs=0.05)
        assert ratio.keep_fraction(nll, 0.8) == pytest.approx(0.8, abs=0.06)


def test_parameters_follow_the_context_and_the_calibration(caplog):
    model = known_model()
    ratio = CalibratedRatio(-2.0, -2.0, "snapkv", {"pooling": "avg"}, nll_range=(1.0, 2.0))
    contexts = [[5] * 120, [5] * 180, [5] * 190]
    with caplog.at_level("WARNING"):
        found = params_for(model, ratio, contexts, target=0.9)
    assert not caplog.messages
    assert not model.calls[0][0].evicts
    for params, context in zip(found, contexts, strict=True):
        assert (params.method, params.policy.pooling, params.context_tokens) == ("snapkv", "avg", len(context))
        assert params.keep_fraction == pytest.approx(ratio.keep_fraction(len(context) / 100, 0.9))
    # A worse predicted context needs less here, as alpha is negative.
    assert found[0].keep_fraction > found[1].keep_fraction > found[2].keep_fraction
    (far,) = params_for(model, ratio, [[5] * 400], target=0.9, whole_prompt=True)
    assert "4.00 nats" in caplog.messages[0]
    assert far.context_tokens is None
    assert far.keep_fraction == ratio.keep_fraction(2.0, 0.9)


def test_questions_end_with_the_answer():
    tokenizer = embedded_llm().get_tokenizer()
    text = question_text(tokenizer, "The secret word of apple is river.", "Question: What is it?", "river amber")
    assert tokenizer.decode(text.tokens[-text.answer_tokens :]).strip() == "river amber"
    assert text.answer_tokens == 2
    assert tokenizer.decode(text.context).endswith("is river.\n")
    (sample,) = build_samples(tokenizer, tasks=["multi_query"], lengths=[256], samples=1, seed=3)
    (built,) = task_texts(tokenizer, tasks=["multi_query"], lengths=[256], samples=1, seed=3)
    prompt = encode_sample(tokenizer, sample)
    # The prompt of the evaluation, then the answer.
    assert built.tokens[: -built.answer_tokens] == prompt.tokens
    assert built.context_tokens == prompt.context_tokens
    assert built.answer_tokens == 4


def test_texts_of_files(tmp_path):
    tokenizer = embedded_llm().get_tokenizer()
    asked = {"context": "The secret word of apple is river.", "question": "Question: What?", "answer": "river"}
    prose = "The old king met the young queen. " * 20
    (tmp_path / "a.jsonl").write_text(json.dumps(asked) + "\n\n" + json.dumps({"text": prose}) + "\n")
    first, second = file_texts(tokenizer, tmp_path / "a.jsonl", answer_tokens=8)
    assert first == question_text(tokenizer, *asked.values())
    tokens = tokenizer.encode(prose, add_special_tokens=False)
    assert (second.tokens, second.context_tokens, second.answer_tokens) == (tokens, len(tokens) - 8, 8)
    (tmp_path / "a.txt").write_text(prose)
    pieces = file_texts(tokenizer, tmp_path / "a.txt", lengths=(32, 48), samples=2, answer_tokens=8)
    cuts = [tokens[:32], tokens[32:80], tokens[80:112], tokens[112:160]]
    assert [piece.tokens for piece in pieces] == [cut for cut in cuts if cut]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "nonsense", r"a\.jsonl, line 1 is not JSON"),
        ("a.jsonl", '\n{"context": "x", "question": "y"}', r"line 2 must be an object"),
        ("a.jsonl", '{"text": 3}', r"line 1 must be an object"),
        ("a.jsonl", '{"text": "too short"}', r"line 1 must have at least 10 tokens, 8 of them the answer"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", "too short", "holds no text of 32 tokens"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidArgumentError, match=message):
        file_texts(embedded_llm().get_tokenizer(), tmp_path / name, lengths=(32,), answer_tokens=8)


def test_likelihoods_under_the_embedded_model():
    llm = embedded_llm()
    tokenizer = llm.get_tokenizer()
    text = tokenizer.encode("The secret word of apple is river. The secret word of apple is river.")
    shuffled = [int(token) for token in np.random.default_rng(0).permutation(text)]
    likely, unlikely = context_nlls(llm, [text, shuffled])
    assert 0 < likely < unlikely
    # Token by token, and from there their mean.
    (output,) = llm.generate([text], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    expected = [-entry[token].logprob for token, entry in zip(text[1:], output.prompt_logprobs[1:], strict=True)]
    (nlls,) = token_nlls(llm, [text], CompressionParams())
    assert nlls == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert likely == pytest.approx(np.mean(expected), rel=1e-4)


def test_bad_arguments_are_named(tmp_path):
    model = known_model()
    texts = short_texts(model)
    snapkv = CompressionParams(method="snapkv", keep_fraction=0.5)
    with pytest.raises(InvalidArgumentError, match="at least 2 tokens"):
        context_nlls(model, [[1, 2], [1]])
    with pytest.raises(InvalidArgumentError, match="keeps everything"):
        measure_points(model, CompressionParams(), texts)
    with pytest.raises(InvalidArgumentError, match="keep_fractions"):
        measure_points(model, snapkv, texts, keep_fractions=())
    with pytest.raises(InvalidArgumentError, match="texts"):
        measure_points(model, snapkv, [])
    with pytest.raises(InvalidArgumentError, match="names none"):
        params_for(model, CalibratedRatio(0.0, -5.0), [[1, 2]])
    with pytest.raises(InvalidArgumentError, match="target"):
        params_for(model, CalibratedRatio(0.0, -5.0, "snapkv"), [[1, 2]], target=95)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        file_texts(model.tokenizer, tmp_path / "none.txt")


@pytest.mark.parametrize(("question", "answer"), [("?", "! yes"), ("What?", "!"), ("Now what?", "Yes")])
def test_questions_and_answers_that_begin_like_those_they_are_compared_with(question, answer):
    tokenizer = embedded_llm().get_tokenizer()
    text = question_text(tokenizer, "Anna has a dog . Ben has a cat .", question, answer)
    usual = question_text(tokenizer, "Anna has a dog . Ben has a cat .", "Who has a cat ?", "Ben")
    assert text.context_tokens == usual.context_tokens
    assert text.answer_tokens == len(tokenizer.encode(answer, add_special_tokens=False))


def test_a_tokenizer_without_a_chat_template_is_named():
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        question_text(SimpleNamespace(chat_template=None), "A dog .", "Who ?", "Ben")
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        build_samples(SimpleNamespace(chat_template=None), lengths=[64], samples=1, seed=0)
