"""Packs texts into rows of equal length: tokenize, put documents end to end, cut.

A packed folder holds

    tokens.bin   little-endian u16 or u32 [rows, length], the vocabulary decides
    starts.bin   little-endian i64, place of every document's first token in the stream of all rows
    packed.json  sizes, and what the rows were made of; written last, so a folder that has it is complete
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sparsejax.checkpoint.convert import new_folder
from sparsejax.checkpoint.source import read_json
from sparsejax.errors import InvalidArgumentError
from sparsejax.text_files import read_text
from sparsejax.validation import unicode_text

MANIFEST = "packed.json"
_VERSION = 1
_BATCH = 256  # documents handed to the tokenizer at once


@dataclass(frozen=True)
class Packed:
    """A packed folder, its arrays mapped and not read.

    Attributes:
      tokens: [rows, length], unsigned.
      starts: i64[documents], ascending.
      vocab_size: of the tokenizer.
    """

    tokens: np.ndarray
    starts: np.ndarray
    vocab_size: int

    def documents(self, row: int, length: int) -> np.ndarray:
        """i32[length]: number of the document that each of the first tokens of a row belongs to, from 0."""
        first = row * self.tokens.shape[1]
        places = first + np.arange(length)
        numbers = np.searchsorted(self.starts, places, side="right")
        return (numbers - numbers[0]).astype(np.int32)


def pack(
    sources: Iterable[Path],
    out: Path,
    tokenizer: Any,
    *,
    length: int,
    text_key: str = "text",
    wrap: bool = True,
    limit: int | None = None,
    progress: bool = True,
) -> Packed:
    """Writes a packed folder.

    Args:
      sources: .jsonl files (an object a line; its `text_key`, or else "messages" through the chat template, is a
        document) and text files (each is one document).
      out: folder to make; it may exist if it is empty. It appears only when it is complete.
      tokenizer: a transformers tokenizer.
      length: tokens of a row. Tokens after the last whole row are left out.
      wrap: put the tokenizer's begin and end tokens around each document, as far as it has them. Off for texts that
        spell them out; chat templates bring their own either way.
      limit: most rows.

    Raises:
      InvalidArgumentError: a file or line that is no document, or fewer tokens than one row.
      OutputExistsError: out holds something.
    """
    if length < 2:
        raise InvalidArgumentError(f"length must be at least 2, got {length}.")
    if limit is not None and limit < 1:
        raise InvalidArgumentError(f"limit must be at least 1, got {limit}.")
    sources = list(sources)
    for path in sources:  # all of them before the first is read
        if not path.is_file():
            raise InvalidArgumentError(f"{path} is no file; give .jsonl or text files.")
    vocab_size = len(tokenizer)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    starts: list[int] = []
    count = rows = 0
    left = np.zeros(0, dtype)
    with new_folder(out) as folder, (folder / "tokens.bin").open("wb") as file:
        with tqdm(unit="tok", unit_scale=True, desc="packing", disable=not progress) as bar:
            for ids in _encoded(_documents(sources, text_key), tokenizer, wrap):
                if not ids:
                    continue
                starts.append(count)
                count += len(ids)
                bar.update(len(ids))
                left = np.concatenate([left, np.asarray(ids, dtype)])
                whole = min(left.size // length, limit - rows if limit is not None else left.size)
                file.write(left[: whole * length].tobytes())
                left = left[whole * length :]
                rows += whole
                if rows == limit:
                    break
        if rows == 0:
            raise InvalidArgumentError(f"The sources hold {count} tokens, fewer than one row of {length}.")
        starts = [start for start in starts if start < rows * length]
        np.asarray(starts, "<i8").tofile(folder / "starts.bin")
        manifest = {
            "version": _VERSION,
            "rows": rows,
            "length": length,
            "dtype": dtype.str,
            "vocab_size": vocab_size,
            "documents": len(starts),
            "wrapped": wrap,
            "sources": [str(path) for path in sources],
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return open_packed(out)


def open_packed(folder: Path) -> Packed:
    """Maps the arrays of a packed folder.

    Raises:
      InvalidArgumentError: another version, or a file that is too short.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("version") != _VERSION:
        raise InvalidArgumentError(
            f"{folder} has packed version {manifest.get('version')!r}; this release reads {_VERSION}."
        )
    try:
        shape, dtype = (int(manifest["rows"]), int(manifest["length"])), np.dtype(manifest["dtype"])
        vocab_size = int(manifest["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{folder / MANIFEST} is no manifest of a packed folder: {error!r}") from None
    try:
        tokens = np.memmap(folder / "tokens.bin", dtype, "r", shape=shape)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{folder / 'tokens.bin'} does not hold {shape[0]} rows of {shape[1]}: {error}"
        ) from None
    return Packed(tokens, np.fromfile(folder / "starts.bin", "<i8"), vocab_size)


class Document(NamedTuple):
    """A text, or messages for a chat template, and the file and line it is from."""

    content: str | list[dict[str, str]]
    where: str


def _documents(sources: Iterable[Path], text_key: str) -> Iterator[Document]:
    for path in sources:
        if path.suffix.lower() != ".jsonl":
            yield Document(read_text(path), str(path))
            continue
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}:{number}"
                    yield Document(_content(line, text_key, where), where)


def _content(line: bytes, text_key: str, where: str) -> str | list[dict[str, str]]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{where} must be UTF-8 text: {error.reason}.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{where} is no JSON that can be read: {error}") from None
    if isinstance(record, dict):
        if isinstance(record.get(text_key), str):
            return record[text_key]
        messages = record.get("messages")
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return messages
    raise InvalidArgumentError(
        f"{where} must be an object with a text under {text_key!r}, or a list under 'messages' of objects with "
        "a content (or tool_calls)."
    )


def _is_message(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    return message.get("content") is not None or bool(message.get("tool_calls"))


def _text(document: Document, tokenizer: Any) -> str:
    """What of a document is tokenized."""
    content, where = document
    if not isinstance(content, str):
        if not tokenizer.chat_template:
            raise InvalidArgumentError(f"{where} has messages, but the tokenizer has no chat template for them.")
        try:
            content = tokenizer.apply_chat_template(content, tokenize=False)
        except Exception as error:  # whatever the template raises, in a language of its own
            raise InvalidArgumentError(f"{where} has messages that the chat template refuses: {error}") from error
    return unicode_text(where, content)


def _encoded(documents: Iterator[Document], tokenizer: Any, wrap: bool) -> Iterator[list[int]]:
    """Token ids of every document, in order."""
    begin = [tokenizer.bos_token_id] if wrap and tokenizer.bos_token_id is not None else []
    end = [tokenizer.eos_token_id] if wrap and tokenizer.eos_token_id is not None else []
    while batch := list(islice(documents, _BATCH)):
        chats = [not isinstance(document.content, str) for document in batch]
        texts = [_text(document, tokenizer) for document in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for ids, chat in zip(encoded, chats, strict=True):
            if ids:  # an empty text is no document
                yield ids if chat else begin + ids + end
