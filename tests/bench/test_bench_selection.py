"""The latency benchmark of methods that select, at a tiny size: what it counts, and what the command line writes."""

import json

import pytest
from tiny_config import RAW

from sparsejax.bench.ceilings import Ceilings
from sparsejax.cli import main

SLOT = 2 * 2 * 8 * 4  # bytes of a token's K and V in one layer: KV heads, head_dim, float32
WEIGHTS = 4 * (2 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48) + 5 * 32 + 64 * 32)  # all but the embedding


@pytest.fixture
def quick_ceilings(monkeypatch):
    ceilings = Ceilings(device="test", copy=1e12, read=1e12, matmul=1e15)
    monkeypatch.setattr("sparsejax.bench.ceilings.measure", lambda: ceilings)


def test_command_line(tmp_path, quick_ceilings, capsys):
    config, report = tmp_path / "config.json", tmp_path / "a.json"
    config.write_text(json.dumps(RAW))
    command = ["bench", "latency", "--random-weights", str(config), "--shapes", "2x24", "--steps", "2", "--chunk", "32"]
    command += ["--method", "omnikv", "--full-attention-layers", "0", "--top-tokens", "5", "--sink-tokens", "2"]
    command += ["--recent-tokens", "3", "--compare-dense", "--json", str(report)]
    assert main(command) == 0
    data = json.loads(report.read_text())
    (row,) = data["rows"]
    assert (data["kind"], row["method"], row["batch"], row["context"]) == ("latency", "omnikv", 2, 24)
    # One layer reads the whole text, the other 2 + 5 + 3 tokens of it.
    length = 2 * row["read_tokens"] - 10
    assert 24 < length < 24 + 40
    assert row["bytes_read"] == pytest.approx(WEIGHTS + 2 * (length + 10) * SLOT)
    assert row["step_fraction"] == pytest.approx(row["bytes_read"] / 1e12 / row["step_seconds"])
    assert row["relative"] == pytest.approx(row["step_seconds"] / row["dense"]["step_seconds"])
    assert row["relative_limit"] == pytest.approx(row["bytes_read"] / row["dense"]["bytes_read"])
    assert "omnikv" in capsys.readouterr().out


def test_what_is_measured_apart_is_not_mixed(capsys):
    assert main(["bench", "latency", "--method", "omnikv,snapkv", "--keep-fraction", "0.5"]) == 1
    assert "keeps everything; it takes no keep_fraction" in capsys.readouterr().err
    assert main(["bench", "latency", "--method", "quest,full"]) == 1
    assert "measure them apart" in capsys.readouterr().err
