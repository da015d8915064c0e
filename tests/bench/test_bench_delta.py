"""The latency benchmark of compressed requests at a tiny size, through the command line."""

from __future__ import annotations

import json

import pytest
import tiny_config

from sparsejax.bench.ceilings import Ceilings
from sparsejax.cli import main

RAW = {**tiny_config.RAW, "max_position_embeddings": 48}


def test_it_reports_times_limits_and_measured_bytes(tmp_path, monkeypatch, capsys):
    ceilings = Ceilings(device="test", copy=1e12, read=1e12, matmul=1e15)
    monkeypatch.setattr("sparsejax.bench.ceilings.measure", lambda: ceilings)
    config, report = tmp_path / "config.json", tmp_path / "report.json"
    config.write_text(json.dumps(RAW))
    sizes = "--shapes 1x60 --steps 3 --chunk 32 --page-size 4 --num-pages 2000 --prefills 1"
    store = "--kv-compressed-size 8 --cluster-ratio 0.25 --engine-recent-tokens 4 --full-attention-layers 0"
    command = f"bench latency --method deltakv --top-tokens 8 --random-weights {config} {sizes} {store} --json {report}"
    assert main(command.split()) == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert "float32 x 8" in capsys.readouterr().out
    assert row["added_share"] is None
    assert 0.5 < row["kv_share"] < 0.9
    # Weights, an up-projection with its bias, and of the cache at least one of two layers and no more than both.
    cache = row["bytes_read"] - 4 * 17_568 - 4 * (8 * 32 + 32)
    layer = 2 * 2 * 8 * 4 * 60
    assert layer < cache < 2.5 * layer
    assert row["step_fraction"] == pytest.approx(row["bytes_read"] / 1e12 / row["step_seconds"])


def test_a_trace_is_served_and_its_compressions_are_counted(tmp_path, capsys):
    config, report = tmp_path / "config.json", tmp_path / "report.json"
    config.write_text(json.dumps(RAW))
    trace = tmp_path / "trace.jsonl"  # of prompts that share tokens, which compressed rows cannot
    trace.write_text('{"input_tokens": 40, "output_tokens": 6, "shared_tokens": 8}\n' * 2)
    sizes = f"--trace {trace} --chunk 32 --page-size 4 --num-pages 400 --max-num-seqs 1"
    store = "--kv-compressed-size 8 --cluster-ratio 0.25 --engine-recent-tokens 4 --full-attention-layers 0"
    command = f"bench throughput --method deltakv --top-tokens 8 --random-weights {config} {sizes} {store}"
    assert main([*command.split(), "--json", str(report)]) == 0
    served = json.loads(report.read_text())
    assert (served["method"], served["requests"], served["output_tokens"]) == ("deltakv", 2, 12)
    # Cells of 16 tokens, 16 sinks and 4 to 7 recent ones: the chunks to 32 and to 40 compress; in decoding the ring is
    # full when the text has 44 tokens.
    assert served["compressions"] == 2 * 3
    assert served["compression_seconds"] > 0
    assert served["programs_compiled"] == 0
    assert served["kv_bytes_before"] == 0
    assert "deltakv: 6 compressions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("latency --method deltakv --compare-dense 64", "takes no N"),
        ("latency --method deltakv --budget-tokens 9", "takes no budget_tokens"),
        ("latency --latent-dtype int4", "--latent-dtype is for --method deltakv"),
        ("throughput --method omnikv --neighbors 2", "--neighbors is for --method deltakv"),
        ("throughput --method deltakv --compressor FOLDER --neighbors 2", "--neighbors has no meaning"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message, capsys):
    assert main(f"bench {options}".split()) != 0
    assert message in capsys.readouterr().err
