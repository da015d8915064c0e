"""Host side of a prefill step: the scheduler's chunks -> one padded batch of arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparsejax.engine.execution.selection_plan import Selections
from sparsejax.engine.programs.recording import chunk_record
from sparsejax.engine.programs.sampling import to_rows
from sparsejax.engine.programs.state import PrefillBatch, StoreState
from sparsejax.engine.requests.request import Request
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.scheduling.plan import Chunk
from sparsejax.methods import DeltaKV
from sparsejax.methods.selection import ALL_TOKENS

IDLE = SamplingParams(temperature=0.0)  # parameters of segments that hold no request


def pack(
    chunks: Sequence[Chunk],
    *,
    size: int,
    segments: int,
    eos_token_ids: tuple[int, ...],
    moment_slots: Mapping[str, int] | None = None,
    stores: bool = False,
    selections: Selections | None = None,
) -> PrefillBatch:
    """Packs the chunks' tokens behind one another (numpy).

    Args:
      chunks: at most `segments` chunks of at most `size` tokens together; chunk i becomes segment i.
      size: T, the padded number of tokens.
      segments: S, the padded number of segments.
      eos_token_ids: tokens that `min_tokens` holds back.
      moment_slots: where the query moments of requests go, by request id; None: the cache cannot evict.
      stores: requests can be stored compressed.
      selections: the roles of requests that select; None: all read everything.
    """
    requests = [chunk.request for chunk in chunks]
    tokens, targets, positions, rope_lengths = (np.zeros(size, np.int32) for _ in range(4))
    generated = np.zeros(size, bool)
    rows, num_output = np.zeros(segments, np.int32), np.zeros(segments, np.int32)
    newest = np.full(segments, -1, np.int32)
    starts = np.zeros(segments + 1, np.int32)
    first, last = np.zeros(segments, bool), np.zeros(segments, bool)
    at = 0
    for i, chunk in enumerate(chunks):
        request, stop = chunk.request, chunk.start + chunk.count
        assert request.row is not None, "the scheduler gives a row with the first chunk"
        text, span = request.tokens, slice(at, at + chunk.count)
        position = np.arange(chunk.start, stop, dtype=np.int32)
        prompt_length = len(request.prompt_token_ids)
        tokens[span] = text[chunk.start : stop]
        targets[span] = (*text[chunk.start + 1 : stop], text[stop] if stop < len(text) else 0)
        positions[span] = position
        rope_lengths[span] = np.maximum(position + 1, prompt_length)
        generated[span] = position >= prompt_length
        rows[i], first[i], last[i] = request.row, chunk.is_first, chunk.is_last
        num_output[i] = request.num_prefilled_outputs
        if chunk.is_last and request.is_replay:
            newest[i] = text[request.prefill_target]
        at += chunk.count
        starts[i + 1] = at
    starts[len(chunks) + 1 :] = at
    idle = segments - len(chunks)
    sampling = to_rows(
        [request.params for request in requests] + [IDLE] * idle,
        eos_token_ids,
        [request.seed for request in requests] + [0] * idle,
    )
    return PrefillBatch(
        tokens=tokens,
        targets=targets,
        positions=positions,
        rope_lengths=rope_lengths,
        generated=generated,
        rows=rows,
        starts=starts,
        first=first,
        last=last,
        newest=newest,
        num_output=num_output,
        sampling=sampling,
        record=None if moment_slots is None else chunk_record(chunks, starts, moment_slots),
        store=_stored(requests, segments) if stores else None,
        select=None if selections is None else selections.of_chunks(chunks, segments),
    )


def _stored(requests: Sequence[Request], segments: int) -> StoreState:
    """How each request's row is stored; that of idle segments, dense."""
    store = StoreState(np.zeros(segments, bool), np.zeros(segments, np.int32), np.zeros(segments, np.float32))
    for i, request in enumerate(requests):
        method = request.compression.policy
        if isinstance(method, DeltaKV):
            store.compressed[i] = True
            if isinstance(method.top_tokens, int):
                store.top_tokens[i] = min(method.top_tokens, ALL_TOKENS)
            else:
                store.top_fraction[i] = method.top_tokens
    return store
