"""What a request gives back. Names are vLLM's where vLLM has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    """Natural-log probability of a token under the raw model: before penalties, temperature and filters.

    Attributes:
      logprob: natural logarithm of the probability.
      rank: 1 for the most likely token of the vocabulary.
      decoded_token: the token's own text; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


def logprobs_of_token(
    token: int,
    logprob: float,
    rank: int,
    top_ids: Sequence[int],
    top_logprobs: Sequence[float],
    count: int,
    decode: Callable[[int], str] | None = None,
) -> dict[int, Logprob]:
    """The entry of one position: the token itself first, then the `count` likeliest, likeliest first.

    Args:
      token, logprob, rank: of the token at this position.
      top_ids, top_logprobs: the likeliest tokens in order; at least min(count, vocabulary) of them, -1 for absent ones.
      count: `SamplingParams.logprobs`.
      decode: id -> text.

    Returns:
      count entries, or count + 1 if the token is not among the likeliest.
    """

    def entry(token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(float(logprob), int(rank), None if decode is None else decode(int(token)))

    entries = {int(token): entry(token, logprob, rank)}
    for place, (rival, value) in enumerate(zip(top_ids[:count], top_logprobs[:count], strict=True), start=1):
        if rival >= 0:
            entries.setdefault(int(rival), entry(rival, value, place))
    return entries


@dataclass
class CompletionOutput:
    """One answer.

    Attributes:
      index: which of the n answers.
      text: without the stop string unless it was to be included; "" if the engine has no tokenizer.
      token_ids: all tokens, the one that ended it included.
      cumulative_logprob: sum of the tokens' log-probabilities; None unless `logprobs` was asked for.
      logprobs: one dict a token, by token id; None unless asked for.
      finish_reason: "stop", "length" or "abort"; None while it runs.
      stop_reason: the stop string or stop token id; None for the model's end token and other reasons.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Measured, not nominal. Times are seconds on the engine's monotonic clock; None until they happen.

    Attributes:
      arrival_time: when the request was added.
      first_scheduled_time: when its first prefill chunk was planned.
      first_token_time: when the host had its first token.
      finished_time: when its last answer ended.
      num_prompt_tokens: of the prompt.
      num_generated_tokens: of all answers together.
      num_cached_tokens: of the prompt, taken from the prefix cache instead of being computed; all answers together.
      num_preemptions: how often it lost its cache and was recomputed.
      kv_bytes: the most KV cache it held, whole pages, all answers together; pages shared with others count in full.
      num_compressions: how often its cache was compressed; per-step evictions count only where they cut a prompt. Of a
        request that is stored compressed: chunks and full rings of recent tokens that were.
      compression_seconds: time that compressing took, as the host saw it: from the end of the model's step on. An
        underestimate where the host came late to read; what is stored compressed within a step does not count.
      kv_pages_before_compression, kv_pages_after_compression: pages around the last compression, each of `page_size`
        tokens of one KV head of one layer; 0 if there was none. Of a context that another request compressed, and this
        one took over, what that was then.
      kv_bytes_before_compression, kv_bytes_after_compression: likewise, the bytes of these pages.
      kept_tokens: tokens of each layer and KV head of the first answer, [layer][head], after its last compression or
        the last decode step that evicted, or else of the context that it took over; None if nothing was evicted.
      read_tokens: tokens that a decode step of the first answer read, mean over the layers and the steps; whole pages
        where pages are chosen. None before it has ended, if it took no decode step, and if its method evicts.
    """

    arrival_time: float
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    kv_bytes: int = 0
    num_compressions: int = 0
    compression_seconds: float = 0.0
    kv_pages_before_compression: int = 0
    kv_pages_after_compression: int = 0
    kv_bytes_before_compression: int = 0
    kv_bytes_after_compression: int = 0
    kept_tokens: list[list[int]] | None = None
    read_tokens: float | None = None
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first prefill chunk."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from arrival until the host had it."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def e2e_time(self) -> float | None:
        """Seconds from arrival to the end."""
        return _between(self.arrival_time, self.finished_time)

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed: tokens after the first one, over the time after the first one. None for a single token."""
        duration = _between(self.first_token_time, self.finished_time)
        if not duration or self.num_generated_tokens < 2:
            return None
        return (self.num_generated_tokens - 1) / duration


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start


@dataclass
class RequestOutput:
    """A prompt and its answers.

    Attributes:
      request_id: the id the request was added under.
      prompt: its text; None if token ids were given.
      prompt_token_ids: its tokens.
      prompt_logprobs: one dict a prompt token (None for the first, which nothing precedes); None unless asked for.
      outputs: the n answers by index.
      finished: whether all answers have ended.
      metrics: what it took.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(arrival_time=0.0))
