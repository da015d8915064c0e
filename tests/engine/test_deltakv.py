"""Requests that are stored compressed (DeltaKV), end to end on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_engine import (
    CONFIG,
    ENGINE,
    GREEDY,
    answers,
    assert_all_free,
    compressor_config,
    delta,
    identity,
    lossy,
    make_llm,
    model_params,
    prompts,
    tokens,
)

from sparsejax import LLM, CompressionParams, SamplingParams
from sparsejax.cache import Entries
from sparsejax.compressor import CompressorMismatchError, init_params, reconstruct
from sparsejax.engine.delta_ops import SparseLayer
from sparsejax.errors import InvalidArgumentError, PromptTooLongError
from sparsejax.models import Decoder
from sparsejax.models.dense_attention import dense_causal_attend
from sparsejax.models.rope import apply_rope, rope_cos_sin

TEXTS = prompts(2, 70, 33)
DENSE = CompressionParams()


@pytest.fixture(scope="module")
def exact() -> LLM:
    return make_llm(identity())


@pytest.fixture(scope="module")
def coarse() -> LLM:
    return make_llm(lossy())


@pytest.fixture(scope="module")
def alone(coarse) -> list[list[int]]:
    """The answers to TEXTS, each served alone, with few tokens read of what is stored at a loss."""
    return [tokens(answers(coarse, [text], delta(6)))[0] for text in TEXTS]


def test_an_identity_compressor_that_reads_everything_is_dense_attention(exact):
    dense = [answers(exact, [text], DENSE)[0] for text in TEXTS]
    assert tokens([answers(exact, [text], delta())[0] for text in TEXTS]) == tokens(dense)
    together = answers(exact, TEXTS[1:] * 2, [delta()] * 2 + [DENSE] * 2)
    assert tokens(together) == tokens(dense[1:] * 2)
    for one, expected in zip(together, dense[1:] * 2, strict=True):
        assert one.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=2e-4)
    assert_all_free(exact)


def test_a_request_is_answered_alike_alone_and_beside_others(coarse, alone):
    mixed = answers(coarse, [*TEXTS, TEXTS[1]], [delta(6), delta(6), delta(6), DENSE])
    assert tokens(mixed[:3]) == alone
    assert tokens(mixed[3:]) == tokens(answers(coarse, [TEXTS[1]], DENSE))
    assert alone[1] != mixed[3].token_ids, "it does lose something"
    assert_all_free(coarse)


def test_requests_read_as_much_as_each_asks_for(coarse):
    asked = [delta(1), delta(0.5), delta(128)]
    each = [tokens(answers(coarse, [TEXTS[1]], compression))[0] for compression in asked]
    assert tokens(answers(coarse, [TEXTS[1]] * 3, asked)) == each
    assert len({tuple(answer) for answer in each}) > 1


def test_cells_do_not_depend_on_how_much_a_step_computes(alone):
    wide = make_llm(lossy(), max_num_batched_tokens=128)
    assert wide.engine.scheduler.config.store.cell == 16
    assert tokens([answers(wide, [text], delta(6))[0] for text in TEXTS]) == alone


@pytest.mark.parametrize("steps", [3, 8, 19])
def test_a_restarted_request_yields_what_it_would_have(coarse, alone, steps):
    submissions = coarse._submit([coarse_prompt(text) for text in TEXTS], GREEDY, delta(6))
    for _ in range(steps):
        coarse.engine.step()
    coarse.engine._in_flight = None
    coarse.engine.scheduler.restart()
    coarse.engine.runner.reset()
    while coarse.engine.has_unfinished:
        coarse.engine.step()
    assert [submission.output().outputs[0].token_ids for submission in submissions] == alone
    assert_all_free(coarse)


def coarse_prompt(text):
    from sparsejax.engine.inputs import TokenizedPrompt

    return TokenizedPrompt(None, text)


def test_a_trace_of_arrivals_and_cancellations_leaves_everything_free(coarse):
    draw = np.random.default_rng(5)
    texts = prompts(*draw.integers(1, 90, 10), seed=2)
    kinds = [delta(4) if each else DENSE for each in draw.integers(0, 2, 10)]
    params = [replace(GREEDY, max_tokens=int(n)) for n in draw.integers(1, 30, 10)]
    running = []
    while texts or running:
        if texts and draw.random() < 0.3:
            running += coarse._submit([coarse_prompt(texts.pop())], params.pop(), kinds.pop())
        if running and draw.random() < 0.05:
            coarse.engine.cancel(running.pop(int(draw.integers(len(running)))))
        coarse.engine.step()  # raises where host and device count differently
        running = [each for each in running if not each.finished]
    while coarse.engine.has_unfinished:
        coarse.engine.step()
    assert_all_free(coarse)
    coarse.generate([[5]], SamplingParams(max_tokens=1), use_tqdm=False)  # runs the last releases
    coarse.engine.runner.release([1])
    cache = coarse.engine.runner.cache
    assert [int(part.free.count) for part in (cache.full, cache.near, cache.latent)] == list(
        coarse.engine.scheduler.pool_entries
    )


@pytest.mark.parametrize("kind", ["linear", "mlp_gelu"])
def test_what_training_reconstructs_is_what_serving_reads_back(kind):
    """The first sparse layer, whose keys and values one chunk computes without anything compressed before them."""
    config, params = lossy()
    if kind == "mlp_gelu":
        config = compressor_config(32, kind)
        params = jax.tree.map(lambda x: 5 * x, init_params(config, jax.random.key(1)))
    llm = make_llm((config, params), max_num_batched_tokens=128, max_mixed_tokens=128)
    (text,) = prompts(50)
    caught = {}

    def attend(layer, q, k, v, k_pre_rope, cache):
        caught[layer] = (k_pre_rope, v)
        return dense_causal_attend(1)(layer, q, k, v, k_pre_rope, cache)

    decoder = Decoder(CONFIG, jnp.float32)
    positions = jnp.arange(50)
    decoder.apply({"params": model_params()}, jnp.asarray(text), positions, None, attend)
    k, v = caught[1]
    x = jnp.concatenate([k.reshape(50, -1), v.reshape(50, -1)], axis=1)
    expected = reconstruct(config, params["layers_1"], x[None])[0]

    (submission,) = llm._submit([coarse_prompt(text)], GREEDY, delta(4))
    llm.engine.step()
    runner = llm.engine.runner
    row, history = submission.answers[0].request.row, runner.store.geometry.history(50)
    at = SparseLayer(runner.cache, 1, runner.store, runner.params["compressor"]["layers_1"], "xla")
    cos, sin = rope_cos_sin(CONFIG.rope, CONFIG.head_dim, positions)
    one = jnp.asarray([row], jnp.int32)
    pages = at._read_back(
        one, jnp.asarray([history]), jnp.asarray([50]), positions[None], cos[None], sin[None], listed=False
    )
    got = [page.reshape(-1, 2, 4, 16).swapaxes(1, 2).reshape(-1, 2, 16)[:50] for page in pages]
    expected_k, expected_v = jnp.split(expected.reshape(50, 4, 16), 2, axis=1)
    recent = (positions >= history)[:, None, None]
    want_k, want_v = jnp.where(recent, k, expected_k), jnp.where(recent, v, expected_v)
    np.testing.assert_allclose(got[0], apply_rope(want_k, cos, sin), atol=2e-5)
    np.testing.assert_allclose(got[1], want_v, atol=2e-5)
    assert float(jnp.abs(expected - x).max()) > 0.1, "something is lost"
    llm.engine.cancel(submission)


def test_int4_latents_are_close_and_take_less(exact):
    few = replace(GREEDY, max_tokens=6)
    narrow = make_llm(identity(), latent_dtype="int4")
    (wide,), (got,) = (llm.generate([TEXTS[1]], few, delta(), use_tqdm=False) for llm in (exact, narrow))
    assert got.outputs[0].cumulative_logprob == pytest.approx(wide.outputs[0].cumulative_logprob, abs=0.5)
    assert got.metrics.kv_bytes < 0.75 * wide.metrics.kv_bytes


def test_serving_after_warm_up_compiles_nothing():
    model = replace(CONFIG, num_layers=2)
    params = {name: leaf for name, leaf in model_params().items() if name not in ("layers_2", "layers_3")}
    config, weights = lossy()
    engine = {
        "max_num_seqs": 1,
        "max_num_batched_tokens": 16,
        "max_mixed_tokens": 16,
        "full_attention_layers": (0,),
        "default_compression": delta(6),
        "warmup": "greedy",
    }
    llm = LLM.from_params(model, params, compressor=(replace(config, num_layers=2), weights), **(ENGINE | engine))
    before = llm.engine.runner.compilations
    plain = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    llm.generate([TEXTS[1], TEXTS[2]], plain, [delta(6), DENSE], use_tqdm=False)
    assert llm.engine.runner.compilations == before


def test_metrics_count_the_pages_of_all_pools(coarse):
    (output,) = coarse.generate([TEXTS[1]], GREEDY, delta(6), use_tqdm=False)
    runner = coarse.engine.runner
    held = coarse.engine.scheduler.config.store.held(70 + 19, compressed=True)
    geometry = runner.store.geometry
    assert held == Entries(23, -(-geometry.centers(89) // 4) + 2, -(-geometry.latents(89) // 4))
    assert output.metrics.kv_bytes == runner.layout.bytes_of(held)


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        ({"compressor": None}, InvalidArgumentError, "needs a compressor"),
        ({"methods": ["deltakv", "snapkv"]}, InvalidArgumentError, "need different caches"),
        ({"full_attention_layers": (1,)}, InvalidArgumentError, "must name layer 0"),
        ({"full_attention_layers": (0, 1, 2, 3)}, InvalidArgumentError, "must name layer 0"),
        ({"latent_dtype": "int8"}, InvalidArgumentError, "latent_dtype"),
        ({"num_pages": 16}, Exception, "less than one request needs"),
    ],
)
def test_what_cannot_be_built_is_refused(engine, error, message):
    with pytest.raises(error, match=message):
        make_llm(engine.pop("compressor", lossy()), **engine)


def test_compressors_that_do_not_fit_are_refused():
    config, params = lossy()
    with pytest.raises(CompressorMismatchError, match="4 layers"):
        make_llm((replace(config, num_layers=5), params))
    with pytest.raises(InvalidArgumentError, match="references='cluster'"):
        make_llm((compressor_config(references="e2e"), params))
    config = compressor_config(24)
    with pytest.raises(InvalidArgumentError, match="multiple"):
        make_llm((config, init_params(config, jax.random.key(0))), latent_dtype="int4")


def test_what_cannot_be_served_is_refused(coarse):
    with pytest.raises(InvalidArgumentError, match="needs another cache"):
        coarse.engine.check(coarse_prompt([1]), GREEDY, CompressionParams(method="random", budget_tokens=9))
    small = make_llm(lossy(), num_pages=300)
    with pytest.raises(PromptTooLongError, match="the KV cache holds"):
        answers(small, prompts(100), delta())
    with pytest.raises(InvalidArgumentError, match="top_tokens"):
        delta(1.5)
    with pytest.raises(InvalidArgumentError, match="takes no budget_tokens"):
        CompressionParams(method="deltakv", budget_tokens=5)
