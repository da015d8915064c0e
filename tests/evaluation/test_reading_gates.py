"""What methods that keep every token promise of the answers, on the embedded model: selection, and DeltaKV."""

import pytest

from sparsejax import LLM
from sparsejax.assets import tiny_compressor_path
from sparsejax.evaluation.method_sweep import MethodRow, compare_methods, make_settings, over_tasks

SAMPLES = {"tasks": ("single", "multi_key"), "lengths": (1024,), "samples": 2, "seed": 11}
EIGHTH = 0.125


@pytest.fixture(scope="module")
def selecting() -> list[MethodRow]:
    """Dense, and methods whose selecting layers read an eighth of the text."""
    llm = LLM(methods=("full", "omnikv", "quest"), max_model_len=1024, max_num_seqs=2, max_num_batched_tokens=256)
    settings = make_settings(["omnikv", "quest"], [EIGHTH], options={"omnikv": {"full_attention_layers": (0, 3)}})
    return compare_methods(llm, settings, **SAMPLES, progress=False)


@pytest.fixture(scope="module")
def storing(selecting) -> MethodRow:
    """DeltaKV with 4-bit latents, all of them read."""
    llm = LLM(
        methods=("deltakv",),
        compressor=str(tiny_compressor_path()),
        full_attention_layers=(0,),
        latent_dtype="int4",
        recent_tokens=16,
        page_size=16,
        max_model_len=1024,
        max_num_seqs=1,
        max_num_batched_tokens=256,
    )
    settings = make_settings(["deltakv"], [1.0], variant="int4")[1:]
    (row,) = over_tasks(compare_methods(llm, settings, **SAMPLES, dense=selecting, progress=False))
    return row


def test_an_eighth_is_enough_to_read(selecting):
    dense, *others = over_tasks(selecting)
    assert dense.score == 1.0
    assert [row.method for row in others] == ["omnikv", "quest"]
    for row in others:
        assert row.score >= 0.97, row.method
        # Two of six layers read everything.
        assert row.read < 1 / 3 + 2 / 3 * EIGHTH + 0.02
        assert row.kept == 1.0


def test_a_third_of_the_bytes_is_enough_to_store(storing):
    assert storing.score >= 0.97
    assert storing.kept < 0.35
