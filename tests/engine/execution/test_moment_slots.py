"""Slots of query moments: as many as requests that are computed at once, whoever kept one before."""

import pytest

from sparsejax.engine.execution.moment_slots import MomentSlots
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.request import Request
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.scheduling.plan import Chunk


def chunk(name: str, start: int = 0, method: str = "expected_attention") -> Chunk:
    request = Request(
        request_id=name,
        prompt_token_ids=list(range(8)),
        params=SamplingParams(),
        row=1,
        seed=0,
        compression=CompressionParams(method=method, budget_tokens=64),
    )
    return Chunk(request=request, start=start, count=4, is_last=start > 0)


def test_a_slot_is_kept_until_it_is_taken_back():
    slots = MomentSlots(2)
    slots.give([chunk("a"), chunk("other", method="snapkv")])
    slots.give([chunk("a", start=4), chunk("b")])
    assert sorted(slots.values()) == [1, 2]
    slots.take_back("a")
    assert list(slots) == ["b"]


@pytest.mark.parametrize("name", ["a", "b"], ids=["the same again", "another"])
def test_who_was_never_compressed_leaves_the_slot_to_who_begins(name):
    slots = MomentSlots(1)
    slots.give([chunk("a")])
    slots.give([chunk(name)])
    assert dict(slots) == {name: 1}
