"""When an answer ends: end tokens, stop tokens, stop strings, the length limit. Checked on the host, a token at a time.

The device runs ahead, so a token may already be in flight when an answer ends; it is surplus and is discarded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from sparsejax.engine.requests.detokenizer import Decode, Detokenizer
from sparsejax.engine.requests.request import Request


@dataclass(frozen=True)
class Stop:
    """Why an answer ended.

    Attributes:
      finish_reason: "stop" or "length".
      stop_reason: the stop string, or the id of the stop token; None for an end token and for "length".
    """

    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None = None


def check_stop(
    request: Request, token: int, *, eos_token_ids: Collection[int], detokenizer: Detokenizer | None = None
) -> Stop | None:
    """Feeds a token to the text and tells whether it ends the answer; the text is finished then.

    The token that ends an answer is part of its `output_token_ids`. A stop token's text is left out, unless the
    request includes it. Of several reasons at one token, tokens come before strings, and strings before the length.

    Args:
      request: whose `output_token_ids` ends with `token` already (`Request.record`).
      token: its newest token.
      eos_token_ids: the model's end tokens.
      detokenizer: the request's text; None if it has none, and then stop strings cannot be seen.
    """
    params = request.params
    stop = _stop_at_token(request, token, eos_token_ids)
    if detokenizer is not None and (stop is None or params.include_stop_str_in_output):
        found = detokenizer.add(token)
        if stop is None and found is not None:
            stop = Stop("stop", found)
    if stop is None and len(request.output_token_ids) >= request.max_tokens:
        stop = Stop("length")
    if stop is not None and detokenizer is not None:
        detokenizer.finish()
    return stop


def _stop_at_token(request: Request, token: int, eos_token_ids: Collection[int]) -> Stop | None:
    params = request.params
    if len(request.output_token_ids) <= params.min_tokens:  # min_tokens come before the one that may end it
        return None
    if token in eos_token_ids and not params.ignore_eos:
        return Stop("stop")
    if token in params.stop_ids:
        return Stop("stop", token)
    return None


def detokenizer_for(request: Request, decode: Decode) -> Detokenizer:
    """The text of a request. decode: see `decode_function`."""
    params = request.params
    return Detokenizer(
        decode,
        request.prompt_token_ids,
        stop=params.stop_strings,
        include_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )
