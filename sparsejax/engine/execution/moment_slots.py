"""Who has which slot for the moments of its queries, from when its prompt begins until it is compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sparsejax.engine.programs.recording import recording_for
from sparsejax.engine.scheduling.plan import Chunk


class MomentSlots(Mapping[str, int]):
    """Slots 1 to `number` by request id; slot 0 is nobody's."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._slots: dict[str, int] = {}

    def __getitem__(self, request_id: str) -> int:
        return self._slots[request_id]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def give(self, chunks: Sequence[Chunk]) -> None:
        """Gives requests that begin with these chunks, and record moments, a slot each."""
        beginning = [
            chunk.request for chunk in chunks if chunk.start == 0 and recording_for(chunk.request.compression).moments
        ]
        if not beginning:
            return
        # What was preempted, cancelled or not over its budget has not come to be compressed, and kept its slot.
        going_on = {chunk.request.request_id for chunk in chunks} - {request.request_id for request in beginning}
        self._slots = {name: slot for name, slot in self._slots.items() if name in going_on}
        free = set(range(1, self._number + 1)) - set(self._slots.values())
        for request in beginning:
            self._slots[request.request_id] = free.pop()

    def take_back(self, request_id: str) -> None:
        """Takes the slot of a request that has been compressed, if it has one."""
        self._slots.pop(request_id, None)
