"""Long-context retrieval tasks over word-level text, generated at any length from a seed.

The tasks follow the families of RULER (Hsieh et al. 2024, arXiv:2404.06654): needles (single, multi-key, multi-value,
multi-query), variable tracking and most-common-word. A context is filler prose with the sentences that matter strewn
over it at random depths; the question comes after the context. Keys, values and their pairing are drawn at random for
each sample, so no answer can be known without reading the context.

The generator works on text. It needs a tokenizer only to measure length: `measure(text) -> tokens`, by default
`count_words`, which is exact for the embedded model (one token a word or punctuation mark). The same (task, length,
seed, index) always gives the same sample.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation import words

Measure = Callable[[str], int]

ANSWER_TOKENS = 16
"""Tokens of a sample's length that stay free for the answer: a prompt has at most `length - ANSWER_TOKENS`."""

_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]|\n")


def count_words(text: str) -> int:
    """Number of words, punctuation marks and line breaks in `text`: its tokens under the embedded model's tokenizer."""
    return len(_WORD_OR_MARK.findall(text))


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        text: the question as the user asks it.
        answers: the words of the right answer, in the order in which the model is taught to give them.
        ordered: whether that order matters for scoring (it does when the question lists what it asks for).
    """

    text: str
    answers: tuple[str, ...]
    ordered: bool = True

    @property
    def answer(self) -> str:
        """The answer as text."""
        return " ".join(self.answers)


@dataclass(frozen=True)
class Material:
    """Sentences to strew over a context, and the questions that they answer.

    Attributes:
        threads: groups of sentences; the order within a group is kept, groups are mixed at random.
        questions: what can be asked. An evaluation sample asks the first; training asks several.
    """

    threads: tuple[tuple[str, ...], ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Sample:
    """One evaluation sample.

    Attributes:
        task: name of the task.
        length: the length asked for, in tokens, answer and chat template included.
        context: the long text.
        question: what is asked, after the context.
        answers: the words of the right answer.
        ordered: whether the order of the answer's words counts.
    """

    task: str
    length: int
    context: str
    question: str
    answers: tuple[str, ...]
    ordered: bool = True

    @property
    def prompt(self) -> str:
        """Context, line break, question: the content of the user's turn."""
        return f"{self.context}\n{self.question}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a chat of one user turn."""
        return [{"role": "user", "content": self.prompt}]


@dataclass
class Deck:
    """Deals keys, values and speakers at random and never one twice, so that the parts of a context cannot clash."""

    rng: random.Random
    keys: list[str] = field(init=False)
    values: list[str] = field(init=False)
    speakers: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.keys = self.rng.sample(words.KEYS, len(words.KEYS))
        self.values = self.rng.sample(words.VALUES, len(words.VALUES))
        self.speakers = self.rng.sample(words.SPEAKERS, len(words.SPEAKERS))

    def deal(self, pool: list[str], count: int) -> list[str]:
        """Removes and returns the next `count` words of one of this deck's pools."""
        if count > len(pool):
            raise InvalidArgumentError(f"a context needs {count} more distinct words, but only {len(pool)} are left")
        dealt = pool[-count:]
        del pool[-count:]
        return dealt


def _needle(key: str, value: str) -> str:
    return f"The secret word of {key} is {value}."


def _ask_needle(key: str, value: str) -> Question:
    return Question(f"Question: What is the secret word of {key}?", (value,))


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def needles(deck: Deck, *, keys: int) -> Material:
    """`keys` sentences that each give one key one value; a question for each key."""
    names, values = deck.deal(deck.keys, keys), deck.deal(deck.values, keys)
    pairs = list(zip(names, values, strict=True))
    return Material(tuple((_needle(*pair),) for pair in pairs), tuple(_ask_needle(*pair) for pair in pairs))


def multi_query(deck: Deck, *, keys: int, asked: int) -> Material:
    """`keys` needles; each question asks for the values of `asked` of them, in the question's order."""
    names, values = deck.deal(deck.keys, keys), deck.deal(deck.values, keys)
    pairs = list(zip(names, values, strict=True))
    questions = []
    for _ in range(max(1, keys // asked)):
        chosen = deck.rng.sample(pairs, asked)
        text = f"Question: What are the secret words of {_listed([key for key, _ in chosen])}?"
        questions.append(Question(text, tuple(value for _, value in chosen)))
    return Material(tuple((_needle(*pair),) for pair in pairs), tuple(questions))


def multi_value(deck: Deck, *, keys: int, values: int) -> Material:
    """`keys` keys with `values` values each, one sentence a value; a question for each key asks for all its values."""
    threads, questions = [], []
    for name in deck.deal(deck.keys, keys):
        held = deck.deal(deck.values, values)
        threads.append(tuple(_needle(name, value) for value in held))
        text = f"Question: What are the {values} secret words of {name}?"
        questions.append(Question(text, tuple(held), ordered=False))
    return Material(tuple(threads), tuple(questions))


def variable_tracking(deck: Deck, *, chains: int, hops: int) -> Material:
    """`chains` chains of assignments: a variable gets a value, then `hops` times a new variable gets the one before it.

    A question gives a chain's value and asks for all `hops + 1` variables that hold it.
    """
    threads, questions = [], []
    for value in deck.deal(deck.values, chains):
        names = deck.deal(deck.keys, hops + 1)
        sources = [value, *names[:-1]]
        threads.append(tuple(f"Let {name} equal {source}." for name, source in zip(names, sources, strict=True)))
        text = f"Question: Which {hops + 1} variables equal {value}?"
        questions.append(Question(text, tuple(names), ordered=False))
    return Material(tuple(threads), tuple(questions))


def common_word(deck: Deck, *, speakers: int, candidates: int, mentions: int) -> Material:
    """`speakers` speakers who each say `candidates` words, `mentions` times in all; asked is the most frequent one.

    The most frequent word has at least half of the mentions; the others share the rest about evenly.
    """
    threads: list[tuple[str, ...]] = []
    questions = []
    for speaker in deck.deal(deck.speakers, speakers):
        winner, *others = deck.deal(deck.values, candidates)
        said = [winner] * ((mentions + 1) // 2)
        said += [others[place % len(others)] for place in range(mentions - len(said))]
        threads.extend((f"The {speaker} said {word}.",) for word in said)
        questions.append(Question(f"Question: Which word did the {speaker} say most often?", (winner,)))
    return Material(tuple(threads), tuple(questions))


TASKS: dict[str, Callable[[Deck, int], Material]] = {
    "single": lambda deck, length: needles(deck, keys=1),
    "multi_key": lambda deck, length: needles(deck, keys=min(16, max(4, length // 32))),
    "multi_value": lambda deck, length: multi_value(deck, keys=2, values=4),
    "multi_query": lambda deck, length: multi_query(deck, keys=8, asked=4),
    "variable_tracking": lambda deck, length: variable_tracking(deck, chains=2, hops=4),
    "common_word": lambda deck, length: common_word(
        deck, speakers=1, candidates=4, mentions=min(32, max(6, length // 32))
    ),
}
"""The evaluation tasks by name: `(deck, length in tokens) -> Material`. Sizes follow RULER's where there is room."""


def filler_sentence(rng: random.Random) -> str:
    """One random sentence of prose that holds no key and no value."""
    form = rng.random()

    def pick(pool: tuple[str, ...]) -> str:
        return pool[int(rng.random() * len(pool))]

    subject = f"The {pick(words.ADJECTIVES)} {pick(words.NOUNS)}" if form < 0.6 else f"The {pick(words.NOUNS)}"
    if form < 0.35:
        return f"{subject} {pick(words.VERBS)} the {pick(words.NOUNS)}."
    if form < 0.6:
        return f"{subject} {pick(words.ADVERBS)} {pick(words.VERBS)} the {pick(words.NOUNS)}."
    place = f"{pick(words.PREPOSITIONS)} the {pick(words.NOUNS)}"
    if form < 0.85:
        return f"{subject} {pick(words.VERBS)} the {pick(words.ADJECTIVES)} {pick(words.NOUNS)} {place}."
    return f"{subject} was {pick(words.ADJECTIVES)} and {pick(words.ADJECTIVES)} {place}."


def compose(
    rng: random.Random,
    threads: Sequence[Sequence[str]],
    budget: int,
    measure: Measure = count_words,
    filler: Callable[[random.Random], str] = filler_sentence,
) -> str:
    """Strews the threads' sentences at random depths over filler prose of, in all, at most `budget` tokens.

    Args:
        threads: groups of sentences whose inner order is kept.
        budget: tokens that the text may have. Filler stops at the first sentence that would not fit.
        measure: token count of a piece of text.
        filler: makes one sentence of filler.

    Raises:
        InvalidArgumentError: the threads alone exceed `budget`.
    """
    used = sum(measure(f" {sentence}") for thread in threads for sentence in thread)
    if used > budget:
        raise InvalidArgumentError(
            f"length is too short, by {used - budget} tokens: beside the question and the template, the sentences that "
            f"matter need {used}."
        )
    prose: list[str] = []
    while True:
        sentence = filler(rng)
        used += measure(f" {sentence}")
        if used > budget:
            break
        prose.append(sentence)

    turns = [index for index, thread in enumerate(threads) for _ in thread]
    rng.shuffle(turns)
    depths = sorted(int(rng.random() * (len(prose) + 1)) for _ in turns)
    nexts = [iter(thread) for thread in threads]
    text: list[str] = []
    done = 0
    for depth, turn in zip(depths, turns, strict=True):
        text += prose[done:depth]
        text.append(next(nexts[turn]))
        done = depth
    text += prose[done:]
    return " ".join(text)


def make_sample(
    task: str,
    length: int,
    *,
    seed: int,
    index: int,
    measure: Measure = count_words,
    overhead: int = 4,
) -> Sample:
    """Generates one evaluation sample; the same arguments always give the same sample.

    Args:
        task: a name in `TASKS`.
        length: tokens of the prompt and the answer together; the prompt has at most `length - ANSWER_TOKENS`.
        seed: the evaluation's seed. Training draws from a different name space, so no seed was ever trained on.
        index: number of the sample under that seed.
        measure: token count of a piece of text.
        overhead: tokens that the chat template adds to the prompt (the embedded model: 4).

    Raises:
        InvalidArgumentError: unknown task, or a length too short for it.
    """
    if task not in TASKS:
        raise InvalidArgumentError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    rng = random.Random(f"evaluation/{task}/{length}/{seed}/{index}")
    material = TASKS[task](Deck(rng), length)
    question = material.questions[0]
    budget = length - ANSWER_TOKENS - overhead - measure("\n" + question.text)
    context = compose(rng, material.threads, budget, measure)
    return Sample(task, length, context, question.text, question.answers, question.ordered)


def make_samples(
    task: str, length: int, count: int, *, seed: int, measure: Measure = count_words, overhead: int = 4
) -> list[Sample]:
    """`count` samples of one task at one length; sample i is `make_sample(..., index=i)`."""
    return [make_sample(task, length, seed=seed, index=i, measure=measure, overhead=overhead) for i in range(count)]
