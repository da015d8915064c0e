"""The task generators: deterministic, of the right length, answerable from the context and from nothing else."""

import random
import re
from collections import Counter

import pytest

from sparsejax.evaluation import words
from sparsejax.evaluation.tasks import (
    ANSWER_TOKENS,
    TASKS,
    Deck,
    compose,
    count_words,
    filler_sentence,
    make_sample,
    make_samples,
)

NEEDLE = re.compile(r"The secret word of (\w+) is (\w+)\.")
ASSIGNMENT = re.compile(r"Let (\w+) equal (\w+)\.")
LENGTHS = (256, 1000, 4096)


def test_pools_are_disjoint():
    counts = Counter(word for pool in words.POOLS.values() for word in pool)
    assert max(counts.values()) == 1


def test_filler_holds_no_key_and_no_value():
    rng = random.Random(0)
    used = {word for _ in range(2000) for word in re.findall(r"\w+", filler_sentence(rng))}
    assert not used & {*words.KEYS, *words.VALUES, *words.SPEAKERS}


@pytest.mark.parametrize("task", TASKS)
def test_same_arguments_give_the_same_sample_and_others_do_not(task):
    sample = make_sample(task, 512, seed=3, index=1)
    assert sample == make_sample(task, 512, seed=3, index=1)
    assert sample == make_samples(task, 512, 2, seed=3)[1]
    others = [make_sample(task, 512, seed=3, index=2), make_sample(task, 512, seed=4, index=1)]
    assert all(sample.context != other.context for other in others)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_fills_the_length_and_leaves_room_for_the_answer(task, length):
    for sample in make_samples(task, length, 3, seed=0):
        tokens = count_words(sample.prompt) + 4
        longest_sentence = 16
        assert length - ANSWER_TOKENS - longest_sentence < tokens <= length - ANSWER_TOKENS
        assert len(sample.answers) < ANSWER_TOKENS
        assert sample.prompt.endswith(f"\n{sample.question}")


@pytest.mark.parametrize("task", ["single", "multi_key", "multi_query"])
def test_needle_answers_are_the_values_of_the_asked_keys(task):
    for sample in make_samples(task, 512, 5, seed=0):
        values = dict(NEEDLE.findall(sample.context))
        asked = [key for key in re.findall(r"\w+", sample.question) if key in words.KEYS]
        assert tuple(values[key] for key in asked) == sample.answers
        assert sample.ordered


def test_multi_value_answer_lists_every_value_of_the_key():
    for sample in make_samples("multi_value", 512, 5, seed=0):
        (asked,) = (key for key in re.findall(r"\w+", sample.question) if key in words.KEYS)
        assert tuple(value for key, value in NEEDLE.findall(sample.context) if key == asked) == sample.answers
        assert not sample.ordered


def test_variable_tracking_answer_is_the_whole_chain():
    for sample in make_samples("variable_tracking", 512, 5, seed=0):
        assignments = ASSIGNMENT.findall(sample.context)
        (value,) = (word for word in re.findall(r"\w+", sample.question) if word in words.VALUES)
        holders = [value]
        for name, source in assignments:  # assignments stand in the order of the chain
            if source in holders:
                holders.append(name)
        assert tuple(holders[1:]) == sample.answers
        assert len(assignments) == 2 * len(sample.answers)


def test_common_word_wins_clearly():
    for sample in make_samples("common_word", 1024, 5, seed=0):
        said = Counter(re.findall(r"The \w+ said (\w+)\.", sample.context)).most_common()
        assert (said[0][0],) == sample.answers
        assert said[0][1] >= 2 * said[1][1]


def test_needles_lie_at_all_depths():
    depths = []
    for sample in make_samples("single", 512, 60, seed=0):
        match = NEEDLE.search(sample.context)
        assert match
        depths.append(match.start() / len(sample.context))
    assert min(depths) < 0.1
    assert max(depths) > 0.9
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_order_within_a_thread_is_kept():
    threads = [tuple(f"{name} {place}." for place in range(5)) for name in "abc"]
    text = compose(random.Random(0), threads, 200)
    for name, thread in zip("abc", threads, strict=True):
        assert tuple(re.findall(rf"{name} \d\.", text)) == thread


def test_length_is_measured_with_the_given_measure():
    sample = make_sample("single", 600, seed=0, index=0, measure=lambda text: 3 * count_words(text))
    assert 3 * count_words(sample.prompt) <= 600


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"task must be one of single, .*'needle'"):
        make_sample("needle", 512, seed=0, index=0)
    with pytest.raises(ValueError, match="length is too short"):
        make_sample("multi_value", 64, seed=0, index=0)
    deck = Deck(random.Random(0))
    with pytest.raises(ValueError, match="distinct words"):
        deck.deal(deck.keys, 1000)
