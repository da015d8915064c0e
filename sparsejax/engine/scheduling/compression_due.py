"""Which compressions and evictions a plan contains: those that are due for the requests it gives tokens to."""

from __future__ import annotations

from collections.abc import Iterable

from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Compress, Evict, FullRing
from sparsejax.engine.scheduling.store_limits import StoreLimits


def due_now(requests: Iterable[Request]) -> list[Compress]:
    """What is due once the rows of these requests have been given the tokens that are counted as computed.

    It is counted as done.
    """
    due = []
    for request in requests:
        if request.footprint is None:
            continue
        schedule, length, held = request.footprint.schedule, request.num_computed, request.num_held
        evicts = schedule.evicts(length)
        if not ((evicts and request.is_evicting) or schedule.due(held, length)):
            continue
        budget = schedule.params.budget(length)
        request.num_held = schedule.kept(held, length)
        if evicts:
            request.is_evicting = True
            due.append(Evict(request, length, budget, held, bulk=held > budget + 1))
        else:
            due.append(Compress(request, length, budget, held))
    return due


def full_rings(requests: Iterable[Request], limits: StoreLimits) -> list[FullRing]:
    """Of the requests that a plan decodes, those whose newest token fills the ring of a compressed row."""
    return [
        FullRing(request, request.num_computed)
        for request in requests
        if request.compression.compresses and limits.geometry.due(request.num_computed)
    ]
