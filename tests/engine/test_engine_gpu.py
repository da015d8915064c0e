"""The engine on a GPU: the kernels give the answers of the plain XLA path, and the steps copy no pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from sparsejax import LLM, SamplingParams
from sparsejax.engine.programs.steps import StepOptions
from sparsejax.evaluation import ANSWER_TOKENS, TASKS, build_samples, encode_sample, exact_match

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
ENGINE = {"max_num_seqs": 8, "max_model_len": 4096, "num_pages": 12 * 1100}


@pytest.fixture(scope="module")
def samples():
    tokenizer = LLM(num_pages=12 * 20, max_num_seqs=1, max_model_len=64).get_tokenizer()
    chosen = build_samples(tokenizer, lengths=[700, 3000], samples=1, seed=5)
    return chosen, [encode_sample(tokenizer, sample).tokens for sample in chosen]


def test_kernels_and_xla_give_the_same_tokens(samples):
    _, prompts = samples
    answers = [
        [
            output.outputs[0].token_ids
            for output in LLM(dtype="float32", implementation=each, **ENGINE).generate(prompts, GREEDY)
        ]
        for each in ("triton", "xla")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("granularity", ["shared", "per_head"])
def test_the_embedded_model_answers_in_bfloat16(samples, granularity):
    chosen, prompts = samples
    llm = LLM(dtype="bfloat16", table_granularity=granularity, **ENGINE)
    outputs = llm.generate(prompts, GREEDY)
    right = [
        exact_match(output.outputs[0].text, sample.answers, ordered=sample.ordered)
        for sample, output in zip(chosen, outputs, strict=True)
    ]
    assert sum(right) >= len(right) - 1, [sample.task for sample, ok in zip(chosen, right, strict=True) if not ok]
    assert len(right) == 2 * len(TASKS)


def test_compiled_steps_hold_no_copy_of_the_pool():
    llm = LLM(max_num_seqs=64, max_model_len=8192, num_pages=12 * 20000)
    runner = llm.engine.runner
    pool = runner.cache.pool.k.nbytes
    assert pool > 500 << 20
    for step, work in (
        (runner.steps.prefill, runner._pack([], size=64)),
        (runner.steps.decode, jnp.zeros(8, jnp.int32)),
        (runner.steps.mixed, (runner._pack([], size=64), jnp.zeros(8, jnp.int32))),
    ):
        compiled = step.lower(runner.params, runner.cache, runner.state, work, StepOptions()).compile()
        analysis = compiled.memory_analysis()
        assert analysis.alias_size_in_bytes >= 2 * pool
        assert analysis.temp_size_in_bytes < pool // 4


def test_peak_memory_is_weights_pool_and_scratch():
    """What the allocator reports grows by the weights and the cache, and little else."""
    before = jax.devices()[0].memory_stats()["bytes_in_use"]
    llm = LLM(max_num_seqs=4, max_model_len=2048, num_pages=12 * 20000)
    held = sum(x.nbytes for x in jax.tree.leaves((llm.engine.runner.params, llm.engine.runner.cache)))
    llm.generate([[5] * 1500], GREEDY)
    after = jax.devices()[0].memory_stats()["bytes_in_use"]
    assert after - before < held + (64 << 20)
