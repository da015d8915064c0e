"""Training conversations of the embedded model: long contexts with many questions, as token arrays.

The contexts come from the generator of the evaluation tasks, under a name space of seeds that no evaluation draws from.
One conversation asks many questions about its context, turn by turn: dense supervision for the price of one context.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from sparsejax.evaluation.tasks import (
    TASKS,
    Deck,
    Material,
    Measure,
    Question,
    Sample,
    common_word,
    compose,
    count_words,
    filler_sentence,
    multi_query,
    multi_value,
    needles,
    variable_tracking,
)
from sparsejax.evaluation.words import KEYS, VALUES
from train.tokenizer import ASSISTANT, BEGIN, END, PAD_ID, SYSTEM, SYSTEM_PROMPT, USER

PADDING, CONTEXT, ANSWER = 0, 1, 2
"""What the target at a place is: nothing to learn, running text, or a token of an answer (its end token included)."""

MAX_QUESTIONS = 32
_KNOWN = frozenset((*KEYS, *VALUES))
_PIECE = re.compile(r" ?\w+| ?[^\w\s]|\n")
_OPEN_SHARE = 0.15  # of conversations that are about made-up words too
_QUESTION_SHARE = 0.45  # of a conversation's tokens; the rest is context
_TURN_TOKENS = 5  # of one question and its answer: four of the template, and the space before a later question


@dataclass(frozen=True)
class Batch:
    """One batch of sequences.

    Attributes:
        tokens: i32[B, T], right-padded.
        kinds: u8[B, T]; entry t says what the *next* token, `tokens[:, t + 1]`, is: PADDING, CONTEXT or ANSWER.
    """

    tokens: np.ndarray
    kinds: np.ndarray


def _random_component(deck: Deck, length: int) -> Material:
    """A part of a training context, of any kind, easier or harder than its evaluation task."""
    rng = deck.rng
    makers: list[Callable[[], Material]] = [
        lambda: needles(deck, keys=rng.randint(1, 16)),
        lambda: multi_query(deck, keys=rng.randint(5, 10), asked=rng.randint(2, 5)),
        lambda: multi_value(deck, keys=rng.randint(1, 3), values=rng.randint(2, 5)),
        lambda: variable_tracking(deck, chains=rng.randint(1, 3), hops=rng.randint(1, 5)),
        lambda: common_word(
            deck,
            speakers=1,
            candidates=rng.randint(3, 5),
            mentions=rng.randint(6, max(6, min(32, length // 32))),
        ),
    ]
    return rng.choice(makers)()


def _tokens_of(material: Material, measure: Measure) -> int:
    return sum(measure(f" {sentence}") for thread in material.threads for sentence in thread)


def _material(deck: Deck, length: int, measure: Measure) -> Material:
    """The content of a training context: half of the time one evaluation task's, else a mixture."""
    rng = deck.rng
    if rng.random() < 0.5:
        return TASKS[rng.choice(list(TASKS))](deck, length)
    parts = [_random_component(deck, length)]
    room = _QUESTION_SHARE * length - _tokens_of(parts[0], measure)
    for _ in range(rng.randint(0, 10)):
        part = _random_component(deck, length)
        cost = _tokens_of(part, measure)
        if cost > room:
            break
        room -= cost
        parts.append(part)
    return Material(
        tuple(thread for part in parts for thread in part.threads),
        tuple(question for part in parts for question in part.questions),
    )


def made_up_word(rng: random.Random) -> str:
    """A word of two or three random syllables, or a number: several tokens for the embedded model."""
    if rng.random() < 0.2:
        return str(rng.randint(100, 9999))
    syllables = (rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    return "".join(syllables) + rng.choice(["", "", "n", "r", "s", "x", "th"])


def open_deck(rng: random.Random) -> Deck:
    """A deck in which about half of the keys and values are made-up words: training to copy any word."""
    deck = Deck(rng)
    invented = list(dict.fromkeys(made_up_word(rng) for _ in range(len(deck.keys) + len(deck.values))))
    for pool in (deck.keys, deck.values):
        for place in range(len(pool)):
            if invented and rng.random() < 0.5:
                pool[place] = invented.pop()
    return deck


def open_filler(rng: random.Random) -> str:
    """A sentence of filler; now and then one of made-up words."""
    if rng.random() < 0.8:
        return filler_sentence(rng)
    return " ".join(made_up_word(rng) for _ in range(rng.randint(3, 8))).capitalize() + "."


def conversation(rng: random.Random, length: int, measure: Measure | None = None) -> list[tuple[str, bool]]:
    """A conversation of at most `length` tokens as (text, is it an answer) segments, special tokens spelled out.

    Args:
        measure: the tokenizer's count of a text's tokens; given, the conversation is about made-up words too.
    """
    deck, filler = (Deck(rng), filler_sentence) if measure is None else (open_deck(rng), open_filler)
    measure = measure or count_words
    material = _material(deck, length, measure)

    def cost(question: Question) -> int:
        return measure(question.text) + measure(f" {question.answer}") + _TURN_TOKENS

    questions: list[Question] = []
    room = _QUESTION_SHARE * length
    for question in rng.sample(material.questions, len(material.questions))[:MAX_QUESTIONS]:
        room -= cost(question)
        if room < 0 and questions:
            break
        questions.append(question)

    system = f"{SYSTEM} {SYSTEM_PROMPT}{END}" if rng.random() < 0.1 else ""
    used = 4 + (measure(f" {SYSTEM_PROMPT}") + 2 if system else 0) + sum(map(cost, questions))
    # Too much material for a short conversation is cut at the end, by `to_batch`.
    budget = max(length - used, _tokens_of(material, measure))
    context = compose(rng, material.threads, budget, measure, filler)
    if filler is open_filler and rng.random() < 0.5:
        context = re.sub(r"(?<=\.) ", lambda _: rng.choice(" \n   "), context)  # a line break now and then
    first, *others = questions
    segments = [
        (f"{BEGIN}{system}{USER} {context}\n{first.text}{END}{ASSISTANT}", False),
        (f" {first.answer}{END}", True),
    ]
    for question in others:
        segments.append((f"{USER} {question.text}{END}{ASSISTANT}", False))
        segments.append((f" {question.answer}{END}", True))
    return segments


def answered(sample: Sample) -> list[tuple[str, bool]]:
    """An evaluation sample with its right answer, as segments like `conversation`'s."""
    return [(f"{BEGIN}{USER} {sample.prompt}{END}{ASSISTANT}", False), (f" {' '.join(sample.answers)}{END}", True)]


def open_sample(tokenizer: Tokenizer, length: int, *, seed: int, index: int) -> Sample:
    """A held-out sample of four needles about made-up words; training draws from other seeds."""
    rng = random.Random(f"evaluation/open/{length}/{seed}/{index}")
    deck = open_deck(rng)
    deck.keys, deck.values = ([word for word in pool if word not in _KNOWN] for pool in (deck.keys, deck.values))
    material = needles(deck, keys=4)
    question = material.questions[0]
    measure = token_count(tokenizer)
    context = compose(rng, material.threads, length - 40, measure, open_filler)
    return Sample("open_words", length, context, question.text, question.answers)


def token_count(tokenizer: Tokenizer) -> Measure:
    """A fast count of a text's tokens, word by word, that remembers the words it has met."""

    @lru_cache(maxsize=65536)
    def count(piece: str) -> int:
        return len(tokenizer.encode(piece).ids)

    return lambda text: sum(map(count, _PIECE.findall(text)))


def to_batch(tokenizer: Tokenizer, conversations: list[list[tuple[str, bool]]], length: int) -> Batch:
    """Encodes conversations into rows of `length` tokens; longer ones are cut."""
    encoded = iter(tokenizer.encode_batch_fast([text for segments in conversations for text, _ in segments]))
    tokens = np.full((len(conversations), length), PAD_ID, np.int32)
    kinds = np.full((len(conversations), length), PADDING, np.uint8)
    for row, segments in enumerate(conversations):
        ids, kind = [], []
        for _, is_answer in segments:
            piece = next(encoded).ids
            ids += piece
            kind += [ANSWER if is_answer else CONTEXT] * len(piece)
        ids, kind = ids[:length], kind[:length]
        tokens[row, : len(ids)] = ids
        kinds[row, : len(ids) - 1] = kind[1:]
    return Batch(tokens, kinds)


def training_batch(tokenizer: Tokenizer, measure: Measure, *, seed: int, index: int, rows: int, length: int) -> Batch:
    """Batch number `index` of a run: conversations of 0.6 to 1 times `length` tokens.

    The same arguments always give the same batch. `measure` is `token_count(tokenizer)`, kept over many batches.
    """
    conversations = []
    for row in range(rows):
        rng = random.Random(f"train/{seed}/{index}/{row}")
        wanted = int(length * rng.uniform(0.6, 1.0))
        conversations.append(conversation(rng, wanted, measure if rng.random() < _OPEN_SHARE else None))
    return to_batch(tokenizer, conversations, length)


_worker: tuple[Tokenizer, Measure] | None = None


def start_worker(tokenizer_json: str) -> None:
    """Initialises a worker process of the batch generator."""
    global _worker
    tokenizer = Tokenizer.from_str(tokenizer_json)
    _worker = tokenizer, token_count(tokenizer)


def worker_batch(seed: int, index: int, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`training_batch` in a worker process started with `start_worker`; arrays in small types, cheap to send."""
    assert _worker is not None, "start_worker has not run in this process"
    batch = training_batch(*_worker, seed=seed, index=index, rows=rows, length=length)
    return batch.tokens.astype(np.uint16), batch.kinds
