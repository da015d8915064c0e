"""The embedded tokenizer: task words are single tokens, any text round-trips, the chat template is what was trained."""

import json

import pytest
from transformers import AutoTokenizer

from sparsejax.assets import tiny_model_path
from sparsejax.evaluation import TASKS, encode_sample, make_sample
from sparsejax.evaluation.tasks import count_words
from sparsejax.evaluation.words import POOLS
from train.data import answered
from train.tokenizer import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture(scope="module")
def shipped():
    return AutoTokenizer.from_pretrained(tiny_model_path())


def test_every_task_word_is_one_token(tokenizer):
    for pool in POOLS.values():
        assert all(len(tokenizer.encode(f" {word}").ids) == 1 for word in pool)


def test_special_tokens_come_first_and_are_never_split(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.encode("a<|end|>b").tokens == ["a", "<|end|>", "b"]
    assert tokenizer.get_vocab_size() % 64 == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The secret word of otter is topaz.",
        "  two  spaces,\ttab\n\nand lines \r\n",
        "naïve café — “quotes” … Ω≈ç√",
        "世界你好,こんにちは,안녕하세요",
        "🎉👩‍👩‍👧‍👦🏳️‍🌈 emoji",
        "def f(x):\n    return x['a'] ** 2  # 100%",
        "\x00\x7f\u200b\ufeff",
    ],
)
def test_any_text_round_trips(shipped, text):
    ids = shipped.encode(text, add_special_tokens=False)
    assert shipped.decode(ids) == text


def test_training_the_tokenizer_is_deterministic_and_gives_the_shipped_one(tokenizer):
    shipped = json.loads((tiny_model_path() / "tokenizer.json").read_text())["model"]
    trained = json.loads(tokenizer.to_str())["model"]
    assert trained["vocab"] == shipped["vocab"]
    assert trained["merges"] == shipped["merges"]


@pytest.mark.parametrize("task", TASKS)
def test_chat_template_gives_the_tokens_of_training(tokenizer, shipped, task):
    sample = make_sample(task, 256, seed=0, index=0)
    (prompt, _), (answer, _) = answered(sample)
    assert encode_sample(shipped, sample).tokens == tokenizer.encode(prompt).ids
    assert len(tokenizer.encode(prompt).ids) == count_words(sample.prompt) + 4
    assert len(tokenizer.encode(answer).ids) == len(sample.answers) + 1
    whole = [*sample.messages, {"role": "assistant", "content": " ".join(sample.answers)}]
    assert shipped.apply_chat_template(whole, tokenize=False) == prompt + answer


def test_nothing_is_added_to_an_encoded_text(shipped):
    assert shipped.encode("otter") == shipped.encode("otter", add_special_tokens=False)
    assert (shipped.bos_token, shipped.eos_token, shipped.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")


def test_unknown_role_is_refused(shipped):
    with pytest.raises(Exception, match="role must be system, user or assistant"):
        shipped.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
