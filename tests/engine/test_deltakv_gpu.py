"""Compressed requests on a GPU: the kernels give the answers of the plain XLA path, and no program copies a pool."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from sparsejax import LLM, CompressionParams, SamplingParams
from sparsejax.assets import tiny_model_path
from sparsejax.checkpoint import load_config, resolve
from sparsejax.compressor import CompressorConfig
from sparsejax.compressor.config import kv_dim_of
from sparsejax.engine.execution.packing import pack
from sparsejax.engine.programs.delta_compress import compress_full_rings
from sparsejax.engine.programs.delta_parts import StoreOptions
from sparsejax.engine.programs.steps import StepOptions, decode_step, prefill_step
from sparsejax.evaluation import ANSWER_TOKENS, build_samples, encode_sample, exact_match

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS)
DELTA, DENSE = CompressionParams(method="deltakv", top_tokens=4096), CompressionParams()


def make_llm(**changes) -> LLM:
    """The embedded model with a compressor that loses nothing."""
    model = load_config(resolve(tiny_model_path()))
    size = kv_dim_of(model)
    config = CompressorConfig(num_layers=model.num_layers, kv_dim=size, kv_compressed_size=size)
    eye = {"out": {"kernel": jnp.eye(size)}}
    weights = {f"layers_{i}": {"down": eye, "up": eye} for i in range(model.num_layers)}
    engine = {
        "methods": ["full", "deltakv"],
        "compressor": (config, weights),
        "full_attention_layers": (0, 2),
        "recent_tokens": 32,
        "dense_cache_fraction": 0.5,
        "max_num_seqs": 8,
        "max_model_len": 4096,
        "num_pages": 12 * 3000,
    }
    return LLM(**(engine | changes))


@pytest.fixture(scope="module")
def samples():
    llm = LLM(num_pages=12 * 20, max_num_seqs=1, max_model_len=64)
    chosen = build_samples(llm.get_tokenizer(), lengths=[700, 3000], samples=1, seed=5)
    return chosen, [encode_sample(llm.get_tokenizer(), sample).tokens for sample in chosen]


@pytest.mark.parametrize("implementation", ["triton", "xla"])
def test_an_exact_compressor_gives_the_dense_tokens(samples, implementation):
    _, prompts = samples
    llm = make_llm(dtype="float32", implementation=implementation)
    kinds = [DELTA] * len(prompts) + [DENSE] * len(prompts)
    answers = [out.outputs[0].token_ids for out in llm.generate(prompts * 2, GREEDY, kinds, use_tqdm=False)]
    assert answers[: len(prompts)] == answers[len(prompts) :]


@pytest.mark.parametrize("latent_dtype", ["bfloat16", "int4"])
def test_the_embedded_model_answers_over_compressed_tokens(samples, latent_dtype):
    chosen, prompts = samples
    outputs = make_llm(dtype="bfloat16", latent_dtype=latent_dtype).generate(prompts, GREEDY, DELTA, use_tqdm=False)
    right = [
        exact_match(out.outputs[0].text, sample.answers, ordered=sample.ordered)
        for sample, out in zip(chosen, outputs, strict=True)
    ]
    assert sum(right) >= len(right) - (1 if latent_dtype == "bfloat16" else 3)


def test_no_program_copies_a_pool():
    llm = make_llm(dtype="bfloat16", num_pages=12 * 40_000, max_num_seqs=64)
    runner = llm.engine.runner
    pool = runner.cache.near.pool.k.nbytes
    assert pool > 100 << 20
    rows = jnp.zeros(8, jnp.int32)
    batch = pack([], size=64, segments=16, eos_token_ids=(), stores=True)
    programs = [
        (partial(compress_full_rings, spec=runner.store, implementation=None), 1, (rows, rows)),
        *(
            (
                partial(step, decoder=runner.decoder, options=StepOptions(store=options)),
                (1, 2),
                (runner.state, *work),
            )
            for step, options, work in (
                (prefill_step, StoreOptions(runner.store, chunk=True), (batch,)),
                (decode_step, StoreOptions(runner.store, compressed=True, top=256), (rows, rows)),
            )
        ),
    ]
    for program, donated, work in programs:
        lowered = jax.jit(program, donate_argnums=donated).lower(runner.params, runner.cache, *work)
        assert lowered.compile().memory_analysis().temp_size_in_bytes < pool // 2
