"""Chunks packed behind one another lose nothing: every array can be read back per request."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparsejax import SamplingParams
from sparsejax.engine.execution.packing import pack
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Chunk


@st.composite
def chunk_lists(draw):
    """Up to five chunks of requests that are fresh, or replay outputs."""
    chunks = []
    for row in range(1, draw(st.integers(0, 5)) + 1):
        prompt = draw(st.lists(st.integers(3, 99), min_size=1, max_size=12))
        outputs = draw(st.lists(st.integers(3, 99), max_size=5))
        params = SamplingParams(temperature=draw(st.sampled_from([0.0, 0.5])), max_tokens=9)
        request = Request(str(row), prompt, params, row=row, seed=row, output_token_ids=outputs)
        if draw(st.booleans()):  # outputs behind the first are not prefilled again
            request.footprint = SimpleNamespace(schedule=SimpleNamespace(changes_while_decoding=True))
        start = draw(st.integers(0, request.prefill_target - 1))
        count = draw(st.integers(1, request.prefill_target - start))
        chunks.append(Chunk(request, start, count, is_last=start + count == request.prefill_target))
    return chunks


@given(chunks=chunk_lists(), padding=st.integers(1, 9), idle=st.integers(1, 3))
def test_packed_chunks_reproduce_their_requests(chunks, padding, idle):
    live = sum(chunk.count for chunk in chunks)
    size, segments = live + padding, len(chunks) + idle
    batch = pack(chunks, size=size, segments=segments, eos_token_ids=(2,))
    assert batch.starts[0] == 0
    assert (np.diff(batch.starts) >= 0).all()
    assert (batch.starts[len(chunks) :] == live).all()
    assert batch.tokens.shape == batch.targets.shape == batch.positions.shape == (size,)
    for segment, chunk in enumerate(chunks):
        request, text = chunk.request, chunk.request.tokens
        span = slice(batch.starts[segment], batch.starts[segment + 1])
        positions = batch.positions[span]
        assert positions.tolist() == list(range(chunk.start, chunk.start + chunk.count))
        assert batch.tokens[span].tolist() == [text[p] for p in positions]
        # The token after the last one is not known while it is the one to be sampled.
        assert batch.targets[span].tolist() == [text[p + 1] if p + 1 < len(text) else 0 for p in positions]
        prompt_length = len(request.prompt_token_ids)
        assert batch.generated[span].tolist() == [p >= prompt_length for p in positions]
        assert batch.rope_lengths[span].tolist() == [p + 1 if p >= prompt_length else prompt_length for p in positions]
        assert batch.rows[segment] == request.row
        assert batch.first[segment] == (chunk.start == 0)
        assert batch.last[segment] == chunk.is_last
        replayed = chunk.is_last and request.is_replay
        known = request.output_token_ids[: 1 if request.footprint else None]
        assert batch.newest[segment] == (known[-1] if replayed else -1)
        assert batch.num_output[segment] == len(known)
        assert batch.sampling.seed[segment] == request.seed
        assert batch.sampling.temperature[segment] == np.float32(request.params.temperature)
    unused = slice(len(chunks), segments)
    assert not batch.rows[unused].any()
    assert not batch.last[unused].any()
    assert (batch.newest[unused] == -1).all()
    assert not batch.tokens[live:].any()
