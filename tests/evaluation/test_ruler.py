"""The evaluation loop with an oracle in place of a model."""

import pytest
from transformers import AutoTokenizer

from sparsejax.assets import tiny_model_path
from sparsejax.evaluation import ANSWER_TOKENS, TASKS, build_samples, encode_sample, evaluate


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny_model_path())


def oracle(tokenizer, *, wrong_tasks=(), seed=5, lengths=(256,), samples=2):
    """A generator that knows the answers."""
    answers = {}
    for sample in build_samples(tokenizer, lengths=lengths, samples=samples, seed=seed):
        text = " wrong" if sample.task in wrong_tasks else " " + " ".join(sample.answers)
        answers[tuple(encode_sample(tokenizer, sample).tokens)] = tokenizer.encode(text + tokenizer.eos_token)
    return lambda prompts: [answers[tuple(prompt)] for prompt in prompts]


def test_an_oracle_scores_full_marks(tokenizer):
    rows = evaluate(oracle(tokenizer), tokenizer, lengths=(256,), samples=2, seed=5, batch_size=5, progress=False)
    assert [row.task for row in rows] == list(TASKS)
    assert all(row.score == 1.0 and row.samples == 2 and row.length == 256 for row in rows)


def test_wrong_answers_count_where_they_belong(tokenizer):
    generate = oracle(tokenizer, wrong_tasks=("multi_key",))
    rows = evaluate(generate, tokenizer, lengths=(256,), samples=2, seed=5, progress=False)
    assert {row.task for row in rows if row.score == 0.0} == {"multi_key"}


def test_an_interrupted_evaluation_hands_over_what_is_complete(tokenizer):
    known, calls, seen = oracle(tokenizer), [], []

    def interrupted(prompts):
        calls.append(prompts)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return known(prompts)

    with pytest.raises(KeyboardInterrupt):
        evaluate(
            interrupted, tokenizer, lengths=(256,), samples=2, seed=5, batch_size=3, progress=False,
            on_rows=seen.append,
        )  # fmt: skip
    assert [[(row.task, row.samples) for row in rows] for rows in seen] == [[(task, 2) for task in list(TASKS)[:3]]]


def test_prompts_never_exceed_the_length(tokenizer):
    for sample in build_samples(tokenizer, lengths=(256, 512), samples=1, seed=0):
        prompt = encode_sample(tokenizer, sample)
        assert sample.length - 3 * ANSWER_TOKENS < len(prompt.tokens) <= sample.length - ANSWER_TOKENS


def test_context_ends_where_the_question_begins(tokenizer):
    for sample in build_samples(tokenizer, lengths=(256,), samples=1, seed=0):
        prompt = encode_sample(tokenizer, sample)
        assert tokenizer.decode(prompt.tokens[: prompt.context_tokens]).endswith(f"{sample.context}\n")
        assert tokenizer.decode(prompt.tokens[prompt.context_tokens :]).startswith(sample.question)


def test_no_samples_is_an_error(tokenizer):
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        build_samples(tokenizer, lengths=(256,), samples=0, seed=0)
