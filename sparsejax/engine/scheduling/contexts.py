"""Compressed contexts that stay for others: many questions over one text, which is computed and compressed once.

A request with `context_tokens` compresses the beginning of its prompt by itself, before anything else of the prompt is
seen. So what its row then holds follows from those tokens and its `CompressionParams` (and from its seed, if the method
draws). If it is never compressed again, a copy of the row is kept, and a later request with the same key forks all of
it.
"""

from __future__ import annotations

import array
import hashlib
from collections.abc import Hashable

from sparsejax.engine.requests.request import CompressionRecord, Request
from sparsejax.engine.scheduling.blocks import Row


def context_key(request: Request) -> Hashable | None:
    """What decides the row of a request whose context has been compressed; None if nothing of it may be taken over."""
    if request.footprint is None:
        return None
    schedule = request.footprint.schedule
    length = schedule.context
    if not schedule.params.once or length == schedule.prompt_length or not schedule.compresses(length):
        return None
    tokens = array.array("q", request.prompt_token_ids[:length])
    seed = request.seed if schedule.params.policy.uses_seed else None
    return hashlib.blake2b(tokens.tobytes(), digest_size=32).digest(), length, schedule.params, schedule.stride, seed


class Contexts:
    """Resident copies of compressed rows by key. A copy may be forked once the device has measured it."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, Row] = {}
        self._keys: dict[Row, Hashable] = {}
        self._ready: set[Row] = set()
        self._records: dict[Row, CompressionRecord] = {}
        self._pending: dict[Hashable, Request] = {}  # whose row will be copied

    def __contains__(self, row: Row) -> bool:
        return row in self._keys

    def find(self, request: Request) -> tuple[Row | None, bool]:
        """The row that can be forked, and whether there will be one."""
        key = request.context_key
        row = self._rows.get(key)
        if row is None:
            return None, self._pending.get(key, request) is not request
        return (row, False) if row in self._ready else (None, True)

    def begin(self, request: Request) -> None:
        """Tells that a request computes its context. Its row will be copied, unless another's is there before."""
        if request.context_key not in self._rows:
            self._pending.setdefault(request.context_key, request)

    def awaits(self, request: Request) -> bool:
        """Whether the request's row has to be copied when it is compressed."""
        return self._pending.get(request.context_key) is request

    def abandon(self, request: Request) -> None:
        """Tells that a request's row will not be copied."""
        if self.awaits(request):
            del self._pending[request.context_key]

    def keep(self, row: Row, request: Request) -> None:
        """Enters the copy of a request's row."""
        self.abandon(request)
        self._rows[request.context_key] = row
        self._keys[row] = request.context_key

    def settle(self, row: Row) -> None:
        """Tells that a copy has been measured."""
        self._ready.add(row)

    def describe(self, request: Request, record: CompressionRecord) -> None:
        """Tells what compression did to a request's row, of which there may be a copy."""
        row = self._rows.get(request.context_key)
        if row is not None:
            self._records.setdefault(row, record)

    def record_of(self, row: Row) -> CompressionRecord | None:
        """What compression did to the row that is copied here."""
        return self._records.get(row)

    def forget(self, row: Row) -> None:
        """Takes a copy out: it is about to be released."""
        del self._rows[self._keys.pop(row)]
        self._ready.discard(row)
        self._records.pop(row, None)
