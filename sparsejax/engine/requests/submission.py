"""What a caller holds of a prompt it has submitted: its answers as they grow, whole or as increments."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsejax.engine.requests.detokenizer import Detokenizer
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.engine.requests.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from sparsejax.engine.requests.request import CompressionRecord, Request


@dataclass(eq=False)
class Answer:
    """One answer: its request and what has been read of it. The engine writes it.

    Attributes:
      request: finish reason and tokens.
      detokenizer: its text, None without a tokenizer.
      logprobs: one dict a token, None unless asked for.
      cumulative_logprob: their sum over the chosen tokens.
      kv_bytes: most KV cache it held so far, whole pages.
      num_read: tokens that have been read to the end, text and stop included.
      taken: tokens that an increment has handed out.
      compression: what compression did.
      read_tokens: tokens that its decode steps read, as in `RequestMetrics`.
    """

    request: Request
    detokenizer: Detokenizer | None
    logprobs: list[dict[int, Logprob]] | None
    cumulative_logprob: float = 0.0
    kv_bytes: int = 0
    num_read: int = 0
    taken: int = 0
    compression: CompressionRecord = field(default_factory=CompressionRecord)
    read_tokens: float | None = None

    @property
    def last_compression(self) -> CompressionRecord:
        """The sizes around the last compression of what its row holds, be it that of a context that it took over."""
        return self.compression if self.compression.count else self.request.context_record or self.compression

    @property
    def kept_tokens(self) -> list[list[int]] | None:
        """As in `RequestMetrics`."""
        kept = self.compression.kept_tokens
        if kept is None:
            kept = self.last_compression.kept_tokens
        return None if kept is None else kept.tolist()

    def output(self, *, increment: bool) -> CompletionOutput:
        """The answer so far, or what is new of it since the last increment."""
        request, since = self.request, self.taken if increment else 0
        self.taken = len(request.output_token_ids) if increment else self.taken
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.take() if increment else self.detokenizer.text
        return CompletionOutput(
            index=request.index,
            text=text,
            token_ids=request.output_token_ids[since:],
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[since:],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )


@dataclass(eq=False)
class Submission:
    """A prompt and its n answers, from `Engine.add` until all have ended.

    Attributes:
      request_id: the id it was added under.
      prompt: text (if any) and token ids.
      answers: one per request.
      prompt_logprobs: filled chunk by chunk; None unless asked for.
      arrival_time, first_token_time, finished_time: seconds on the engine's clock.
      error: what ended it with reason "abort", if it was not its caller.
    """

    request_id: str
    prompt: TokenizedPrompt
    answers: list[Answer]
    arrival_time: float
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    error: BaseException | None = None

    @property
    def finished(self) -> bool:
        return all(answer.request.finished for answer in self.answers)

    @property
    def num_generated_tokens(self) -> int:
        return sum(len(answer.request.output_token_ids) for answer in self.answers)

    @property
    def has_news(self) -> bool:
        """Whether an increment would hold tokens that none has held."""
        return any(answer.taken < len(answer.request.output_token_ids) for answer in self.answers)

    def output(self, *, increment: bool = False) -> RequestOutput:
        """The state of all answers. increment: only text, tokens and log-probabilities that are new since the last."""
        scheduled = [a.request.first_scheduled_time for a in self.answers if a.request.first_scheduled_time is not None]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[answer.output(increment=increment) for answer in self.answers],
            finished=self.finished,
            metrics=RequestMetrics(
                arrival_time=self.arrival_time,
                num_prompt_tokens=len(self.prompt.token_ids),
                num_generated_tokens=self.num_generated_tokens,
                num_cached_tokens=sum(answer.request.num_cached_tokens for answer in self.answers),
                num_preemptions=sum(answer.request.num_preemptions for answer in self.answers),
                kv_bytes=sum(answer.kv_bytes for answer in self.answers),
                num_compressions=sum(answer.compression.count for answer in self.answers),
                compression_seconds=sum(answer.compression.seconds for answer in self.answers),
                kv_pages_before_compression=sum(answer.last_compression.pages_before for answer in self.answers),
                kv_pages_after_compression=sum(answer.last_compression.pages_after for answer in self.answers),
                kv_bytes_before_compression=sum(answer.last_compression.bytes_before for answer in self.answers),
                kv_bytes_after_compression=sum(answer.last_compression.bytes_after for answer in self.answers),
                kept_tokens=self.answers[0].kept_tokens,
                read_tokens=self.answers[0].read_tokens,
                first_scheduled_time=min(scheduled, default=None),
                first_token_time=self.first_token_time,
                finished_time=self.finished_time,
            ),
        )
