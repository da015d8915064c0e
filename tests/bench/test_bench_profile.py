"""The profile's arithmetic on a trace made by hand, and the profiler itself where there is no GPU."""

import os

import jax
import jax.numpy as jnp
import pytest

from sparsejax.bench import profile as bench_profile
from sparsejax.bench.profile import format_profile, keep_command_buffers, profile, summarize
from sparsejax.errors import InvalidArgumentError

# Two streams, microseconds: 0-10 and 4-12 overlap, 13-14 follows soon after, 64-74 after a wait of 50.
EVENTS = [(1, "dot_3", 0, 10), (2, "dot_17", 4, 8), (1, "add_1_2", 13, 1), (1, "MemcpyD2H", 64, 10)]
DETAILS = "regs:16 static_shared:0 dynamic_shared:0 grid:4,1,1 block:128,1,1 occ_pct:100"


def trace_of(events, plane="/device:GPU:0"):
    lines = ""
    for stream in (1, 2):
        inner = "".join(
            f"events {{ metadata_id: {i + 1} offset_ps: {start}000000 duration_ps: {length}000000 "
            + (f'stats {{ metadata_id: 1 str_value: "{DETAILS}" }}' if "dot" in name else "")
            + " }\n"
            for i, (of, name, start, length) in enumerate(events)
            if of == stream
        )
        lines += f'lines {{ id: {stream} name: "Stream #{stream}(Compute)" timestamp_ns: 1000 {inner} }}\n'
    names = "".join(
        f'event_metadata {{ key: {i + 1} value {{ id: {i + 1} name: "{name}" }} }}\n'
        for i, (_, name, _, _) in enumerate(events)
    )
    stats = 'stat_metadata { key: 1 value { id: 1 name: "kernel_details" } }'
    text = f'planes {{ id: 1 name: "{plane}" {lines} {names} {stats} }}'
    return jax.profiler.ProfileData.from_serialized_xspace(
        jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    )


def test_busy_idle_and_kernels():
    result = summarize([trace_of(EVENTS)], calls=2, wall_seconds=1e-4)
    assert result.wall_seconds == pytest.approx(50e-6)
    assert result.span_seconds == pytest.approx(74e-6 / 2)
    assert result.busy_seconds == pytest.approx((12 + 1 + 10) * 1e-6 / 2)
    assert result.gap_seconds == pytest.approx(50e-6 / 2)  # the microsecond between kernels is no wait
    assert result.idle_share == pytest.approx(51 / 74)
    assert result.waiting_share == pytest.approx(50 / 74)
    kernels = {kernel.name: kernel for kernel in result.kernels}
    assert [kernel.name for kernel in result.kernels] == ["dot", "MemcpyD2H", "add"]
    assert kernels["dot"].seconds == pytest.approx(9e-6)
    assert kernels["dot"].launches == 1.0
    assert kernels["dot"].launch == "grid:4,1,1 block:128,1,1"
    assert kernels["MemcpyD2H"].launch == ""
    table = format_profile(result, top=1)
    assert "dot" in table
    assert "2 more kinds" in table


def test_launch_shapes_are_kept_apart():
    other = trace_of([(1, "dot_1", 0, 10)])
    result = summarize([trace_of(EVENTS), other], calls=1, wall_seconds=1.0)
    assert result.span_seconds == pytest.approx((74 + 10) * 1e-6 / 2)  # two devices count on average
    assert sum(kernel.launches for kernel in result.kernels) == pytest.approx(5 / 2)


def test_only_gpu_planes_count():
    result = summarize([trace_of(EVENTS, plane="/host:CPU")], calls=1, wall_seconds=1.0)
    assert result.kernels == ()
    assert result.idle_share is None
    assert result.waiting_share is None
    assert "no GPU" in format_profile(result)


def test_profiles_calls(tmp_path):
    numbers = []

    def call():
        numbers.append(len(numbers))
        return jnp.ones(4) + numbers[-1]

    result = profile(call, calls=3, folder=tmp_path)
    assert numbers == [0, 1, 2]
    assert result.calls == 3
    assert result.wall_seconds > 0
    assert list(tmp_path.rglob("*.xplane.pb"))
    with pytest.raises(InvalidArgumentError, match="calls"):
        profile(call, calls=0)


def test_a_jax_without_trace_reader_is_named(monkeypatch):
    monkeypatch.delattr(jax.profiler, "ProfileData")
    with pytest.raises(InvalidArgumentError, match="ProfileData"):
        profile(lambda: None, calls=1)


def test_flag_is_added_once(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    keep_command_buffers()
    keep_command_buffers()
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_force_host_platform_device_count=1",
        bench_profile.KEEP_COMMAND_BUFFERS,
    ]
