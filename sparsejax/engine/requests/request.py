"""A request on the host: its prompt, what was generated, and how far the device has been asked to go."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.footprint import Footprint
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.errors import SchedulingError


class Status(enum.Enum):
    """WAITING (nothing cached) -> PREFILLING -> RUNNING (decodes) -> FINISHED; preemption leads back to WAITING."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class CompressionRecord:
    """What compression did to a row.

    Attributes:
      count: how often.
      seconds: all together.
      pages_before, pages_after, bytes_before, bytes_after: what the row held around the last time.
      kept_tokens: i32[L, H] after the last time, or after the last decode step since that evicted.
    """

    count: int = 0
    seconds: float = 0.0
    pages_before: int = 0
    pages_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    kept_tokens: np.ndarray | None = None


@dataclass(eq=False)
class Request:
    """One answer to one prompt (`n` answers are n requests, see `expand`). Only scheduler and engine change it.

    The host runs one step behind the device, so two counts exist of what was generated: `output_token_ids` has been
    read, `num_dispatched_outputs` includes tokens still in flight. The newest token is the *input* of the next decode:
    its K/V is not in the cache before. While a request is RUNNING therefore always

        num_computed == len(prompt_token_ids) + num_dispatched_outputs - 1,

    except while it replays outputs by decoding them (`forced_token`), when num_computed is behind.

    Attributes:
      request_id: unique among unfinished requests.
      prompt_token_ids: the prompt.
      params: how to sample.
      compression: what to keep of the cache.
      seed: of this request's draws, in [0, 2^32).
      index: which of the n answers to the prompt this is.
      parent_id: the id the user knows it by, shared by the n answers; request_id if there is one answer only.
      arrival_time: seconds on the scheduler's clock; set by `Scheduler.add` if None.
      order: arrival number, set by `Scheduler.add`.
      max_tokens: most tokens to generate: params.max_tokens, clipped by `Scheduler.add`.
      row: row of the slot table, None while it has none.
      num_computed: tokens whose K/V is in the cache, or will be once all dispatched steps have run.
      first_scheduled_time: when its first chunk was planned, seconds on the scheduler's clock.
      num_reused: tokens that its row was given from another when it was last admitted; its prefill begins behind them.
      num_cached_tokens: tokens of the prompt that prefix caching gave it when it was first admitted.
      num_preemptions: how often it lost its row and started over.
      footprint: what it can hold, and when it is compressed, set by `Scheduler.add`; None if it is never compressed.
      num_held: tokens that its row holds, mean over the tables, once all dispatched steps have run. Evicted ones are
        not among them.
      is_evicting: its row has been evicted from by a method that evicts per step.
      context_key: names what its row holds once its context is compressed, set by `Scheduler.add`; None if others
        cannot take that over.
      context_record: what compression did to the context that it took over; None if it computed its own.
      finish_reason: "stop", "length" or "abort" once FINISHED.
      stop_reason: the stop string or stop token id that ended it; None for the model's end token.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    compression: CompressionParams = field(default_factory=CompressionParams)
    seed: int = 0
    index: int = 0
    parent_id: str = ""
    arrival_time: float | None = None
    order: int = -1
    max_tokens: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    num_dispatched_outputs: int = 0
    num_computed: int = 0
    row: int | None = None
    status: Status = Status.WAITING
    first_scheduled_time: float | None = None
    num_reused: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    footprint: Footprint | None = None
    num_held: int = 0
    is_evicting: bool = False
    context_key: Hashable | None = None
    context_record: CompressionRecord | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self.parent_id = self.parent_id or self.request_id
        self.max_tokens = self.max_tokens or self.params.max_tokens

    @property
    def tokens(self) -> list[int]:
        """Prompt and read outputs."""
        return [*self.prompt_token_ids, *self.output_token_ids]

    @property
    def num_unread(self) -> int:
        """Generated tokens still in flight."""
        return self.num_dispatched_outputs - len(self.output_token_ids)

    @property
    def is_replay(self) -> bool:
        """Whether the token behind a prefill is known: then it samples nothing."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) > self.prefill_target

    @property
    def prefill_target(self) -> int:
        """Tokens the cache must hold before it can decode.

        All that are known but the newest; but only the prompt, if decoding evicts, and only what
        `CompressionParams.prefilled` says, if it selects: the others are then decoded (again), one by one.
        """
        prompt = len(self.prompt_token_ids)
        if self.compression.decodes_again:
            return self.compression.prefilled(prompt)
        if self.footprint is not None and self.footprint.schedule.changes_while_decoding:
            return prompt
        return prompt + max(len(self.output_token_ids) - 1, 0)

    @property
    def num_prefilled_outputs(self) -> int:
        """Outputs that are in the cache after a prefill, or are the newest token then; less than 1 if that token is
        one of the prompt."""
        return self.prefill_target + 1 - len(self.prompt_token_ids) if self.is_replay else 0

    @property
    def forced_token(self) -> int | None:
        """What the next decode must yield, if that token is known: it replays. None: it samples."""
        index = self.num_computed + 1 - len(self.prompt_token_ids)
        if index < 0:
            return self.prompt_token_ids[index]
        return self.output_token_ids[index] if index < len(self.output_token_ids) else None

    @property
    def transient_entries(self) -> int:
        """Table entries that its evictions need while they run, beside what is held before and after."""
        return 0 if self.footprint is None else self.footprint.transient(self.max_tokens - 1)

    @property
    def peak_tokens(self) -> int:
        """Most tokens it can ever have in the cache; the last token it generates is never fed back."""
        return len(self.prompt_token_ids) + self.max_tokens - 1

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def start_over(self) -> None:
        """Makes it wait, without a row and with the outputs that have been read."""
        self.num_preemptions += self.status is not Status.WAITING
        self.status, self.row = Status.WAITING, None
        self.num_computed = self.num_held = self.num_reused = 0
        self.is_evicting = False
        self.finish_reason = self.stop_reason = None
        self.num_dispatched_outputs = len(self.output_token_ids)

    def record(self, token: int) -> bool:
        """Takes the oldest unread token from the device. Returns False if it is surplus, because the request has ended.

        Raises:
          SchedulingError: no token is in flight.
        """
        if self.finished:
            return False
        if self.num_unread <= 0:
            raise SchedulingError(f"request {self.request_id!r} was given a token, but none is in flight for it.")
        self.output_token_ids.append(int(token))
        return True


def expand(
    request_id: str,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    *,
    compression: CompressionParams | None = None,
    seed: int,
) -> list[Request]:
    """The `params.n` requests of one prompt. The first draws exactly as with n = 1; the others have seeds of their own.

    Args:
      request_id: id of the only request, and parent_id of several ("id/0", "id/1", ...).
      seed: used unless params brings its own.
    """
    compression = compression or CompressionParams()
    seed = seed if params.seed is None else params.seed
    return [
        Request(
            request_id=request_id if params.n == 1 else f"{request_id}/{index}",
            prompt_token_ids=prompt_token_ids,
            params=params,
            compression=compression,
            seed=derive_seed(seed, index),
            index=index,
            parent_id=request_id,
        )
        for index in range(params.n)
    ]


def derive_seed(seed: int, number: int) -> int:
    """The `number`-th seed that follows from `seed`, in [0, 2^32); number 0 is `seed` itself.

    Neighbouring seeds and numbers give unrelated results (the finaliser of SplitMix64, Steele et al., 2014).
    """
    if number == 0:
        return seed & 0xFFFFFFFF
    word = (seed + 0x9E3779B97F4A7C15 * number) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (word ^ (word >> 31)) & 0xFFFFFFFF
