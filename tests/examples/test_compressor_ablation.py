"""The ablation of compressors: what it varies, and that it makes, serves and scores one."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from sparsejax.cli import main
from train import tiny_corpus

EXAMPLE = Path(__file__).parents[2] / "examples" / "compressor_ablation.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("compressor_ablation", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_one_option_varies_at_a_time(example):
    base = example.Sizes(4, 64, 0.1)
    found = example.variants(base, {"neighbors": [1, 4], "ratio": [0.05]})
    assert found == [base, example.Sizes(1, 64, 0.1), example.Sizes(4, 64, 0.05)]
    assert str(base) == "K=4 size=64 ratio=0.1"


def test_a_compressor_is_made_and_scored(example, tmp_path):
    tiny_corpus.main([str(tmp_path / "corpus.jsonl"), "--documents", "8", "--length", "256"])
    packing = ["pack-data", str(tmp_path / "corpus.jsonl"), str(tmp_path / "packed"), "--length", "256", "--no-wrap"]
    assert main(packing) == 0
    sizes = "--neighbors 4 --sizes 64 --ratios 0.1 --latent-dtypes int4 --budgets 1.0 --recent-tokens 16"
    sizes += " --full-attention-layers 0,1,2,3,4"  # one layer stores: there is less to compile
    engine = "--lengths 256 --samples 1 --tasks single --batch-size 1 --max-num-seqs 1 --max-num-batched-tokens 128"
    example.main([str(tmp_path / "packed"), str(tmp_path / "out"), *sizes.split(), *engine.split()])
    dense, line = json.loads((tmp_path / "out/ablation.json").read_text())
    assert (dense["mode"], dense["kept"], dense["neighbors"]) == ("dense", 1.0, None)
    assert [line[name] for name in ("neighbors", "size", "ratio", "latent")] == [4, 64, 0.1, "int4"]
    assert 0.8 < line["kept"] < 1.0
    assert (dense["error"], 0 < line["error"] < 5) == (None, True)
    assert (tmp_path / "out/K=4_size=64_ratio=0.1_steps=0/compressor/model.safetensors").exists()
    # Results that share lines are put together once.
    (tmp_path / "more.json").write_text(json.dumps([dense, line | {"size": 32, "kept": 0.3}]))
    paths = f"{tmp_path / 'out/ablation.json'},{tmp_path / 'more.json'}"
    example.main(["--join", paths, str(tmp_path / "both")])
    both = json.loads((tmp_path / "both/ablation.json").read_text())
    assert [each["size"] for each in both] == [None, 64, 32]
    assert len((tmp_path / "both/ablation.csv").read_text().splitlines()) == 4
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "both/ablation.png").read_bytes().startswith(b"\x89PNG")
