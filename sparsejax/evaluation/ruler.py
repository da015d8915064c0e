"""Runs the retrieval tasks through any generator and scores them.

Nothing here knows the engine: the caller hands in a function from prompts to generated tokens.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation.scoring import Row, exact_match
from sparsejax.evaluation.tasks import ANSWER_TOKENS, TASKS, Measure, Sample, make_sample

Generate = Callable[[list[list[int]]], Sequence[Sequence[int]]]
"""Prompts (token ids) to generated token ids, greedy, at most `ANSWER_TOKENS` each, stopping at the end token."""


@dataclass(frozen=True)
class EncodedPrompt:
    """A sample's prompt in tokens.

    Attributes:
        tokens: the whole prompt, chat template included, up to where the answer begins.
        context_tokens: how many of them come before the question: what a query-agnostic method may see.
    """

    tokens: list[int]
    context_tokens: int


def require_chat_template(tokenizer: Any) -> None:
    """Raises unless the tokenizer can render a conversation, as all tasks are asked in one.

    Raises:
      InvalidArgumentError: it has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InvalidArgumentError(
            "The tasks are asked in a chat, and this model's tokenizer has no chat template: use a chat model, or a "
            "tokenizer that has one (--tokenizer)."
        )


def _chat_ids(tokenizer: Any, content: str) -> list[int]:
    require_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    # The template already holds every special token; adding them again would double the first one.
    return tokenizer.encode(text, add_special_tokens=False)


def encode_sample(tokenizer: Any, sample: Sample) -> EncodedPrompt:
    """Encodes a sample's user turn with the tokenizer's chat template and finds where the question begins."""
    tokens = _chat_ids(tokenizer, sample.prompt)
    # Whatever the template puts around the turn, a prompt with another question shares exactly the context's tokens.
    other = _chat_ids(tokenizer, f"{sample.context}\n?")
    shared = 0
    for ours, theirs in zip(tokens, other, strict=False):
        if ours != theirs:
            break
        shared += 1
    return EncodedPrompt(tokens, shared)


def token_measure(tokenizer: Any) -> Measure:
    """Token count of a piece of text under a tokenizer, for `make_sample(measure=...)`."""
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def build_samples(
    tokenizer: Any, *, tasks: Sequence[str] | None = None, lengths: Sequence[int], samples: int, seed: int
) -> list[Sample]:
    """The samples of an evaluation, task by task and length by length, measured with the given tokenizer.

    Raises:
        InvalidArgumentError: an unknown task, a length too short for its task, or no samples asked for.
    """
    if samples < 1:
        raise InvalidArgumentError(f"samples must be at least 1; got {samples}")
    measure = token_measure(tokenizer)
    overhead = len(_chat_ids(tokenizer, "?")) - 1
    return [
        make_sample(task, length, seed=seed, index=index, measure=measure, overhead=overhead)
        for length in lengths
        for task in (TASKS if tasks is None else tasks)
        for index in range(samples)
    ]


def evaluate(
    generate: Generate,
    tokenizer: Any,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (1024, 4096),
    samples: int = 32,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = True,
    on_rows: Callable[[list[Row]], None] | None = None,
) -> list[Row]:
    """Scores a generator on the tasks by exact match.

    Args:
        generate: prompts to generated tokens; see `Generate`.
        tokenizer: a transformers tokenizer with a chat template.
        tasks: names in `TASKS`; None means all.
        lengths: tokens of prompt and answer together.
        samples: samples per task and length.
        seed: the evaluation's seed.
        batch_size: prompts handed to `generate` at a time.
        progress: show a progress bar.
        on_rows: called with the rows at the end, or with those of which all samples have been answered if the
            evaluation is interrupted or fails.

    Returns:
        One row per length and task, in that order.
    """
    items = build_samples(tokenizer, tasks=tasks, lengths=lengths, samples=samples, seed=seed)
    hits: dict[tuple[int, str], list[bool]] = {}
    rows: list[Row] = []
    try:
        with tqdm(total=len(items), desc="evaluating", unit="sample", disable=not progress) as bar:
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                generated = generate([encode_sample(tokenizer, sample).tokens for sample in batch])
                for sample, tokens in zip(batch, generated, strict=True):
                    text = tokenizer.decode(list(tokens)[:ANSWER_TOKENS], skip_special_tokens=True)
                    hit = exact_match(text, sample.answers, ordered=sample.ordered)
                    hits.setdefault((sample.length, sample.task), []).append(hit)
                bar.update(len(batch))
    finally:
        expected = Counter((sample.length, sample.task) for sample in items)
        rows += [
            Row(task, length, len(found), sum(found) / len(found))
            for (length, task), found in hits.items()
            if len(found) == expected[length, task]
        ]
        if on_rows is not None:
            on_rows(rows)
    return rows
