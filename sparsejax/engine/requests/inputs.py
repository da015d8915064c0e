"""What users may pass to `LLM.generate`, `.chat` and `.stream`, brought into one form and checked."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.errors import EmptyPromptError, InvalidArgumentError

Prompt = str | Sequence[int]
Params = TypeVar("Params")
PROMPT_FORMS = "text or token ids (str, list[str], list[int] or list[list[int]])"


@dataclass(frozen=True)
class TokenizedPrompt:
    """text: as the user gave it, None for token ids. token_ids: not empty."""

    text: str | None
    token_ids: list[int]


def as_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or several -> a list of prompts. Arrays of token ids count as lists."""
    if isinstance(prompts, str):
        return [prompts]
    items = _items(prompts)
    if items is None:
        raise InvalidArgumentError(f"prompts must be {PROMPT_FORMS}, got {prompts!r:.80}.")
    if items and all(_is_token(item) for item in items):
        return [items]
    several: list[Prompt] = []
    for i, prompt in enumerate(items):
        tokens = prompt if isinstance(prompt, str) else _items(prompt)
        if tokens is None or not (isinstance(tokens, str) or all(_is_token(item) for item in tokens)):
            raise InvalidArgumentError(f"prompts must be {PROMPT_FORMS}; prompt {i} is {prompt!r:.80}.")
        several.append(tokens)
    return several


def tokenize(
    prompt: Prompt,
    tokenizer: Any,
    vocab_size: int,
    *,
    index: int,
    special_tokens: bool = True,
) -> TokenizedPrompt:
    """A prompt's token ids.

    Args:
      tokenizer: a transformers tokenizer, or None (skip_tokenizer_init): then only token ids are allowed.
      index: the prompt's place in the call, for messages.
      special_tokens: let the tokenizer add its beginning-of-text token (a chat template has written its own).
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidArgumentError(
                f"prompt {index} is text, but there is no tokenizer (skip_tokenizer_init): pass token ids."
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, or bytes of a command line that are no UTF-8
            raise InvalidArgumentError(f"prompt {index} is no valid Unicode text: {error}.") from error
        token_ids = list(tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])
    else:
        token_ids = [int(token) for token in prompt]
    if not token_ids:
        raise EmptyPromptError(f"prompt {index} is empty: give it at least one token.")
    check_ids(token_ids, vocab_size, what=f"prompt {index} has token id")
    return TokenizedPrompt(text=prompt if isinstance(prompt, str) else None, token_ids=token_ids)


def check_stop_ids(params: SamplingParams, vocab_size: int, *, name: str) -> None:
    """Refuses stop tokens that would never stop anything. `name` is of the parameters, for the message."""
    check_ids(params.stop_ids, vocab_size, what=f"{name} has stop_token_ids with id")


def check_ids(token_ids: Sequence[int], vocab_size: int, *, what: str) -> None:
    """Raises InvalidArgumentError for an id that is none of the vocabulary's; its message begins with `what`."""
    outside = next((token for token in token_ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise InvalidArgumentError(f"{what} {outside}; this model's ids are 0 to {vocab_size - 1}.")


def one_each(
    name: str, value: Params | Sequence[Params] | None, kind: type[Params], default: Params, count: int
) -> list[Params]:
    """One parameter object for all prompts, or one per prompt -> one per prompt."""
    if value is None:
        return [default] * count
    if isinstance(value, kind):
        return [value] * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise InvalidArgumentError(f"{name} must be {kind.__name__} or a list of them, got {value!r:.80}.")
    if len(value) != count:
        raise InvalidArgumentError(f"{name} has {len(value)} items for {count} prompts: give one, or one per prompt.")
    for item in value:
        if not isinstance(item, kind):
            raise InvalidArgumentError(f"{name} must be {kind.__name__} or a list of them, got an item {item!r:.80}.")
    return list(value)


def is_conversation(messages: Any) -> bool:
    """Whether this is one conversation (a list of messages) rather than a list of conversations."""
    return isinstance(messages, Sequence) and bool(messages) and isinstance(messages[0], dict)


def as_conversations(messages: Any) -> list[Sequence[dict]]:
    """One conversation or several -> a list."""
    conversations = [messages] if is_conversation(messages) else _items(messages)
    if conversations is None or not all(
        isinstance(each, Sequence) and not isinstance(each, str) for each in conversations
    ):
        raise InvalidArgumentError(
            'messages must be a list of {"role": ..., "content": ...} dicts, or a list of such lists; '
            f"got {messages!r:.80}."
        )
    return conversations


def render_chat(messages: Sequence[dict], tokenizer: Any, *, index: int, **template: Any) -> str:
    """A conversation as prompt text, through the tokenizer's chat template.

    Args:
      messages: dicts with "role" and "content", a text or a list of {"type": "text", "text": ...}, whose texts become
        lines.
      template: handed to `apply_chat_template` (chat_template, add_generation_prompt, tools, ...).
    """
    if tokenizer is None:
        raise InvalidArgumentError("chat needs a tokenizer: build the LLM without skip_tokenizer_init.")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise InvalidArgumentError(
                f'conversation {index}: each message is a dict with "role" and "content", got {message!r:.80}.'
            )
    if not messages:
        raise InvalidArgumentError(f"conversation {index} is empty: give it at least one message.")
    if not (template.get("chat_template") or tokenizer.chat_template):
        raise InvalidArgumentError(
            "this model's tokenizer has no chat template: use generate, or pass chat_template=..."
        )
    messages = [{**message, "content": _text(message["content"], index)} for message in messages]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **template)
    except Exception as error:
        # Templates are programs: they refuse what their model was not trained on, such as a role, or trip over it.
        raise InvalidArgumentError(f"conversation {index}: the chat template refuses it: {error}") from error


def _text(content: Any, index: int) -> Any:
    """The content of a message, a list of parts as one text: templates of models that read only text expect that."""
    if not isinstance(content, list | tuple):
        return content
    for part in content:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise InvalidArgumentError(
                f'conversation {index}: parts of a message must be {{"type": "text", "text": ...}}, got {part!r:.80}.'
            )
    return "\n".join(part["text"] for part in content)


def _items(value: Any) -> list | None:
    """A list of what an iterable holds; None for what is no list of anything (a number, a dict, bytes)."""
    if hasattr(value, "tolist"):  # arrays of tokens, of any library
        value = value.tolist()
    return None if isinstance(value, Mapping | bytes) or not isinstance(value, Iterable) else list(value)


def _is_token(item: Any) -> bool:
    try:
        operator.index(item)
    except TypeError:
        return False
    return not isinstance(item, bool)
