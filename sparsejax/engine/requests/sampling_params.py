"""How a request's tokens are sampled. What it asks for its KV cache: `engine/requests/compression_params.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from sparsejax.errors import InvalidArgumentError, unknown_key_error
from sparsejax.validation import flag, number, unicode_text, whole

MAX_LOGPROBS = 20  # rivals whose log-probabilities the device returns with each token
MAX_STOP_TOKEN_IDS = 16  # ids that min_tokens can hold back, beside the model's own end tokens
MAX_SEED = 2**32 - 1

_Params = TypeVar("_Params", bound=type)


def _strict_keywords(cls: _Params) -> _Params:
    """Makes a dataclass report an unknown keyword with the nearest valid one."""
    build = cls.__init__
    valid = [field.name for field in fields(cls)]

    @functools.wraps(build)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name not in valid:
                raise unknown_key_error(name, valid, cls.__name__)
        build(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


@_strict_keywords
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen and when they end. Names and meanings follow vLLM.

    Defaults are those below for every model: of a checkpoint's generation_config.json only the end tokens are read.

    The order is: minimum length, penalties, temperature, min-p, top-k, top-p; each filter sees the survivors of the
    one before, renormalised.

    Attributes:
      n: answers to one prompt, sampled independently.
      temperature: divides the logits; 0 takes the most likely token (greedy).
      top_k: sample among the k most likely tokens (ties go to the lower id); 0 or -1: all.
      top_p: sample among the fewest tokens whose probability reaches top_p, in (0, 1]; 1: all.
      min_p: drop tokens less likely than min_p times the most likely one, in [0, 1]; 0: none.
      repetition_penalty: divides positive and multiplies negative logits of tokens in the prompt or the answer,
        0.01 to 100; 1: off.
      presence_penalty: subtracted from the logits of tokens in the answer, in [-2, 2].
      frequency_penalty: subtracted once for each time a token is in the answer, in [-2, 2].
      seed: of this request's draws, in [0, 2^32): same seed, same tokens, whatever else runs. None: the engine's own.
      max_tokens: most tokens to generate; clipped to what max_model_len and the cache leave.
      min_tokens: tokens before which neither an end token, a stop token nor a stop string ends the answer.
      stop: strings that end the answer (a single string, or several; kept as a tuple).
      stop_token_ids: tokens that end the answer.
      ignore_eos: go on after the model's end token.
      include_stop_str_in_output: keep the stop string (or the stop token's text) in the text.
      skip_special_tokens: leave special tokens out of the text.
      logprobs: return each token's log-probability and those of this many likeliest, 0 to 20; None: none.
      prompt_logprobs: the same for the prompt's tokens.

    Raises:
      InvalidArgumentError: a value that is not allowed.
      UnknownArgumentError: a name that does not exist.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._set("n", whole("n", self.n, 1))
        self._set("temperature", number("temperature", self.temperature, 0.0))
        top_k = whole("top_k", self.top_k, -1)
        self._set("top_k", max(top_k, 0))
        self._set("top_p", number("top_p", self.top_p, 0.0, 1.0, above=True))
        self._set("min_p", number("min_p", self.min_p, 0.0, 1.0))
        self._set("repetition_penalty", number("repetition_penalty", self.repetition_penalty, 0.01, 100.0))
        self._set("presence_penalty", number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        self._set("frequency_penalty", number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        if self.seed is not None:
            self._set("seed", whole("seed", self.seed, 0, MAX_SEED))
        self._set("max_tokens", whole("max_tokens", self.max_tokens, 1))
        self._set("min_tokens", whole("min_tokens", self.min_tokens, 0))
        if self.min_tokens > self.max_tokens:
            raise InvalidArgumentError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}."
            )
        self._set("stop", _stop_strings(self.stop))
        self._set("stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if self.min_tokens and len(self.stop_token_ids or ()) > MAX_STOP_TOKEN_IDS:
            raise InvalidArgumentError(
                f"stop_token_ids may have at most {MAX_STOP_TOKEN_IDS} ids when min_tokens is set, "
                f"got {len(self.stop_token_ids or ())}."
            )
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            flag(name, getattr(self, name))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, whole(name, getattr(self, name), 0, MAX_LOGPROBS))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen for users; normalised once, here

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as the tuple it was normalised to."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids` as the tuple it was normalised to."""
        return tuple(self.stop_token_ids or ())


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    strings = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise InvalidArgumentError(f"stop must be a non-empty string or a list of such, got {stop!r}.")
        unicode_text(f"stop {string!r}", string)  # no answer would match half a character
    return tuple(dict.fromkeys(strings))


_MAX_TOKEN_ID = (1 << 31) - 1


def _stop_token_ids(ids: Any) -> tuple[int, ...]:
    if ids is None:
        return ()
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InvalidArgumentError(f"stop_token_ids must be a list of token ids, got {ids!r}.")
    return tuple(dict.fromkeys(whole("stop_token_ids", token, 0, _MAX_TOKEN_ID) for token in ids))
