"""Where the recorded queries stand: the closed form against each position, and the engine's schedule."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import CompressionParams
from sparsejax.engine.requests.compression_schedule import CompressionSchedule
from sparsejax.methods import ObservedQueries


@st.composite
def schedules(draw):
    prompt = draw(st.integers(1, 60))
    params = CompressionParams(
        method="kv_compress", budget_tokens=30, window_tokens=draw(st.integers(0, 30)), interval_tokens=2,
        full_range=draw(st.booleans()), context_tokens=draw(st.none() | st.integers(1, 70)),
    )  # fmt: skip
    schedule = CompressionSchedule(params, prompt)
    return schedule.with_stride(draw(st.integers(1, 40))) if draw(st.booleans()) else schedule


def observed_positions(schedule: CompressionSchedule, length: int) -> list[bool]:
    """Of each position, one by one: the last queries before the place that it is recorded for, or a decoded token."""
    found = []
    for position in range(length):
        place = schedule.recorded_for(position) if position < schedule.prompt_length else None
        if position >= schedule.prompt_length:
            found.append(True)
        else:
            found.append(place is not None and position >= schedule.params.record_from(place))
    return found


@settings(max_examples=150, deadline=None)
@given(schedules(), st.integers(0, 9))
def test_counts_are_those_of_the_positions(schedule, decoded):
    ends = [*schedule.places, schedule.prompt_length + decoded]
    observed = ObservedQueries(
        *(np.array([value], np.int32) for value in (
            schedule.stride or schedule.context, schedule.observed_width, schedule.context, schedule.prompt_length,
        ))
    )  # fmt: skip
    flags = observed_positions(schedule, ends[-1])
    position = jnp.arange(ends[-1] + 3)[None, None]
    for end in ends:
        here = np.array(flags[:end])
        assert schedule.recorded(end) == here.sum()
        behind = np.asarray(observed.behind(position, jnp.array([end])))[0, 0]
        np.testing.assert_array_equal(behind[:end], [here[at:].sum() for at in range(end)])
        assert not behind[end:].any()
