"""The latency benchmark at a tiny size: its counts of bytes and work, and what the command line writes."""

import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import pytest
import tiny_config

from sparsejax import LLM
from sparsejax.bench import latency
from sparsejax.bench.ceilings import Ceilings
from sparsejax.cli import main
from sparsejax.models import ModelConfig, init_params

PLOTS = importlib.util.find_spec("matplotlib") is not None
RAW = {**tiny_config.RAW, "max_position_embeddings": 48}
SLOT = 2 * 2 * 2 * 8 * 4  # bytes of a token's K and V: layers, KV heads, head_dim, float32
PROJECTIONS = 2 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48)


@pytest.fixture
def quick_ceilings(monkeypatch):
    ceilings = Ceilings(device="test", copy=1e12, read=1e12, matmul=1e15)
    monkeypatch.setattr("sparsejax.bench.ceilings.measure", lambda: ceilings)
    return ceilings


def test_weights_and_work_of_a_model():
    config = ModelConfig.from_hf(RAW)
    params = init_params(config, jax.random.key(0), jnp.float32)
    norms = 5 * 32
    assert latency.weight_bytes_read(config, params) == 4 * (
        PROJECTIONS + norms + 64 * 32
    )  # lm_head, not the embedding
    attention = 2 * 10 * 10 * 4 * 8 * 2
    assert latency.prefill_flops(config, params, 10) == 2 * 10 * (PROJECTIONS + norms) + attention


def test_command_line(tmp_path, quick_ceilings, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # --profile adds to it: undone after the test
    config, report, figure = (tmp_path / name for name in ("config.json", "a.json", "a.png"))
    config.write_text(json.dumps(RAW))
    command = ["bench", "latency", "--random-weights", str(config), "--shapes", "2x20", "--steps", "4", "--profile"]
    command += ["--chunk", "32", "--json", str(report)]
    command += ["--plot", str(figure)] if PLOTS else []
    assert main(command) == 0
    assert figure.exists() == PLOTS
    data = json.loads(report.read_text())
    (row,) = data["rows"]
    assert data["kind"] == "latency"
    assert data["ceilings"]["read"] == quick_ceilings.read
    assert (row["batch"], row["context"]) == (2, 20)
    assert 0 < row["host_seconds"] <= row["step_seconds"]
    assert row["step_fraction"] == pytest.approx(row["bytes_read"] / 1e12 / row["step_seconds"])
    assert row["prefill_rate"] == pytest.approx(40 / row["prefill_seconds"])
    kv = row["bytes_read"] - 4 * (PROJECTIONS + 5 * 32 + 64 * 32)
    assert kv % SLOT == 0
    assert 40 < kv // SLOT < 40 + 2 * 30
    assert row["profile"]["calls"] == latency.PROFILED_STEPS
    if jax.default_backend() == "cpu":
        assert row["idle_share"] is None
        assert "no GPU kernels" in capsys.readouterr().out


@pytest.mark.parametrize(("batch", "context"), [(5, 13), (3, 20), (33, 3)])
def test_nothing_is_compiled_in_the_prefill_that_is_timed(quick_ceilings, monkeypatch, batch, context):
    runs, run_batch = [], latency.run_batch

    def watched(llm, prompts, **options):
        before = llm.engine.runner.compilations
        result = run_batch(llm, prompts, **options)
        runs.append((result.first_tokens, llm.engine.runner.compilations - before, options["steps"]))
        return result

    monkeypatch.setattr(latency, "run_batch", watched)
    config = ModelConfig.from_hf({**RAW, "intermediate_size": 40 + 8 * batch})  # its steps are compiled here first
    params = init_params(config, jax.random.key(0), jnp.float32)
    engine = {"max_num_seqs": batch, "max_num_batched_tokens": 16, "max_model_len": 48, "num_pages": 999}
    llm = LLM.from_params(config, params, **engine)
    row = latency.measure(llm, quick_ceilings, batch=batch, context=context, steps=1)
    timed = [run for run in runs if run[2] == 0][-1]
    assert timed[0] == row.prefill_seconds
    assert not timed[1]


def test_bad_shapes_are_refused_before_anything_is_measured(capsys):
    assert main(["bench", "latency", "--shapes", "4"]) == 1
    assert "batch x context" in capsys.readouterr().err
    assert main(["bench", "latency", "--steps", "0"]) == 1
    assert "--steps" in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "latency", "--plot", str(tmp_path / "a.png")]) == 1
    assert "sparsejax[eval]" in capsys.readouterr().err


def test_unknown_kernels_are_refused(capsys):
    assert main(["bench", "kernels", "decode_atention"]) == 1
    assert "decode_attention" in capsys.readouterr().err
    assert main(["bench", "kernels", "--tune", "store_kv"]) == 1
    assert "store_kv" in capsys.readouterr().err
