"""Comparing results: rows and metrics are matched by name, and what cannot be compared is refused."""

import json

import pytest

from sparsejax.bench.compare import compare, format_comparison
from sparsejax.errors import InvalidArgumentError


@pytest.fixture
def files(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.write_text(json.dumps(data))
        return path

    return write


def latency(**rows):
    return {
        "kind": "latency",
        "ceilings": {"read": 1.0},
        "rows": [
            {"batch": 1, "context": int(name[1:]), "step_seconds": seconds, "step_fraction": 0.5, "idle_share": None}
            | {"profile": {"wall_seconds": 9.0}}
            for name, seconds in rows.items()
        ],
    }


def throughput(trace, rate, ttft):
    return {"kind": "throughput", "trace": trace, "output_rate": rate, "ttft": {"mean": ttft, "p99": 2 * ttft}} | {
        "compilations": {"decode": 0},
        "records": [{"ttft": 1.0}],
        "timeline": {"seconds": [1.0]},
    }


def test_latency_rows_are_matched_by_shape(files):
    compared = compare(files("a", latency(c64=2.0, c128=4.0)), files("b", latency(c128=3.0, c256=1.0)))
    found = compared.found
    assert compared.notes == ["only in A: 1 x 64", "only in B: 1 x 256"]
    assert [(each.row, each.metric) for each in found] == [("1 x 128", "step_seconds"), ("1 x 128", "step_fraction")]
    assert found[0].ratio == 0.75
    assert found[0].verdict == "better"
    assert found[1].verdict == ""


def test_throughput_with_distributions(files):
    compared = compare(files("a", throughput("mix600", 100.0, 1.0)), files("b", throughput("mix600", 80.0, 1.0)))
    found = compared.found
    assert not compared.notes
    verdicts = {each.metric: each.verdict for each in found}
    assert verdicts == {"output_rate": "worse", "ttft.mean": "", "ttft.p99": "", "compilations.decode": ""}
    ratios = {each.metric: each.ratio for each in found}
    assert ratios["output_rate"] == 0.8
    assert ratios["compilations.decode"] is None
    table = format_comparison(compared, "a.json", "b.json")
    assert "a.json" in table
    assert "0.800  worse" in table


def test_what_was_compiled_or_measured_in_one_file_only(files):
    a, b = throughput("mix600", 100.0, 1.0), throughput("mix600", 100.0, 1.0)
    a |= {"compilations": {}, "model": "tiny", "device": "one", "itl_prefill": {"p99": 1.0}, "kept": 1.0}
    b |= {"compilations": {"evict": 1}, "model": "tiny", "device": "another", "itl_prefill": {"p99": 3.0}}
    compared = compare(files("a", a), files("b", b))
    verdicts = {each.metric: each.verdict for each in compared.found if each.verdict}
    assert verdicts == {"compilations.evict": "worse", "itl_prefill.p99": "worse"}
    assert compared.notes == ["device: one and another", "mix600: only in A: kept"]
    assert "device: one and another" in format_comparison(compared)


def test_what_was_asked_for_and_the_card_are_compared_too(files):
    def result(read, **asked):
        row = {"batch": 1, "context": 64, "method": "snapkv", "compression": "a quarter", "step_seconds": 1.0} | asked
        return {"kind": "latency", "ceilings": {"device": "one", "read": read}, "rows": [row, row]}

    compared = compare(files("a", result(4e12)), files("b", result(2e12, compression="a half")))
    assert compared.notes == [
        "ceilings (TB/s, TFLOP/s): read 4 and read 2",
        "1 x 64 snapkv: compression a quarter and a half",
        "1 x 64 snapkv (2): compression a quarter and a half",
    ]
    assert [each.row for each in compared.found] == ["1 x 64 snapkv", "1 x 64 snapkv (2)"]


def test_fragmentation_is_better_when_it_is_less(files):
    def result(method, mean):
        row = {"strategy": "reuse", "budget": 16, "mean": mean}
        return {"kind": "fragmentation", "method": method, "page_size": 16, "rows": [row]}

    compared = compare(files("a", result("h2o", 0.1)), files("b", result("random", 0.5)))
    assert [each.verdict for each in compared.found] == ["", "worse"]
    assert compared.notes == ["method: h2o and random"]


def test_starts_are_compared(files):
    start = {"kind": "startup", "model": "tiny", "seconds": 60.0, "pool_share": 0.8, "programs": 30}
    found = compare(files("a", start), files("b", start | {"seconds": 18.0, "pool_share": 0.7})).found
    assert [(each.metric, each.verdict) for each in found] == [
        ("seconds", "better"), ("pool_share", "worse"), ("programs", "")
    ]  # fmt: skip


def test_kernels_by_name(files):
    rows = [{"name": "decode x", "kernel": "decode_attention", "wall": 2.0, "unit": "GB/s", "by_kernel": {"k": 1.0}}]
    found = compare(files("a", {"kind": "kernels", "rows": rows}), files("b", {"kind": "kernels", "rows": rows})).found
    assert [(each.row, each.metric, each.ratio) for each in found] == [("decode x", "wall", 1.0)]


def test_what_cannot_be_compared(files):
    a = files("a", latency(c64=2.0))
    with pytest.raises(InvalidArgumentError, match=r"latency.*throughput"):
        compare(a, files("b", throughput("mix600", 1.0, 1.0)))
    with pytest.raises(InvalidArgumentError, match="nothing in common: 1 x 64 and 1 x 128"):
        compare(a, files("c", latency(c128=2.0)))
    with pytest.raises(InvalidArgumentError, match="not a result"):
        compare(a, files("d", [1, 2]))
    with pytest.raises(InvalidArgumentError, match="not a result"):
        compare(a, files("e", {"kind": "lateness"}))
    for broken in ({"kind": "latency", "rows": [{}]}, {"kind": "latency", "rows": [1]}, {"kind": "throughput"}):
        with pytest.raises(InvalidArgumentError, match="no whole result"):
            compare(a, files("g", broken))
    text = files("f", {})
    text.write_text("{")
    with pytest.raises(InvalidArgumentError, match="not JSON"):
        compare(a, text)
