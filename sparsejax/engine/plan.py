"""What the scheduler tells the engine to do next: changes to the slot table, a prefill batch, a decode batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparsejax.engine.request import Request


@dataclass(frozen=True)
class Release:
    """Empty a row of the slot table: its request has ended or was preempted, or it was kept for reuse and evicted."""

    row: int


@dataclass(frozen=True)
class Fork:
    """Give the empty row `target` the first `count` tokens of the row `source`."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Chunk:
    """Part of a request's prefill: the tokens start .. start + count of `request.tokens`.

    Attributes:
      is_last: after it the request can decode. It samples the first token, unless the request replays outputs.
    """

    request: Request
    start: int
    count: int
    is_last: bool

    @property
    def is_first(self) -> bool:
        """Whether the request begins with it: at token 0, or behind the cached prefix that its row was given."""
        return self.start == self.request.num_reused


@dataclass(frozen=True)
class Plan:
    """One step, in the order it is to be dispatched. No request is in both `prefill` and `decode`.

    Attributes:
      changes: what happens to the slot table first. The order matters: a row may be released and then be the target of
        a fork, or the source of a fork and then be released.
      preempted: requests that lost their row in this plan and wait again.
      decode: requests that each compute their newest token and sample the next, oldest first.
      prefill: one packed batch; empty if there is nothing to prefill.
    """

    changes: list[Release | Fork] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)

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
