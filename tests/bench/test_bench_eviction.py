"""Benchmarks of eviction at a tiny size: what is counted adds up, and the command line writes what it measured."""

import argparse
import importlib.util
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_config import RAW

from sparsejax import LLM
from sparsejax.bench import fragmentation, latency, throughput, traces
from sparsejax.bench.ceilings import Ceilings
from sparsejax.bench.compare import compare
from sparsejax.bench.fragmentation import Workload
from sparsejax.cli import main
from sparsejax.cli.compression_options import add_compression_options, compression_from
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.errors import InvalidArgumentError, UnknownArgumentError
from sparsejax.models import ModelConfig, init_params

PLOTS = importlib.util.find_spec("matplotlib") is not None
PAGE = 4
TABLES = 2 * 2
TOKEN = 2 * TABLES * 8 * 4  # bytes of a token's K and V in all layers and heads, float32
BUDGET = 16


@pytest.fixture(scope="module")
def llm():
    return LLM.from_params(
        ModelConfig.from_hf(RAW),
        init_params(ModelConfig.from_hf(RAW), jax.random.key(0), jnp.float32),
        max_num_seqs=2,
        max_num_batched_tokens=64,
        page_size=PAGE,
        num_pages=2 * TABLES * 17,
        max_model_len=60,
        methods=("random",),
        enable_prefix_caching=False,
    )


@pytest.fixture(scope="module")
def steady(llm):
    return {
        strategy: fragmentation.steady(llm, strategy, BUDGET, rows=2, steps=24, method="random", use_tqdm=False)
        for strategy in fragmentation.STRATEGIES
    }


def test_lengths_are_the_experiments():
    trace = Workload().trace(1000, seed=3)
    inputs = np.array([request.input_tokens for request in trace.requests])
    outputs = np.array([request.output_tokens for request in trace.requests])
    assert inputs.mean() == pytest.approx(225, abs=1)
    assert outputs.mean() == pytest.approx(209, abs=4)  # a few are cut short by the longest text
    assert inputs.min() >= 4
    assert inputs.max() <= 1024
    assert (inputs + outputs).max() <= 2048
    assert np.median(inputs) < inputs.mean()
    assert trace == Workload().trace(1000, seed=3)
    assert trace != Workload().trace(1000, seed=4)


def test_one_in_one_out_holds_what_copying_holds_and_copies_nothing(steady):
    # Every table attends to budget + 1 tokens, in the fewest pages: holes are refilled at once.
    least = 1 - (BUDGET + 1) / (PAGE * math.ceil((BUDGET + 1) / PAGE))
    assert steady["sparse_copy"].p99 == pytest.approx(least)
    assert steady["reuse"].p99 == pytest.approx(least)
    assert steady["reuse"].copied_bytes == 0
    assert steady["sparse_copy"].copied_bytes > 0
    assert all(each.steps >= 20 for each in steady.values())


def test_dead_slots_count_as_empty(steady):
    assert steady["reuse"].mean < steady["free_block"].mean < steady["no_op"].mean
    assert steady["free_block"].copied_bytes == steady["no_op"].copied_bytes == 0
    # At the end, no_op holds all that ever came: budget + 24 - 1 tokens a table, of which budget + 1 are live.
    held = PAGE * math.ceil((BUDGET + 23) / PAGE)
    assert steady["no_op"].p99 == pytest.approx(1 - (BUDGET + 1) / held, abs=0.03)


def test_dense_requests_waste_the_rest_of_their_last_page(llm):
    result = fragmentation.run(llm, traces.uniform(1, 9, 4), fragmentation.DENSE, warm=False, use_tqdm=False)
    assert len(result.fragmentation) == 3
    assert set(result.fragmentation) <= {1 - held / (PAGE * math.ceil(held / PAGE)) for held in (9, 10, 11, 12)}
    assert (result.copied_bytes, result.preemptions, result.budget) == (0.0, 0, None)
    assert llm.engine.eviction_observer is None


def test_strategies_and_budgets_are_checked(llm):
    trace = traces.uniform(1, 9, 4)
    with pytest.raises(InvalidArgumentError, match="free_block"):
        fragmentation.run(llm, trace, "freeblock", 8)
    with pytest.raises(InvalidArgumentError, match="budget"):
        fragmentation.run(llm, trace, "reuse")
    with pytest.raises(InvalidArgumentError, match="budget"):
        fragmentation.run(llm, trace, fragmentation.DENSE, 8)


def test_throughput_counts_what_was_compressed(llm):
    params = CompressionParams(method="random", budget_tokens=8, compress_once=True)
    served = throughput.serve(llm, traces.uniform(3, 40, 6), params, use_tqdm=False)
    assert (served.method, served.compressions) == ("random", 3)
    assert served.kv_bytes_before == 3 * 40 * TOKEN
    assert served.kv_bytes_after == 3 * 8 * TOKEN
    assert "random: 3 compressions" in throughput.format_report(served)
    assert not llm.engine.has_unfinished
    with pytest.raises(InvalidArgumentError, match=r"request 0 .*allow 60 together"):
        throughput.serve(llm, traces.uniform(1, 40, 21), params, use_tqdm=False)


def test_options_of_the_command_line():
    parser = argparse.ArgumentParser()
    add_compression_options(parser)

    def parsed(*arguments, **overrides):
        return compression_from(parser.parse_args(arguments), **overrides)

    assert parsed() == CompressionParams()
    assert parsed(
        *("--method", "snapkv", "--budget-tokens", "64", "--window-tokens", "8"),
        *("--budget-rule", "adaptive", "--budget-floor", "0.3", "--option", "pooling=avg"),
    ) == CompressionParams(
        method="snapkv", budget_tokens=64, window_tokens=8, budget_rule="adaptive", budget_floor=0.3, pooling="avg"
    )
    once = parsed("--method", "h2o", "--keep-fraction", "0.5", "--compress-once")
    assert once == CompressionParams(method="h2o", keep_fraction=0.5, compress_once=True)
    assert parsed("--method", "a,b", "--keep-fraction", "0.5", method="keydiff").method == "keydiff"
    with pytest.raises(InvalidArgumentError, match="NAME=VALUE"):
        parsed("--method", "snapkv", "--keep-fraction", "0.5", "--option", "pooling")
    with pytest.raises(UnknownArgumentError, match="pooling"):
        parsed("--method", "snapkv", "--keep-fraction", "0.5", "--option", "poolin=avg")
    with pytest.raises(InvalidArgumentError, match="keeps everything"):
        parsed("--budget-tokens", "64")


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sparsejax.bench.ceilings.measure", lambda: Ceilings(device="test", copy=1e12, read=1e12, matmul=1e15)
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RAW))
    return path


def test_latency_of_compressed_prompts(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # --profile adds to it: undone after the test
    report, figure = tmp_path / "a.json", tmp_path / "a.png"
    command = ["bench", "latency", "--random-weights", str(config), "--shapes", "2x48", "--steps", "4", "--chunk", "64"]
    command += ["--method", "snapkv", "--budget-tokens", "16", "--window-tokens", "8", "--page-size", str(PAGE)]
    command += ["--pool-gib", str(2 * 128 * TOKEN / 2**30), "--compare-dense", "20", "--prefills", "1", "--profile"]
    assert main([*command, "--json", str(report), *(["--plot", str(figure)] if PLOTS else [])]) == 0
    assert figure.exists() == PLOTS
    data = json.loads(report.read_text())
    (row,) = data["rows"]
    dense = row["dense"]
    assert (row["method"], row["batch"], row["context"], dense["context"]) == ("snapkv", 2, 48, 20)
    # The budget, and what was decoded behind it until the timed steps' middle.
    assert 16 < row["kept_tokens"] < 16 + 20
    assert row["kept_bytes"] == pytest.approx(row["kept_tokens"] * 2 * TOKEN)
    weights = row["bytes_read"] - row["kept_bytes"]
    assert dense["bytes_read"] - weights > 2 * 20 * TOKEN
    assert row["step_fraction"] == pytest.approx(row["bytes_read"] / 1e12 / row["step_seconds"])
    assert row["speedup"] == pytest.approx(dense["step_seconds"] / row["step_seconds"])
    assert row["added_share"] == pytest.approx(row["prompt_seconds"] / dense["prompt_seconds"] - 1)
    assert row["compress_seconds"] > 0
    assert row["profile"]["calls"] == latency.PROFILED_STEPS
    assert all(each.ratio == 1 for each in compare(report, report).found if each.a)
    assert "snapkv" in capsys.readouterr().out


def test_nothing_is_compiled_while_strategies_are_served(llm):
    trace = Workload(mean_input=14, mean_output=13, longest_input=32, longest=60).trace(5)
    fragmentation.run(llm, trace, fragmentation.DENSE, use_tqdm=False)
    for strategy in ("reuse", "sparse_copy"):
        result = fragmentation.run(llm, trace, strategy, BUDGET, method="random", use_tqdm=False)
        again = fragmentation.steady(llm, strategy, BUDGET, rows=2, steps=24, method="random", use_tqdm=False)
        assert result.programs_compiled == 0
        assert again.steps > 0


def test_fragmentation_on_the_command_line(config, tmp_path, capsys):
    report, figure = tmp_path / "a.json", tmp_path / "a.png"
    command = ["bench", "fragmentation", "--random-weights", str(config), "--quick", "--no-warmup", "--chunk", "64"]
    command += ["--budgets", "256", "--strategies", "reuse", "--page-size", str(PAGE), "--num-pages", "600"]
    command += ["--max-num-seqs", "2", "--steady-rows", "1"]
    assert main([*command, "--json", str(report), *(["--plot", str(figure)] if PLOTS else [])]) == 0
    assert figure.exists() == PLOTS
    data = json.loads(report.read_text())
    assert [(row["strategy"], row["budget"]) for row in data["rows"]] == [("dense", None), ("reuse", 16)]
    assert [row["budget"] for row in data["steady"]] == [16]
    for row in data["rows"]:
        assert 0 <= row["mean"] <= row["p99"] <= 1
        assert len(row["seconds"]) == len(row["fragmentation"]) <= row["steps"]
    assert all(each.a == each.b for each in compare(report, report).found)
    assert "reuse" in capsys.readouterr().out


def test_command_line_errors(config, capsys):
    base = ["--random-weights", str(config)]

    def refused(*command):
        assert main([*command, *base]) == 1
        return capsys.readouterr().err

    assert "exactly one" in refused("bench", "latency", "--method", "snapkv")
    assert "--compare-dense" in refused("bench", "latency", "--compare-dense")
    assert "snapkv" in refused("bench", "latency", "--method", "snpkv", "--budget-tokens", "64")
    assert "strategy" in refused("bench", "fragmentation", "--strategies", "reuze")
    assert "--pool-gib" in refused("bench", "throughput", "--trace", "1x8x8", "--pool-gib", "1", "--num-pages", "64")
