"""Traces: which requests arrive when. Built in by name, drawn at random, or read from a JSONL file.

A line of a file is one request, and every key but the lengths may be left out:

    {"arrival": 0.0, "input_tokens": 1024, "output_tokens": 256, "seed": 7}
    {"arrival": 0.5, "prompt_token_ids": [9, 4, 12], "output_tokens": 16}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from sparsejax.errors import InvalidArgumentError, nearest, unknown_key_error
from sparsejax.text_files import numbered_lines, read_text
from sparsejax.validation import number, whole

BUILT_IN = ("mix600", "512x1024x256", "24x32k", "itl32k", "prefix64x8k")
RANDOM = ("random", "lognormal")
_SHARED_SEED = 1 << 40  # of the tokens that prompts share; no request has it unless it asks for it
SPREAD = {"random": 0.5, "lognormal": 1.0}  # unless asked for


@dataclass(frozen=True)
class TraceRequest:
    """One request. Its answer is greedy and goes on past end tokens, so that it has exactly `output_tokens`.

    Attributes:
      arrival: seconds after the start of the trace.
      input_tokens: of the prompt.
      output_tokens: to generate.
      seed: of the prompt's token ids, which are drawn uniformly from the vocabulary.
      prompt_token_ids: the prompt itself, if it is not to be drawn.
      shared_tokens: first tokens of the prompt that are the same in all requests which share as many or more.
    """

    arrival: float
    input_tokens: int
    output_tokens: int
    seed: int = 0
    prompt_token_ids: tuple[int, ...] | None = None
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        number("arrival", self.arrival, 0.0)
        for name in ("input_tokens", "output_tokens", "seed", "shared_tokens"):
            whole(name, getattr(self, name), 0 if name in ("seed", "shared_tokens") else 1)
        if self.prompt_token_ids is not None and not all(
            isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in self.prompt_token_ids
        ):
            raise InvalidArgumentError("prompt_token_ids must be whole numbers from 0 on.")
        if self.prompt_token_ids is not None and len(self.prompt_token_ids) != self.input_tokens:
            raise InvalidArgumentError(
                f"input_tokens must be the length of prompt_token_ids, {len(self.prompt_token_ids)}, "
                f"got {self.input_tokens}."
            )

    def prompt(self, vocab_size: int) -> list[int]:
        """The prompt's token ids; the same every time.

        Raises:
          InvalidArgumentError: one that the vocabulary does not have.
        """
        if self.prompt_token_ids is not None:
            if max(self.prompt_token_ids) >= vocab_size:
                raise InvalidArgumentError(
                    f"prompt_token_ids must be below {vocab_size}, the model's vocabulary; "
                    f"got {max(self.prompt_token_ids)}."
                )
            return list(self.prompt_token_ids)
        shared = np.random.default_rng(_SHARED_SEED).integers(0, vocab_size, self.shared_tokens)[: self.input_tokens]
        own = np.random.default_rng(self.seed).integers(0, vocab_size, self.input_tokens - len(shared))
        return [*shared.tolist(), *own.tolist()]


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
      name: a built-in name, or what describes how it was made.
      requests: at least one.
    """

    name: str
    requests: tuple[TraceRequest, ...]

    def __post_init__(self) -> None:
        if not self.requests:
            raise InvalidArgumentError(f"trace {self.name!r} has no requests.")
        object.__setattr__(self, "requests", tuple(sorted(self.requests, key=lambda request: request.arrival)))

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def input_tokens(self) -> int:
        """Of all prompts."""
        return sum(request.input_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Of all answers."""
        return sum(request.output_tokens for request in self.requests)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer: the max_model_len it takes."""
        return max(request.input_tokens + request.output_tokens for request in self.requests)


def _from_lengths(
    name: str, inputs: Sequence[int], outputs: Sequence[int], *, arrivals: Sequence[float] | None = None, seed: int = 0
) -> Trace:
    """A trace of given lengths; everything arrives at once if not told otherwise, and no two prompts share a seed."""
    arrivals = [0.0] * len(inputs) if arrivals is None else arrivals
    return Trace(
        name,
        tuple(
            TraceRequest(float(arrival), int(length), int(answer), seed=(seed << 32) + i)
            for i, (arrival, length, answer) in enumerate(zip(arrivals, inputs, outputs, strict=True))
        ),
    )


def mix600() -> Trace:
    """600 requests at once, prompts of 16 to 8,192 tokens (log-normal), answers of 16 to 512 (uniform)."""
    rng = np.random.default_rng(0)
    inputs = np.clip(rng.lognormal(6.2, 1.0, 600), 16, 8192).astype(int)
    return _from_lengths("mix600", inputs.tolist(), rng.integers(16, 513, 600).tolist())


def itl32k() -> Trace:
    """Eight requests that decode (1,024 in, 2,048 out), and a prompt of 32,000 tokens that arrives 3 seconds later."""
    return _from_lengths("itl32k", [1024] * 8 + [32000], [2048] * 8 + [64], arrivals=[0.0] * 8 + [3.0])


def prefix64x8k() -> Trace:
    """64 requests behind a system prompt of 8,192 tokens: half at once, then one every quarter of a second.

    Each has 128 tokens of its own and an answer of 64. What the late ones wait for is the prefill of these 128.
    """
    arrivals = [0.0] * 32 + [4 + 0.25 * i for i in range(32)]
    trace = _from_lengths("prefix64x8k", [8192 + 128] * 64, [64] * 64, arrivals=arrivals)
    return Trace(trace.name, tuple(replace(request, shared_tokens=8192) for request in trace.requests))


def uniform(requests: int, input_tokens: int, output_tokens: int, *, name: str | None = None) -> Trace:
    """Equal requests, all at once."""
    name = name or f"{requests}x{input_tokens}x{output_tokens}"
    return _from_lengths(name, [input_tokens] * requests, [output_tokens] * requests)


def generate(
    kind: str,
    *,
    requests: int = 100,
    input_len: int = 1024,
    output_len: int = 128,
    spread: float | None = None,
    rate: float | None = None,
    seed: int = 0,
) -> Trace:
    """A random trace.

    Args:
      kind: "random": lengths uniform in (1 - spread) to (1 + spread) of what is asked for; "lognormal": log-normal with
        that median and `spread` as sigma, at most 16 times the median.
      requests: how many.
      input_len, output_len: mean (random) or median (lognormal) tokens of prompts and answers.
      spread: of the lengths. Default: 0.5 for random, 1.0 for lognormal; 0: all equal.
      rate: mean arrivals a second, a Poisson process; None: all at once.
      seed: of lengths, arrivals and token ids.
    """
    if kind not in RANDOM:
        raise InvalidArgumentError(f"a random trace must be one of {', '.join(RANDOM)}; got {kind!r}.")
    for name, value in (("requests", requests), ("input_len", input_len), ("output_len", output_len)):
        if value < 1:
            raise InvalidArgumentError(f"{name} must be at least 1, got {value}.")
    if rate is not None and not 0 < rate < math.inf:
        raise InvalidArgumentError(f"rate must be positive (requests a second), got {rate}.")
    whole("seed", seed, 0)
    spread = SPREAD[kind] if spread is None else spread
    if not 0 <= spread < math.inf or (kind == "random" and spread > 1):
        raise InvalidArgumentError(f"spread must be at least 0 (and at most 1 for random), got {spread}.")
    rng = np.random.default_rng(seed)

    def lengths(typical: int) -> list[int]:
        if kind == "random":
            low, high = round(typical * (1 - spread)), round(typical * (1 + spread))
            return rng.integers(max(low, 1), high + 1, requests).tolist()
        return np.clip(typical * rng.lognormal(0.0, spread, requests), 1, 16 * typical).astype(int).tolist()

    inputs, outputs = lengths(input_len), lengths(output_len)
    arrivals = None if rate is None else np.cumsum(rng.exponential(1 / rate, requests)).tolist()
    name = f"{kind}-{requests}x{input_len}x{output_len}" + (f"@{rate:g}" if rate else "")
    return _from_lengths(name, inputs, outputs, arrivals=arrivals, seed=seed)


def load(name: str) -> Trace:
    """A built-in trace, N equal requests ("NxINPUTxOUTPUT"), or a JSONL file.

    Raises:
      InvalidArgumentError: none of these, or a line that is no request.
    """
    if name == "mix600":
        return mix600()
    if name == "itl32k":
        return itl32k()
    if name == "prefix64x8k":
        return prefix64x8k()
    if name == "24x32k":
        return uniform(24, 32000, 1024, name=name)
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", name):
        requests, input_tokens, output_tokens = map(int, name.split("x"))
        return uniform(requests, input_tokens, output_tokens)
    path = Path(name)
    if path.is_file():
        return read_jsonl(path)
    if name in RANDOM:
        raise InvalidArgumentError(f"--trace {name} is drawn to the other options and stands alone, not in a list.")
    guess = nearest(name, BUILT_IN)
    hint = f" Did you mean {guess!r}?" if guess else ""
    raise InvalidArgumentError(
        f"--trace {name!r} is neither a file nor a known trace.{hint} Known: {', '.join(BUILT_IN)}, "
        "or REQUESTSxINPUTxOUTPUT."
    )


def read_jsonl(path: str | Path) -> Trace:
    """The trace of a file, see the module's docstring."""
    requests = []
    for place, line in numbered_lines(read_text(path)):
        try:
            requests.append(_request(json.loads(line), default_seed=place))
        except (ValueError, TypeError) as error:  # InvalidArgumentError is a ValueError
            raise InvalidArgumentError(f"{path}, line {place}: {error}") from error
    return Trace(Path(path).stem, tuple(requests))


def _request(line: dict, *, default_seed: int) -> TraceRequest:
    if not isinstance(line, dict):
        raise InvalidArgumentError(f"a request must be an object with keys and values, got {line!r:.80}.")
    valid = [field.name for field in fields(TraceRequest)]
    for key in line:
        if key not in valid:
            raise unknown_key_error(key, valid, "a request")
    line = {"arrival": 0.0, "seed": default_seed} | line
    if line.get("prompt_token_ids") is not None:
        if not isinstance(line["prompt_token_ids"], list):
            raise InvalidArgumentError(f"prompt_token_ids must be a list, got {line['prompt_token_ids']!r:.80}.")
        line["prompt_token_ids"] = tuple(line["prompt_token_ids"])
        line.setdefault("input_tokens", len(line["prompt_token_ids"]))
    for key in ("input_tokens", "output_tokens"):
        if key not in line:
            raise InvalidArgumentError(f"a request must have {key}, got only {', '.join(sorted(line))}.")
    return TraceRequest(**line)


def write_jsonl(trace: Trace, path: str | Path) -> None:
    """Writes the trace; `read_jsonl` gives the same requests back."""
    lines = []
    for request in trace.requests:
        line = {field.name: getattr(request, field.name) for field in fields(request)}
        if request.prompt_token_ids is None:
            del line["prompt_token_ids"]
        if not request.shared_tokens:
            del line["shared_tokens"]
        lines.append(json.dumps(line))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
