"""A mixed step is a decode step and then a prefill step: the same tokens, the same tables, the same state."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import donated_arguments, lower_for_h200, triton_calls
from tiny_engine import CONFIG, VOCAB

from sparsejax import SamplingParams
from sparsejax.cache import CacheLayout, init_cache
from sparsejax.engine.execution.compiled_steps import compiled_steps
from sparsejax.engine.execution.packing import pack
from sparsejax.engine.programs.state import init_state
from sparsejax.engine.programs.steps import StepOptions, mixed_step
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.plan import Chunk
from sparsejax.models import Decoder, ModelConfig, abstract_params

SIZE, SEGMENTS, LANES, ROWS = 32, 4, 4, 8
LAYOUT = CacheLayout(
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    num_pages=4 * 60,
    page_size=4,
    max_rows=ROWS,
    max_slots=64,
    dtype=jnp.float32,
)
GREEDY = SamplingParams(temperature=0.0)
SAMPLING = [
    GREEDY,
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.8, top_k=5, presence_penalty=0.5),
    SamplingParams(temperature=0.0, repetition_penalty=1.4, frequency_penalty=0.3),
]
VARIANTS = {
    "plain": StepOptions(),
    "full": StepOptions(plain=False, logprobs=True, prompt_logprobs=True),
}


@pytest.fixture(scope="module")
def steps(params):
    """(params, name -> jitted step) of the tiny model, XLA kernels."""
    return params, compiled_steps(Decoder(CONFIG, jnp.float32))  # pyright: ignore[reportArgumentType]


def packed(chunks):
    return pack(chunks, size=SIZE, segments=SEGMENTS, eos_token_ids=(2,))


def run(steps, name, cache, state, work, options):
    """The step on copies, for it takes what it is given."""
    params, compiled = steps
    cache, state = jax.tree.map(jnp.copy, (cache, state))
    cache, state, output = getattr(compiled, name)(params, cache, state, work, options)
    return cache, state, output.get()


def make_request(draw, row: int, length: int, plain: bool) -> Request:
    tokens = np.random.default_rng(draw(st.integers(0, 99))).integers(3, VOCAB, length).tolist()
    sampling = GREEDY if plain else draw(st.sampled_from(SAMPLING))
    outputs = draw(st.lists(st.integers(3, VOCAB - 1), max_size=3)) if length > 1 else []
    return Request(str(row), tokens, sampling, row=row, seed=row, output_token_ids=outputs)


def whole(request: Request) -> Chunk:
    return Chunk(request, 0, request.prefill_target, is_last=True)


def assert_same(got, expected) -> None:
    """Everything equal; what the model computes in float32, nearly."""
    for path, value in jax.tree_util.tree_leaves_with_path(got):
        other = functools.reduce(lambda tree, key: getattr(tree, key.name), path, expected)
        if value.dtype == jnp.float32:
            np.testing.assert_allclose(value, other, rtol=2e-4, atol=2e-5, err_msg=str(path))
        else:
            np.testing.assert_array_equal(value, other, err_msg=str(path))


@settings(max_examples=12, deadline=None)
@given(data=st.data(), variant=st.sampled_from(sorted(VARIANTS)))
def test_it_is_a_decode_step_and_then_a_prefill_step(steps, data, variant):
    """Any number of rows that decode, new, continued and replayed chunks beside them, idle lanes anywhere."""
    options, draw = VARIANTS[variant], data.draw
    decoding = draw(st.integers(1, LANES))
    free_rows = list(draw(st.permutations(range(1, ROWS + 1))))
    running = [make_request(draw, free_rows.pop(), draw(st.integers(1, 5)), options.plain) for _ in range(decoding)]
    chunks, room = [], SIZE - decoding
    history = []
    for _ in range(draw(st.integers(1, SEGMENTS))):
        if room < 2:
            break
        each = make_request(draw, free_rows.pop(), draw(st.integers(2, min(room, 20))), options.plain)
        begun = draw(st.integers(0, min(2, each.prefill_target - 1)))
        count = draw(st.integers(1, min(room, each.prefill_target - begun)))
        if begun:
            history.append(Chunk(each, 0, begun, is_last=False))
        chunks.append(Chunk(each, begun, count, is_last=begun + count == each.prefill_target))
        room -= count
    cache, state = init_cache(LAYOUT), init_state(ROWS + 1, VOCAB)
    cache, state, _ = run(steps, "prefill", cache, state, packed([whole(each) for each in running]), options)
    if history:
        cache, state, _ = run(steps, "prefill", cache, state, packed(history), options)
    rows = draw(st.permutations([each.row for each in running] + [0] * (LANES - decoding)))
    batch = packed(chunks)

    got_cache, got_state, output = run(steps, "mixed", cache, state, (batch, np.asarray(rows, np.int32)), options)
    cache, state, decoded = run(steps, "decode", cache, state, jnp.asarray(rows, jnp.int32), options)
    cache, state, prefilled = run(steps, "prefill", cache, state, batch, options)

    live = np.concatenate([batch.rows > 0, np.asarray(rows) > 0])
    both = jax.tree.map(lambda *x: np.concatenate(x)[live], prefilled.sample, decoded.sample)
    assert_same(jax.tree.map(lambda x: np.asarray(x)[live], output.sample), both)
    assert bool(output.ok)
    assert int(output.free_entries) == int(prefilled.free_entries)
    assert_same(got_cache, cache)
    # Row 0 of the state is nobody's.
    assert_same(*(jax.tree.map(lambda x: x[1:], each) for each in (got_state, state)))
    if options.prompt_logprobs:
        count = batch.starts[-1]
        assert_same(*(jax.tree.map(lambda x: x[:count], each.prompt) for each in (output, prefilled)))


def test_what_does_not_fit_is_said(steps):
    """Too few pages for the decode, for the chunk, or too little padding: `ok` is false."""
    first = Request("a", [5] * 8, GREEDY, row=1)
    second = Request("b", [7] * (SIZE - 1), GREEDY, row=2)
    third = Request("c", [7] * SIZE, GREEDY, row=2)
    rows = np.array([1, 0, 0, 0], np.int32)
    cache, state = init_cache(LAYOUT), init_state(ROWS + 1, VOCAB)
    cache, state, _ = run(steps, "prefill", cache, state, packed([whole(first)]), StepOptions())
    for free_entries, chunk, fits in ((9, second, True), (8, second, False), (0, second, False), (9, third, False)):
        scarce = dataclasses.replace(
            cache, free=dataclasses.replace(cache.free, count=jnp.full_like(cache.free.count, free_entries))
        )
        *_, output = run(steps, "mixed", scarce, state, (packed([whole(chunk)]), rows), StepOptions())
        assert bool(output.ok) == fits


@pytest.mark.parametrize("granularity", ["shared", "per_head"])
def test_production_shapes_lower_for_cuda_in_place(granularity):
    """Both attention kernels and one store a layer (here two layers, which share their lowered kernels)."""
    config = ModelConfig(
        architecture="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=2,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
    )
    layout = CacheLayout(
        num_layers=2,
        num_kv_heads=8,
        head_dim=128,
        num_pages=16 * 4096,
        page_size=32,
        max_rows=256,
        max_slots=8192,
        granularity=granularity,
        dtype=jnp.bfloat16,
    )
    cache = jax.eval_shape(lambda: init_cache(layout))
    state = jax.eval_shape(lambda: init_state(257, config.vocab_size))
    batch = pack([], size=2048, segments=16, eos_token_ids=())
    options = StepOptions(plain=False, logprobs=True, implementation="triton")
    step = functools.partial(mixed_step, decoder=Decoder(config, jnp.bfloat16), options=options)
    params, rows = abstract_params(config, jnp.bfloat16), np.zeros(256, np.int32)
    text = lower_for_h200(step, params, cache, state, batch, rows, donate_argnums=(1, 2))
    assert donated_arguments(text) == len(jax.tree.leaves((cache, state)))
    # Store, prefill and decode, whose 2,056 heads need no kernel to merge them.
    assert triton_calls(text) == 3
