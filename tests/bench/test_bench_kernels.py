"""The kernel benchmark at tiny sizes."""

import dataclasses
import json

import jax
import pytest

from pallas_kernels import DecodeTile
from sparsejax.bench import kernels
from sparsejax.bench.ceilings import Ceilings
from sparsejax.errors import SparsejaxError

CEILINGS = Ceilings(device="test", copy=1e12, read=1e12, matmul=1e15)


def test_measures_every_case(tmp_path):
    path = tmp_path / "kernels.json"
    rows = kernels.run(None, str(path), every=kernels.tiny_cases(), ceilings=CEILINGS, repeats=2)
    assert [row.name for row in rows] == [case.name for case in kernels.tiny_cases()]
    assert all(row.wall > 0 and row.rate > 0 for row in rows)
    by_name = {row.name: row for row in rows}
    decode = by_name["decode 2 x 64, page 8, 4/2 heads"]
    needed = 2 * 64 * 2 * 2 * 16 * 2  # requests, tokens, heads, K and V, dim, bytes
    assert decode.rate * 1e9 * decode.wall / 1e3 == pytest.approx(needed)
    assert decode.fraction == pytest.approx(decode.rate / 1e3)
    yardstick = by_name["cuDNN causal tiny"]
    assert by_name["prefill tiny"].fraction == pytest.approx(by_name["prefill tiny"].rate / yardstick.rate)
    saved = json.loads(path.read_text())
    assert [row["name"] for row in saved["rows"]] == list(by_name)
    assert saved["ceilings"]["read"] == 1e12
    assert all(row.name in kernels.format_table(rows) for row in rows)


def test_a_case_brings_its_yardstick():
    rows = kernels.run(["prefill tiny"], every=kernels.tiny_cases(), ceilings=CEILINGS, repeats=1)
    assert [row.name for row in rows] == ["cuDNN causal tiny", "prefill tiny"]


def test_unknown_names_are_refused():
    with pytest.raises(SparsejaxError, match="decode_attention"):
        kernels.run(["decode_atention"], every=kernels.tiny_cases(), ceilings=CEILINGS)
    with pytest.raises(SparsejaxError, match="store_kv"):
        kernels.tune("store_kv")


def test_tuning_picks_a_candidate():
    lines = []
    candidates = [{"tile": DecodeTile(16, 2, 2)}, {"tile": DecodeTile(32, 2, 2)}]
    best = kernels.tune("decode_attention", every=kernels.tiny_cases()[:1], candidates=candidates, report=lines.append)
    assert best in candidates
    assert len(lines) == 4


def test_rates_have_the_unit_of_the_yardstick():
    rows = kernels.run(["probabilities tiny"], every=kernels.tiny_cases(), ceilings=CEILINGS, repeats=1)
    assert {row.unit for row in rows} == {"GB/s"}


def test_tuning_where_nothing_runs_says_so():
    def broken(**options):
        raise jax.errors.JaxRuntimeError("too much shared memory")

    case = dataclasses.replace(kernels.tiny_cases()[0], build=broken)
    with pytest.raises(SparsejaxError, match="none of the 2 candidates"):
        kernels.tune("decode_attention", every=[case], candidates=[{}, {}], report=lambda line: None)


def test_names_are_unique():
    names = [case.name for case in kernels.cases()]
    assert len(set(names)) == len(names)
