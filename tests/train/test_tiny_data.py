"""Training conversations: reproducible, within their length, with answers that their context gives."""

import random
import re

import numpy as np
import pytest

from sparsejax.evaluation.words import KEYS, VALUES
from train.data import (
    ANSWER,
    CONTEXT,
    PADDING,
    conversation,
    open_deck,
    open_sample,
    start_worker,
    to_batch,
    token_count,
    training_batch,
    worker_batch,
)
from train.tokenizer import ASSISTANT, BEGIN, END, END_ID, PAD_ID, USER, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


def test_same_arguments_give_the_same_batch_in_any_process(tokenizer):
    measure = token_count(tokenizer)
    batch = training_batch(tokenizer, measure, seed=0, index=3, rows=4, length=256)
    start_worker(tokenizer.to_str())
    tokens, kinds = worker_batch(0, 3, 4, 256)
    np.testing.assert_array_equal(batch.tokens, tokens)
    np.testing.assert_array_equal(batch.kinds, kinds)
    other = training_batch(tokenizer, measure, seed=0, index=4, rows=4, length=256)
    assert (other.tokens != batch.tokens).any()


def test_kinds_mark_exactly_the_answers_and_their_end_tokens(tokenizer):
    conversations = [conversation(random.Random(i), 400) for i in range(8)]
    batch = to_batch(tokenizer, conversations, 512)
    for row, segments in enumerate(conversations):
        marked = batch.tokens[row, 1:][batch.kinds[row, :-1] == ANSWER]
        answers = [text for text, is_answer in segments if is_answer]
        assert tokenizer.decode(marked.tolist(), skip_special_tokens=False) == "".join(answers)
        assert (marked == END_ID).sum() == len(answers)
    targets_are_padding = np.roll(batch.tokens, -1, axis=1)[:, :-1] == PAD_ID
    np.testing.assert_array_equal(targets_are_padding, batch.kinds[:, :-1] == PADDING)
    assert (batch.kinds[:, -1] == PADDING).all()
    assert (batch.kinds == CONTEXT).any()


@pytest.mark.parametrize("length", [256, 2048])
def test_conversations_fit_their_length(tokenizer, length):
    for seed in range(10):
        text = "".join(part for part, _ in conversation(random.Random(seed), length))
        assert len(tokenizer.encode(text).ids) <= length
        assert text.startswith((f"{BEGIN}{USER}", f"{BEGIN}<|system|>"))
        assert text.endswith(END)


def test_every_answer_can_be_read_in_the_context(tokenizer):
    for seed in range(20):
        measure = token_count(tokenizer) if seed % 2 else None
        segments = conversation(random.Random(seed), 512, measure)
        context = set(re.findall(r"\w+", segments[0][0].split("Question")[0]))
        for text, is_answer in segments:
            if is_answer:
                assert set(re.findall(r"\w+", text.removesuffix(END))) <= context
            else:
                assert text.endswith(f"{END}{ASSISTANT}")


def test_open_decks_mix_made_up_words_in(tokenizer):
    deck = open_deck(random.Random(0))
    known = {*KEYS, *VALUES}
    made_up = [word for word in (*deck.keys, *deck.values) if word not in known]
    assert 0.3 < len(made_up) / (len(deck.keys) + len(deck.values)) < 0.7
    assert len(set(made_up)) == len(made_up)
    sample = open_sample(tokenizer, 512, seed=0, index=0)
    assert not known & set(re.findall(r"\w+", sample.context))
    assert sample.answers[0] in sample.context


def test_fast_token_count_is_the_tokenizers(tokenizer):
    measure = token_count(tokenizer)
    for seed in range(5):
        text = " " + open_sample(tokenizer, 300, seed=seed, index=0).prompt
        assert measure(text) == len(tokenizer.encode(text).ids)
