"""Moments of the queries of a packed chunk, segment by segment, against sums in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.engine.programs import recording
from sparsejax.engine.programs.recording import ChunkRecord, add_moments


def chunk_record(**changes):
    nothing = np.zeros(4, np.int32)
    return ChunkRecord(
        **{
            "first": nothing, "power": nothing, "blocks": nothing > 0, "moment_slot": nothing,
            "moment_first": nothing, "fresh": nothing > 0, "decode_power": nothing,
        }
        | changes
    )  # fmt: skip


@pytest.mark.parametrize("block", [4, 8, 128])
def test_every_segment_adds_to_its_own_slot(block, monkeypatch):
    monkeypatch.setattr(recording, "MOMENT_BLOCK", block)
    tokens, heads, dim, layer = 30, 2, 3, 1
    starts = np.array([0, 9, 9, 22, 27], np.int32)  # the second segment is empty, the last three tokens are padding
    slot, first = np.array([3, 2, 0, 1], np.int32), np.array([4, 9, 9, 22], np.int32)  # the third records nothing
    rng = np.random.default_rng(0)
    q = rng.standard_normal((tokens, heads, dim)).astype(np.float32)
    moments = rng.standard_normal((2, 5, heads, dim + 1, dim)).astype(np.float32)
    segment = np.searchsorted(starts, np.arange(tokens), side="right").astype(np.int32) - 1
    got = jax.jit(lambda *args: add_moments(args[0], layer, *args[1:]))(
        jnp.asarray(moments),
        # Padding may hold anything.
        jnp.asarray(q).at[27:].set(jnp.nan),
        chunk_record(moment_slot=slot, moment_first=first),
        jnp.asarray(starts),
        jnp.asarray(segment),
    )
    expected = moments.copy()
    for s in range(4):
        if slot[s]:
            own = q[max(first[s], starts[s]) : starts[s + 1]]
            expected[layer, slot[s], :, :-1] += np.einsum("thi,thj->hij", own, own)
            expected[layer, slot[s], :, -1] += own.sum(0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
