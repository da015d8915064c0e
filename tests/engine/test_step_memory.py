"""No step holds a second copy of a pool, whatever its requests record or select."""

from __future__ import annotations

import jax
import pytest
from step_memory import memory_of_steps

from pallas_kernels import kept_logits
from sparsejax import LLM, CompressionParams, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
SMALL = {"budget_tokens": 16, "sink_tokens": 1, "recent_tokens": 4}
CHOICES = {
    "full": CompressionParams(),
    "h2o": CompressionParams(method="h2o", **SMALL),  # records chunks and decodes
    "expected_attention": CompressionParams(method="expected_attention", **SMALL),  # records queries
    "omnikv": CompressionParams(method="omnikv", top_tokens=8),
    "quest": CompressionParams(method="quest", top_tokens=8, options={"dense_layers": 1}),
}


def assert_no_copy(llm: LLM, prompts: list[list[int]], choices: list[CompressionParams]) -> None:
    """Serves the prompts, one joining while the other decodes, and looks at every step that this took."""

    def serve():
        for choice in choices:
            llm.generate(prompts, [GREEDY] * len(prompts), choice, use_tqdm=False)

    pool = llm.engine.runner.cache.pool.k.nbytes
    steps = memory_of_steps(llm, serve)
    assert {"prefill", "decode"} <= {step.name for step in steps}
    for step in steps:
        assert step.in_place >= 2 * pool, step
        assert step.scratch < pool // 4, step


@pytest.mark.parametrize("names", [["h2o"], ["omnikv"], ["quest"]], ids=" ".join)
def test_steps_that_record_or_select_hold_no_copy(make_llm, names):
    llm = make_llm(methods=names, num_pages=4 * 20_000, max_resident_rows=200)
    assert_no_copy(llm, [list(range(3, 43)), list(range(4, 20))], [CHOICES[name] for name in names])


@pytest.fixture
def few_logits_kept(monkeypatch):
    """Keys are read again for the probabilities of most slots, by a kernel of its own."""
    jax.clear_caches()  # it is looked at when kernels are traced
    monkeypatch.setattr(kept_logits, "_MOST_BYTES", 1 << 12)
    yield
    jax.clear_caches()


@pytest.mark.gpu
@pytest.mark.usefixtures("few_logits_kept")
@pytest.mark.parametrize("names", [["h2o", "expected_attention"], ["omnikv"], ["quest", "full"]], ids=" ".join)
def test_kernels_that_record_or_select_make_no_copy(names):
    llm = LLM(methods=names, max_num_seqs=64, max_model_len=8192, num_pages=12 * 20_000)
    assert_no_copy(llm, [[5] * 700, [7] * 40], [CHOICES[name] for name in names])
