"""The choice of full-attention layers: the search against all choices, the matrix at its limits, the command."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.cli import main
from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation.layer_choice import choose_layers, format_coverage, measure_coverage
from sparsejax.methods.known_layers import KNOWN, known_layers, spread_layers
from sparsejax.methods.selection import follower_roles
from sparsejax.models import ModelConfig, init_params

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    eos_token_ids=(2,),
)


def kept(coverage, layers):
    """Mean over the layers that follow, by definition."""
    followers = [j for j in range(len(coverage)) if j not in layers]
    return np.mean([coverage[max(i for i in layers if i < j), j] for j in followers]) if followers else 1.0


def test_finds_the_best_of_all_choices():
    rng = np.random.default_rng(0)
    for layers in (1, 2, 7):
        coverage = rng.random((layers, layers))
        for count in range(1, layers + 1):
            choice = choose_layers(coverage, count)
            assert (len(choice.layers), choice.layers[0]) == (count, 0)
            assert choice.coverage == pytest.approx(kept(coverage, choice.layers))
            others = itertools.combinations(range(1, layers), count - 1)
            assert choice.coverage == pytest.approx(max(kept(coverage, (0, *each)) for each in others))
    for count in (0, 8):
        with pytest.raises(InvalidArgumentError, match="from 1 to 7"):
            choose_layers(coverage, count)


def test_coverage_is_a_share_and_all_tokens_cover_all():
    params = jax.tree.map(lambda x: x if x.ndim == 1 else 10 * x, init_params(CONFIG, jax.random.key(7), jnp.float32))
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 61, length).tolist() for length in (90, 200)]
    options = {"sinks": 2, "recent": 4, "queries": 8}
    coverage = measure_coverage(CONFIG, params, texts, top_tokens=10, **options)
    assert coverage.shape == (3, 3)
    assert (coverage > 0).all()
    assert (coverage < 1).all()
    more = measure_coverage(CONFIG, params, texts, top_tokens=0.5, **options)
    assert (more > coverage).all()
    every = measure_coverage(CONFIG, params, texts, top_tokens=500, **options)
    np.testing.assert_allclose(every, 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        measure_coverage(CONFIG, params, texts[:1], top_tokens=10, **options)
        + measure_coverage(CONFIG, params, texts[1:], top_tokens=10, **options),
        2 * coverage,
        rtol=1e-5,
    )
    assert len(format_coverage(coverage).splitlines()) == 5
    for bad in ([], [[1] * 14]):
        with pytest.raises(InvalidArgumentError, match="to calibrate on"):
            measure_coverage(CONFIG, params, bad, top_tokens=10, **options)


def test_known_layers_fit_their_models():
    for known in KNOWN:
        roles = follower_roles(known.layers, known.num_layers)
        assert roles.reads_all == len(known.layers)
        assert roles.roles[0] in ("all", "observe")
        assert known.source
    first = KNOWN[0]
    assert known_layers(first.num_layers, first.hidden_size, first.num_heads, first.num_kv_heads) is first
    assert known_layers(3, 32, 4, 2) is None
    assert spread_layers(13) == (0, 6, 12)


def test_roles_follow_the_last_full_layer():
    assert follower_roles((0, 1, 3), 6).roles == ("all", "observe", "follow", "observe", "follow", "follow")
    assert follower_roles((0, 2), 3).roles == ("observe", "follow", "all")


def test_command(capsys, tmp_path):
    report, figure = tmp_path / "layers.json", tmp_path / "layers.png"
    command = ["calibrate", "--lengths", "256", "--samples", "1", "--count", "2", "--top-tokens", "12"]
    assert main([*command, "--json", str(report), "--plot", str(figure)]) == 0
    out = capsys.readouterr().out
    saved = json.loads(report.read_text())
    layers = ",".join(map(str, saved["layers"]))
    assert f"--full-attention-layers {layers}" in out
    assert saved["coverage"] == pytest.approx(kept(np.asarray(saved["matrix"]), saved["layers"]), abs=1e-5)
    assert (saved["model"]["num_layers"], saved["asked"]["top_tokens"]) == (6, 12)
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-tokens", "2.5"], "top_tokens must be"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--data", "/no/such/file"], "cannot be read"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_command_lines_that_make_no_sense(capsys, options, message):
    assert main(["calibrate", *options]) == 1
    assert message in capsys.readouterr().err
