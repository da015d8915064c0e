"""Requests that are stored compressed (DeltaKV), end to end on a tiny model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from delta_engine import (
    CONFIG,
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

from pallas_kernels import delta_places
from sparsejax import LLM, CompressionParams, SamplingParams
from sparsejax.cache import Entries, allocate_delta, init_delta_cache
from sparsejax.compressor import CompressorMismatchError, init_params, reconstruct
from sparsejax.config import EngineConfig
from sparsejax.engine.build_store import load_store
from sparsejax.engine.execution.compiled_steps import compiler_options
from sparsejax.engine.execution.packing import pack
from sparsejax.engine.programs import delta_ops
from sparsejax.engine.programs.delta_compress import compress_chunk, compress_full_rings
from sparsejax.engine.programs.delta_ops import SparseLayer
from sparsejax.engine.programs.delta_parts import StoreOptions
from sparsejax.engine.programs.state import init_state
from sparsejax.engine.programs.steps import StepOptions, mixed_step, prefill_step
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Chunk
from sparsejax.errors import InvalidArgumentError, PromptTooLongError
from sparsejax.models import Decoder
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


def test_three_layers_may_follow_one(exact):
    followed = make_llm(identity(), full_attention_layers=(0,))
    text = TEXTS[2:]
    assert tokens(answers(followed, text, delta())) == tokens(answers(exact, text, DENSE))


def test_a_request_is_answered_alike_alone_and_beside_others(coarse, alone):
    mixed = answers(coarse, [*TEXTS, TEXTS[1]], [delta(6), delta(6), delta(6), DENSE])
    assert tokens(mixed[:3]) == alone
    assert tokens(mixed[3:]) == tokens(answers(coarse, [TEXTS[1]], DENSE))
    assert alone[1] != mixed[3].token_ids, "it does lose something"
    assert_all_free(coarse)


def test_requests_read_as_much_as_each_asks_for(coarse):
    asked = [delta(1), delta(0.5), delta(2**31)]
    each = [tokens(answers(coarse, [TEXTS[1]], compression))[0] for compression in asked]
    assert tokens(answers(coarse, [TEXTS[1]] * 3, asked)) == each
    assert len({tuple(answer) for answer in each}) > 1


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
    from sparsejax.engine.requests.inputs import TokenizedPrompt

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


@pytest.mark.parametrize(
    ("kind", "latent_dtype", "tolerance"), [("linear", None, 1e-5), ("mlp_gelu", None, 1e-5), ("linear", "int4", 0.4)]
)
def test_what_training_reconstructs_is_what_serving_reads_back(kind, latent_dtype, tolerance):
    """Keys and values of a text through a sparse layer's cache, two chunks, against the whole text at once."""
    length, first = 50, 25
    config, params = lossy()
    if kind == "mlp_gelu":
        config = compressor_config(32, kind)
        params = jax.tree.map(lambda x: 5 * x, init_params(config, jax.random.key(1)))
    engine = EngineConfig(
        compressor=(config, params), full_attention_layers=(0, 2), recent_tokens=4, latent_dtype=latent_dtype
    )
    store = load_store(CONFIG, engine, dtype=jnp.float32)
    layout = store.layout(CONFIG, entries=Entries(40, 40, 40), dtype=jnp.float32, max_rows=2, max_slots=64, page_size=4)
    geometry, row = store.spec.geometry, jnp.asarray(2)
    k, v = jax.random.normal(jax.random.key(5), (2, length, 2, 16))

    @jax.jit
    def take(cache, start, stop, k, v):
        cache, ok = allocate_delta(
            cache,
            row[None],
            near=(geometry.centers(stop) - geometry.centers(start))[None],
            ring=jnp.where(start > 0, 0, geometry.ring)[None],
            latent=(geometry.latents(stop) - geometry.latents(start))[None],
            max_count=Entries(64, 64, 64),
        )
        at = SparseLayer(cache, 1, store.spec, store.params["layers_1"], "xla")
        return compress_chunk(at, row, start, stop, k, v), ok

    cache = init_delta_cache(layout)
    for start, stop in ((0, first), (first, length)):
        cache, ok = take(cache, start, stop, k[start:stop], v[start:stop])
        assert ok

    positions, history = jnp.arange(length), geometry.history(length)
    cos, sin = rope_cos_sin(CONFIG.rope, CONFIG.head_dim, positions)
    at = SparseLayer(cache, 1, store.spec, store.params["layers_1"], "xla")
    pages = at.read_back(
        row[None].astype(jnp.int32),
        jnp.asarray([history]),
        jnp.asarray([length]),
        positions[None],
        cos[None],
        sin[None],
        listed=False,
    )
    got = [page.reshape(-1, 2, 4, 16).swapaxes(1, 2).reshape(-1, 2, 16)[:length] for page in pages]
    x = jnp.concatenate([k.reshape(length, -1), v.reshape(length, -1)], axis=1)
    expected = reconstruct(config, params["layers_1"], x[None])[0]
    assert float(jnp.abs(expected - x).max()) > 0.1, "something is lost"
    expected_k, expected_v = jnp.split(expected.reshape(length, 4, 16), 2, axis=1)
    recent = (positions >= history)[:, None, None]
    np.testing.assert_allclose(got[0], apply_rope(jnp.where(recent, k, expected_k), cos, sin), atol=tolerance)
    np.testing.assert_allclose(got[1], jnp.where(recent, v, expected_v), atol=tolerance)


def test_4_bit_latents_take_less():
    held = Entries(23, 8, 17)
    sizes = {}
    for latent_dtype in ("float32", "bfloat16", "int4"):
        engine = EngineConfig(compressor=identity(), full_attention_layers=(0,), latent_dtype=latent_dtype)
        store = load_store(CONFIG, engine, dtype=jnp.float32)
        layout = store.layout(
            CONFIG, entries=Entries(9, 9, 9), dtype=jnp.float32, max_rows=2, max_slots=64, page_size=4
        )
        sizes[latent_dtype] = layout.bytes_of(held) - layout.bytes_of(held._replace(latent=0))
    slots = 17 * 3 * 4
    assert sizes == {
        "float32": slots * (64 * 4 + 2 * 2),
        "bfloat16": slots * (64 * 2 + 2 * 2),
        "int4": slots * (64 // 2 + 2 * 2 + 2 * 2),
    }


def test_warm_up_knows_every_step_that_serving_needs(coarse):
    runner = coarse.engine.runner
    kinds = {name: Request(name, [1, 2], GREEDY, asked) for name, asked in (("delta", delta(6)), ("dense", DENSE))}
    for names in ((), ("delta",), ("dense",), ("delta", "dense")):
        for chunk in (None, "delta", "dense"):
            if not names and chunk is None:
                continue
            chunks = [] if chunk is None else [Chunk(kinds[chunk], 0, 2, is_last=True)]
            needed = runner.variants.needed(chunks, [kinds[name] for name in names])
            warmed = runner.variants.every(
                with_chunk=bool(chunks), with_decode=bool(names), asked=delta(6), uniform=False
            )
            assert needed in warmed
            assert len(set(warmed)) == len(warmed)


def test_metrics_count_the_pages_of_all_pools(coarse):
    (output,) = coarse.generate([TEXTS[1]], GREEDY, delta(6), use_tqdm=False)
    runner = coarse.engine.runner
    held = coarse.engine.scheduler.config.store.held(70 + 19, compressed=True)
    geometry = runner.store.geometry
    assert held == Entries(23, -(-geometry.centers(89) // 4) + 2, -(-geometry.latents(89) // 4))
    assert output.metrics.kv_bytes == runner.layout.bytes_of(held)
    # Chunks that make tokens due (by cells of 16), and decoded tokens that do.
    cells = [(start, min(start + 16, 70)) for start in range(0, 70, 16)]
    chunks = sum(geometry.compressed(stop) > geometry.compressed(start) for start, stop in cells)
    rings = sum(bool(geometry.due(length)) for length in range(71, 90))
    assert (chunks, rings) == (5, 5)
    assert output.metrics.num_compressions == chunks + rings
    assert output.metrics.compression_seconds > 0
    assert output.metrics.kv_bytes_before_compression == 0


@pytest.mark.parametrize(
    ("engine", "error", "message"),
    [
        ({"compressor": None}, InvalidArgumentError, "needs a compressor"),
        ({"methods": ["deltakv", "snapkv"]}, InvalidArgumentError, "need different caches"),
        ({"full_attention_layers": (1,)}, InvalidArgumentError, "layer 0 among them"),
        ({"full_attention_layers": (0, 1, 2, 3)}, InvalidArgumentError, "not all of the model"),
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
    with pytest.warns(UserWarning, match="plain mean"):
        make_llm((replace(config, cluster_soft_assignment=True), params))
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
    with pytest.raises(InvalidArgumentError, match="was built with"):
        answers(coarse, [TEXTS[0]], CompressionParams(method="deltakv", full_attention_layers="0,1"))
    with pytest.raises(InvalidArgumentError, match="takes no budget_tokens"):
        CompressionParams(method="deltakv", budget_tokens=5)


def test_no_pool_is_copied(monkeypatch):
    """The scratch of the programs that write to the sparse layers' pools does not grow with them."""

    def opaque_places(*args, **kwargs):  # as the kernel is, which XLA cannot move behind a write
        return jax.lax.optimization_barrier(delta_places(*args, **kwargs))

    monkeypatch.setattr(delta_ops, "delta_places", opaque_places)
    engine = EngineConfig(compressor=lossy(), full_attention_layers=(0, 2), recent_tokens=4)
    store = load_store(CONFIG, engine, dtype=jnp.float32)
    layout = store.layout(
        CONFIG, entries=Entries(*[80_000] * 3), dtype=jnp.float32, max_rows=2, max_slots=64, page_size=4
    )
    cache = jax.eval_shape(lambda: init_delta_cache(layout))
    state = jax.eval_shape(lambda: init_state(layout.num_rows, CONFIG.vocab_size, stores=True))
    params = {**model_params(), "compressor": store.params}
    batch = pack([], size=32, segments=2, eos_token_ids=(), stores=True)
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    options = StepOptions(store=StoreOptions(store.spec, chunk=True))
    beside_decodes = StepOptions(store=StoreOptions(store.spec, chunk=True, dense=False, compressed=True, top=16))
    programs = [
        (partial(compress_full_rings, spec=store.spec, implementation="xla"), (params, cache, rows, rows), 1),
        (
            partial(prefill_step, decoder=Decoder(CONFIG, jnp.float32), options=options),
            (params, cache, state, batch),
            (1, 2),
        ),
        (
            partial(mixed_step, decoder=Decoder(CONFIG, jnp.float32), options=beside_decodes),
            (params, cache, state, batch, rows),
            (1, 2),
        ),
    ]
    for program, arguments, donated in programs:
        compiled = jax.jit(program, donate_argnums=donated, compiler_options=compiler_options()).lower(*arguments)
        analysis = compiled.compile()
        assert layout.bytes() > 100e6
        assert 2 * cache.latent.pool.reference.size > 2e6
        assert analysis.memory_analysis().temp_size_in_bytes < 2e6
