"""What users pass, in every form, brought into one."""

from __future__ import annotations

import numpy as np
import pytest

from sparsejax import SamplingParams
from sparsejax.engine.requests.inputs import (
    as_conversations,
    as_prompts,
    is_conversation,
    one_each,
    render_chat,
    tokenize,
)
from sparsejax.errors import EmptyPromptError, InvalidArgumentError


class Tokenizer:
    """Token i is letter i; its template joins the contents."""

    chat_template = None

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [0] * add_special_tokens + [ord(letter) - 96 for letter in text]}

    def apply_chat_template(self, messages, *, tokenize, chat_template):
        assert not tokenize
        return chat_template + "".join(message["content"] for message in messages)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("ab", ["ab"]),
        (["ab", "c"], ["ab", "c"]),
        (("ab", [1, 2]), ["ab", [1, 2]]),
        ([1, 2], [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (np.array([4, 5], np.int32), [[4, 5]]),
        (np.array([[4], [5]]), [[4], [5]]),
        ([np.array([4, 5]), [6]], [[4, 5], [6]]),
        ([np.int64(4)], [[4]]),
        ((text for text in ("a", "b")), ["a", "b"]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_forms_of_prompts(given, prompts):
    assert as_prompts(given) == prompts


@pytest.mark.parametrize("given", [None, 5, 2.5, b"bytes", {"prompt": "x"}, [True], [[1, 2.5]], ["a", None], [1, "a"]])
def test_what_is_no_prompt(given):
    with pytest.raises(InvalidArgumentError, match="text or token ids"):
        as_prompts(given)


def test_tokenize():
    prompt = tokenize("ab", Tokenizer(), 10, index=0)
    assert (prompt.text, prompt.token_ids) == ("ab", [0, 1, 2])
    assert tokenize("ab", Tokenizer(), 10, index=0, special_tokens=False).token_ids == [1, 2]
    ids = tokenize([np.int32(3), 4], None, 10, index=0)
    assert (ids.text, ids.token_ids) == (None, [3, 4])
    assert all(type(token) is int for token in ids.token_ids)


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "error", "words"),
    [
        ("ab", None, InvalidArgumentError, "prompt 7 is text, but there is no tokenizer"),
        ([], None, EmptyPromptError, "prompt 7 is empty"),
        ([1, 10], None, InvalidArgumentError, "prompt 7 has token id 10; this model's ids are 0 to 9"),
        ([-1], None, InvalidArgumentError, "token id -1"),
        ("a\udcff", Tokenizer(), InvalidArgumentError, "prompt 7 is no valid Unicode"),
        ("z", Tokenizer(), InvalidArgumentError, "token id 26"),
    ],
)
def test_tokenize_refuses(prompt, tokenizer, error, words):
    with pytest.raises(error, match=words):
        tokenize(prompt, tokenizer, 10, index=7)


def test_one_each():
    default, other = SamplingParams(), SamplingParams(max_tokens=3)
    assert one_each("p", None, SamplingParams, default, 2) == [default, default]
    assert one_each("p", other, SamplingParams, default, 2) == [other, other]
    assert one_each("p", (default, other), SamplingParams, default, 2) == [default, other]
    with pytest.raises(InvalidArgumentError, match="p has 1 items for 2 prompts"):
        one_each("p", [other], SamplingParams, default, 2)
    with pytest.raises(InvalidArgumentError, match="p must be SamplingParams"):
        one_each("p", {"n": 1}, SamplingParams, default, 2)
    with pytest.raises(InvalidArgumentError, match="got an item None"):
        one_each("p", [other, None], SamplingParams, default, 2)


def test_conversations():
    message = {"role": "user", "content": "b"}
    assert is_conversation([message])
    assert not any(is_conversation(other) for other in ([], [[message]], "text", [1], None))
    assert as_conversations([message]) == as_conversations([[message]]) == [[message]]
    assert as_conversations([]) == []
    for wrong in ("hello", message, 5, [1], None, ["hello"]):
        with pytest.raises(InvalidArgumentError, match="messages must be a list"):
            as_conversations(wrong)
    assert render_chat([message, message], Tokenizer(), index=0, chat_template="a") == "abb"
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        render_chat([message], Tokenizer(), index=0)
    with pytest.raises(InvalidArgumentError, match="conversation 3 is empty"):
        render_chat([], Tokenizer(), index=3, chat_template="a")
    with pytest.raises(InvalidArgumentError, match="conversation 3: each message"):
        render_chat([{"role": "user"}], Tokenizer(), index=3, chat_template="a")
    with pytest.raises(InvalidArgumentError, match="needs a tokenizer"):
        render_chat([message], None, index=0)


def test_parts_of_a_message_become_lines():
    class Tokenizer:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages, *, tokenize):
            assert not tokenize
            return "|".join(message["content"] for message in messages)

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": "three"}]
    assert render_chat(messages, Tokenizer(), index=0) == "one\ntwo|three"
    assert messages[0]["content"] is parts
    for wrong in ({"type": "image_url", "image_url": "x"}, {"type": "text"}, "one"):
        with pytest.raises(InvalidArgumentError, match=r'conversation 3: parts of a message must be {"type": "text"'):
            render_chat([{"role": "user", "content": [wrong]}], Tokenizer(), index=3)
