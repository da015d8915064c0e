"""Starting an engine: after what is measured nothing is left to compile, and everything compiled is listed."""

import json

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from sparsejax.cli import main

RAW = {  # an odd vocabulary: steps of equal decoders might have been compiled by other tests
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
ENGINE = {"max-num-seqs": 2, "max-num-batched-tokens": 16, "page-size": 4, "num-pages": 40, "max-model-len": 32}


def test_everything_that_is_compiled_is_listed_with_its_seconds(tmp_path, capsys):
    config, report = tmp_path / "config.json", tmp_path / "startup.json"
    config.write_text(json.dumps(RAW))
    engine = [f"--{name}={value}" for name, value in ENGINE.items()]
    command = ["bench", "startup", "--random-weights", str(config), "--greedy-only", "--json", str(report), *engine]
    before = jax.config.jax_compilation_cache_dir
    try:
        assert main([*command, "--compilation-cache", str(tmp_path / "programs")]) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()
    result = json.loads(report.read_text())
    assert result["kind"] == "startup"
    assert 0 < result["build_seconds"] < result["seconds"]
    for name in ("decode", "prefill", "mixed", "fork", "release"):
        listed = [count for program, (count, _) in result["programs"].items() if name in program]
        assert listed == [result["steps"][name]]
        assert listed[0] >= 1
    summed = sum(seconds for _, seconds in result["programs"].values())
    assert result["compile_seconds_summed"] == pytest.approx(summed)
    assert 0 < result["compile_seconds"] <= min(result["seconds"], summed * 1.001)
    assert 0 < result["pool_bytes"] <= 40 * 4 * 16 * 2 * 4
    assert (result["pool_share"] is None) == (result["card_bytes"] == 0)
    assert "steps compiled" in capsys.readouterr().out
