"""What the scheduler tells the engine to do next: changes to the slot table, a prefill batch, a decode batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.usage import Balance

ALL = 2**31 - 1  # count of a fork that takes over whatever the source holds


@dataclass(frozen=True)
class Release:
    """Empty a row of the slot table: its request has ended or was preempted, or it was kept for reuse and evicted."""

    row: int


@dataclass(frozen=True)
class Fork:
    """Give the empty row `target` the first `count` tokens of the row `source`; ALL: whatever it holds."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Chunk:
    """Part of a request's prefill: the tokens start .. start + count of `request.tokens`.

    Attributes:
      is_last: after it the request can decode. It samples the first token, unless the request replays outputs.
      compressed_at: length of the text at its next compression, at the end of this chunk or later; what its queries
        record counts for that one. None: this prefill is not compressed any more.
    """

    request: Request
    start: int
    count: int
    is_last: bool
    compressed_at: int | None = None

    @property
    def is_first(self) -> bool:
        """Whether the request begins with it: at token 0, or behind the cached prefix that its row was given."""
        return self.start == self.request.num_reused


@dataclass(frozen=True)
class Compress:
    """Evict most of what a request's row holds.

    Attributes:
      request: the request; it keeps its row.
      text_length: tokens of its text that have been given to the row by now, evicted ones included.
      budget: tokens to keep, mean over the layers and heads. The row holds more.
      held: tokens that the row holds, mean over the layers and heads.
    """

    request: Request
    text_length: int
    budget: int
    held: int

    @property
    def is_first(self) -> bool:
        """Whether nothing was ever evicted from the row: its slots lie in the order of the text then."""
        return self.held == self.text_length


@dataclass(frozen=True)
class Evict(Compress):
    """The same, by a method that evicts per step. A row is listed in every plan from its first eviction on.

    Attributes:
      bulk: the row may hold more over its budget than goes in one step: at the end of a prompt.
    """

    bulk: bool = False


@dataclass(frozen=True)
class FullRing:
    """Compress the oldest recent tokens of a request's row.

    Attributes:
      request: the request; it keeps its row.
      text_length: tokens of its text that have been given to the row by now.
    """

    request: Request
    text_length: int


@dataclass(frozen=True)
class Plan:
    """One step, in the order it is to be dispatched. No request is in both `prefill` and `decode`.

    Attributes:
      changes: what happens to the slot table first. The order matters: a row may be released and then be the target of
        a fork, or the source of a fork and then be released.
      preempted: requests that lost their row in this plan and wait again.
      decode: requests that each compute their newest token and sample the next, oldest first.
      prefill: one packed batch; empty if there is nothing to prefill.
      forced: known tokens, of the requests in `decode` that replay outputs: what such a decode yields instead of a
        sample. They have been recorded long ago, and are not recorded again.
      compress: after decode and prefill. The first token of a prompt that is compressed is sampled before.
      evict: likewise, per-step evictions. No request is in both.
      rings: likewise, compressions of rows of a `DeltaCache`.
      snapshots: at last, forks that keep what was just compressed for others.
      balance: what the host counts then, for `Scheduler.settle`.
    """

    changes: list[Release | Fork] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)
    forced: dict[Request, int] = field(default_factory=dict)
    compress: list[Compress] = field(default_factory=list)
    evict: list[Evict] = field(default_factory=list)
    snapshots: list[Fork] = field(default_factory=list)
    rings: list[FullRing] = field(default_factory=list)
    balance: Balance = field(default_factory=lambda: Balance(free_entries=0))

    @property
    def release(self) -> list[int]:
        """Rows that the plan releases."""
        return [change.row for change in self.changes if isinstance(change, Release)]

    @property
    def forks(self) -> list[Fork]:
        """Forks of the plan."""
        return [change for change in self.changes if isinstance(change, Fork)]

    @property
    def has_work(self) -> bool:
        """Whether there is a step to run."""
        return bool(self.prefill or self.decode)
