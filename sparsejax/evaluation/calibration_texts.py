"""What a context-calibrated ratio is measured on: retrieval tasks, or the user's own texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation.ruler import build_samples, require_chat_template
from sparsejax.text_files import numbered_lines, read_text
from sparsejax.validation import unicode_text

_LEAST_CONTEXT = 2


@dataclass(frozen=True)
class CalibrationText:
    """A context and what the model should say after it.

    Attributes:
      tokens: context, question if there is one, and answer.
      context_tokens: how many come before the question: what is compressed.
      answer_tokens: how many of the last ones are the answer, whose likelihood is measured.
    """

    tokens: list[int]
    context_tokens: int
    answer_tokens: int

    @property
    def context(self) -> list[int]:
        return self.tokens[: self.context_tokens]


def question_text(tokenizer: Any, context: str, question: str, answer: str) -> CalibrationText:
    """A question about a context with its right answer, as a conversation in the tokenizer's chat template."""
    require_chat_template(tokenizer)

    def chat(question: str, answer: str) -> list[int]:
        messages = [{"role": "user", "content": f"{context}\n{question}"}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer.encode(text[: text.rindex(answer) + len(answer)], add_special_tokens=False)

    tokens = chat(question, answer)
    # Whatever the template puts around the turns, other questions share the context, and other answers the question.
    # Compared with two others each, for one may begin like the text itself.
    context_tokens = min(_shared(tokens, chat(other, answer)) for other in ("?", "Now"))
    before_answer = min(_shared(tokens, chat(question, other)) for other in ("!", "Yes"))
    return CalibrationText(tokens, context_tokens, len(tokens) - before_answer)


def task_texts(
    tokenizer: Any,
    *,
    tasks: Sequence[str] | None = None,
    lengths: Sequence[int] = (1024, 4096),
    samples: int = 8,
    seed: int = 0,
) -> list[CalibrationText]:
    """The samples of `sparsejax.evaluation.evaluate` with their right answers; arguments as there."""
    items = build_samples(tokenizer, tasks=tasks, lengths=lengths, samples=samples, seed=seed)
    return [question_text(tokenizer, item.context, item.question, " ".join(item.answers)) for item in items]


def file_texts(
    tokenizer: Any,
    path: str | Path,
    *,
    lengths: Sequence[int] = (1024, 4096),
    samples: int = 8,
    answer_tokens: int = 64,
) -> list[CalibrationText]:
    """Texts of a file.

    A .jsonl file has one JSON object a line: {"context": ..., "question": ..., "answer": ...}, asked through the chat
    template, or {"text": ...}, whose last `answer_tokens` tokens are predicted from those before. Any other file is
    one text, of which pieces of `lengths` tokens are taken in turn and treated as {"text": ...}.

    Args:
      lengths, samples: of the pieces, at most `samples` of each length; not for .jsonl, which is taken as it is.
      answer_tokens: at least 1.

    Raises:
      InvalidArgumentError: no such file, a line that is none of this, or a text that is too short.
    """
    path = Path(path)
    if answer_tokens < 1:
        raise InvalidArgumentError(f"answer_tokens must be at least 1, got {answer_tokens}.")
    text = read_text(path)
    if path.suffix == ".jsonl":
        found = [
            _record(tokenizer, line, answer_tokens, f"{path}, line {number}") for number, line in numbered_lines(text)
        ]
    else:
        tokens = tokenizer.encode(text, add_special_tokens=False)
        found = [
            _continuation(piece, answer_tokens, f"{path}, cut to {len(piece)} tokens,")
            for piece in _pieces(tokens, lengths, samples)
        ]
    if not found:
        raise InvalidArgumentError(f"{path} holds no text of {min(lengths)} tokens or more.")
    return found


def _record(tokenizer: Any, line: str, answer_tokens: int, name: str) -> CalibrationText:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError(f"{name} is not JSON: {error}.") from None
    keys = set(record) if isinstance(record, Mapping) and all(isinstance(v, str) for v in record.values()) else set()
    for key in keys:
        unicode_text(name, record[key])
    if keys >= {"context", "question", "answer"} and record["answer"].strip():
        return question_text(tokenizer, record["context"], record["question"], record["answer"].strip())
    if "text" in keys:
        return _continuation(tokenizer.encode(record["text"], add_special_tokens=False), answer_tokens, name)
    raise InvalidArgumentError(
        f'{name} must be an object of strings with either "text", or "context", "question" and "answer".'
    )


def _continuation(tokens: list[int], answer_tokens: int, name: str) -> CalibrationText:
    least = answer_tokens + _LEAST_CONTEXT
    if len(tokens) < least:
        raise InvalidArgumentError(
            f"{name} must have at least {least} tokens, {answer_tokens} of them the answer; it has {len(tokens)}."
        )
    return CalibrationText(tokens, len(tokens) - answer_tokens, answer_tokens)


def _pieces(tokens: list[int], lengths: Sequence[int], samples: int) -> Iterable[list[int]]:
    """Pieces one behind the other, of each length in turn, as far as the text goes."""
    start = 0
    for length in (length for _ in range(samples) for length in lengths):
        if start + length <= len(tokens):
            yield tokens[start : start + length]
            start += length


def _shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Length of the common beginning."""
    count = 0
    for ours, theirs in zip(tokens, others, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
