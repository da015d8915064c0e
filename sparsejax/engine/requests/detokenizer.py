"""Token ids to text while they arrive: characters split over tokens, stop strings split over tokens.

A tokenizer decodes a *sequence*: single tokens may be parts of a character, and some tokenizers put or drop a space by
what stands before. So a short window of ids is decoded twice, without and with the new ids, and the difference is new
text; it waits while it ends in an unfinished character.

Decoders that fall back to bytes take a whole run of them for unreadable if one is, also those that were characters
already. What is out stays out: from there on the new ids are decoded for themselves. So that an answer's text does not
depend on when it is asked for, ids are decoded one by one where any is unreadable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

UNFINISHED = "\ufffd"  # what decoders write for bytes that are not (yet) a character
LONGEST = 4  # bytes of a character
CONTEXT = (6, 24, 96, 384)  # prompt tokens that set the scene for the first generated one; more if it takes more

Decode = Callable[[Sequence[int]], str]


def decode_function(tokenizer: Any, *, skip_special_tokens: bool) -> Decode:
    """ids -> text, of a transformers or a tokenizers tokenizer, with no clean-up of spaces.

    Clean-up looks at neighbours on both sides, so text decoded in pieces would not equal text decoded at once.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None and not hasattr(tokenizer, "clean_up_tokenization_spaces"):
        backend = tokenizer
    if backend is not None:
        return lambda ids: backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
    return lambda ids: tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


class Detokenizer:
    """The text of one answer. Fed with tokens, asked for text; text that is out is never taken back.

    Without stop strings nothing is decoded until text is asked for, so an answer nobody streams is decoded once.

    Args:
      decode: ids -> text, see `decode_function`.
      prompt_token_ids: the prompt; its last tokens decide whether the answer begins with a space.
      stop: strings that end the text.
      include_stop: keep the stop string in the text.
      min_tokens: a stop string must end behind the text of this many tokens.

    Attributes:
      stop_string: the stop string that ended the text, or None.
    """

    def __init__(
        self,
        decode: Decode,
        prompt_token_ids: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self.stop_string: str | None = None
        self._decode = decode
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        # The window: ids[:read] are decoded, ids[read:] are new. `out` is what of the window's text is out already (or
        # belongs to the prompt).
        self._ids, self._out = _context(decode, prompt_token_ids)
        self._read = len(self._ids)
        self._waiting = 0  # of the new ids have been decoded, and wait
        self._num_tokens = 0
        self._parts: list[str] = []
        self._length = 0  # of all parts
        self._tail = ""  # the end of the text, as far as a stop string may still begin in it
        self._searched = 0  # text length up to which a stop string may end unnoticed
        self._taken = 0
        self._finished = False

    def add(self, token: int) -> str | None:
        """Takes the next token. Returns the stop string that it completes, if any; no token may follow then."""
        assert not self._finished, "a finished text takes no more tokens"
        self._ids.append(token)
        self._num_tokens += 1
        if not self._stop:
            return None
        self._advance()
        if self._num_tokens <= self._min_tokens:
            self._searched = self._length
            return None
        return self._search()

    def replay(self, tokens: Sequence[int], *, like: Detokenizer) -> None:
        """Takes the tokens that another text of the same answer has taken; as much counts as handed out."""
        for token in tokens:
            self.add(token)
        self._taken = like._taken

    def finish(self) -> None:
        """Ends the text: what was held back (part of a character, of a stop string) comes out."""
        if not self._finished:
            if self.stop_string is None:
                self._advance(final=True)
            self._finished = True

    def take(self) -> str:
        """The text that has become certain since the last call."""
        text = self.text
        fresh, self._taken = text[self._taken :], len(text)
        return fresh

    @property
    def text(self) -> str:
        """All text that is certain: no later token can change it."""
        if not self._finished and self.stop_string is None:
            self._advance()
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        text = self._parts[0] if self._parts else ""
        return text if self._finished or self.stop_string else text[: len(text) - self._held_back()]

    def _advance(self, *, final: bool = False) -> None:
        """Decodes the new ids, as far as they are whole characters (`final`: to the end)."""
        unseen = self._ids[self._read + self._waiting :]
        if len(unseen) > 1:
            text = self._decode(self._ids)
            if UNFINISHED not in text and text.startswith(self._out):
                self._emit(text)
                return
        del self._ids[self._read + self._waiting :]
        for token in unseen:
            self._ids.append(token)
            self._decode_last()
        if final and self._waiting:
            self._emit(self._window_text())

    def _decode_last(self) -> None:
        """Decodes the new ids, of which all but the last one wait."""
        text = self._window_text()
        certain = text.rstrip(UNFINISHED)
        if len(certain) == len(text):
            self._emit(text)
            return
        if len(certain) > len(self._out):
            self._append(certain[len(self._out) :])
            self._out = certain
        waiting = self._ids[self._read :]
        for first in range(1, len(waiting)):  # what ends in a whole character, behind bytes of none
            rest = self._decode(waiting[first:])
            if rest and UNFINISHED not in rest:
                self._append(self._decode(waiting[:first]))
                self._restart(waiting[first:])
                self._emit(rest)
                return
        if (
            len(waiting) >= LONGEST
            and text == self._out + UNFINISHED * len(waiting)
            and self._decode(waiting[:1]) == UNFINISHED
            and self._decode(waiting[1:]) == UNFINISHED * (len(waiting) - 1)
        ):
            # The first one will never be part of a character; without this a long run would be decoded over and over.
            self._append(UNFINISHED)
            self._restart(waiting[1:])
        self._waiting = len(self._ids) - self._read

    def _window_text(self) -> str:
        """The text of the window, which begins with what is out."""
        text = self._decode(self._ids)
        if not text.startswith(self._out):
            self._restart(self._ids[self._read :])
            text = self._decode(self._ids)
        return text

    def _restart(self, ids: list[int]) -> None:
        """Begins a window of new ids only."""
        self._ids, self._read, self._out = ids, 0, ""

    def _emit(self, text: str) -> None:
        """Puts out the text of the window, and begins a new one."""
        self._append(text[len(self._out) :])
        # It begins with the new ids, unless they are silent and would give it nothing to begin with.
        context = self._decode(self._ids[self._read :])
        if context:
            self._ids, text = self._ids[self._read :], context
        self._read, self._out, self._waiting = len(self._ids), text, 0

    def _append(self, fresh: str) -> None:
        if fresh:
            self._parts.append(fresh)
            self._length += len(fresh)
            if self._stop:
                self._tail += fresh

    def _search(self) -> str | None:
        """Looks for the stop string that ends first (of those that end together, the longest) and cuts the text."""
        offset = self._length - len(self._tail)  # of the tail in the text
        found = []
        for stop in self._stop:
            start = self._tail.find(stop, max(self._searched + 1 - offset - len(stop), 0))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        self._searched = self._length
        if not found:
            longest = max(map(len, self._stop))
            self._tail = self._tail[-(longest - 1) :] if longest > 1 else ""
            return None
        end, start, self.stop_string = min(found)
        text = "".join(self._parts)
        self._parts = [text[: offset + (end if self._include_stop else start)]]
        self._length = len(self._parts[0])
        return self.stop_string

    def _held_back(self) -> int:
        """Length of the longest end of the text that is the beginning of a stop string."""
        most = min(max(map(len, self._stop), default=1) - 1, len(self._tail))
        for size in range(most, 0, -1):
            end = self._tail[-size:]
            if any(stop.startswith(end) for stop in self._stop if len(stop) > size):
                return size
        return 0


def _context(decode: Decode, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
    """The last tokens of a prompt and their text; nothing if the prompt ends inside a character.

    A few tokens do, unless they begin inside a character: some decoders then find none in all that follows.
    """
    for count in CONTEXT:
        ids = list(prompt_token_ids[-count:])
        text = decode(ids)
        if not text.endswith(UNFINISHED):
            return ids, text
    return [], ""
