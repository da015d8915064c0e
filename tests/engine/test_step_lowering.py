"""The steps as a GPU would get them, lowered on whatever machine the tests run on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from lowering import donated_arguments, lower_for_h200, mosaic_calls, triton_calls

from sparsejax.bench.presets import model_config
from sparsejax.cache import CacheLayout, init_cache
from sparsejax.engine.packing import pack
from sparsejax.engine.state import init_state
from sparsejax.engine.steps import StepOptions, decode_step, prefill_step
from sparsejax.models import Decoder


def lower(step, *work, tokens: int) -> tuple[str, int]:
    """(the text of a step of Llama-3.1-8B's shapes with two layers, arrays of its cache and state)."""
    config = dataclasses.replace(model_config("llama-3.1-8b"), num_layers=2)
    decoder = Decoder(config, jnp.bfloat16)
    layout = CacheLayout(
        num_layers=2, num_kv_heads=8, head_dim=128, num_pages=2048, max_rows=8, max_slots=4096, page_size=32,
        granularity="shared", dtype=jnp.bfloat16,
    )  # fmt: skip
    token = jnp.zeros(tokens, jnp.int32)
    params = jax.eval_shape(
        lambda: decoder.init(
            jax.random.key(0), token, token, None, lambda layer, q, k, v, raw, cache: (q, cache), method="hidden_states"
        )
    )["params"]
    cache = jax.eval_shape(lambda: init_cache(layout))
    state = jax.eval_shape(lambda: init_state(layout.num_rows, config.vocab_size))
    step = functools.partial(step, decoder=decoder, options=StepOptions(plain=True))
    text = lower_for_h200(step, params, cache, state, *work, donate_argnums=(1, 2))
    return text, len(jax.tree.leaves((cache, state)))


def test_prefill_step_lowers_for_hopper_with_its_kernels_and_in_place():
    text, donated = lower(prefill_step, pack([], size=512, segments=16, eos_token_ids=()), tokens=512)
    # All layers share one lowered kernel for attention and one for the K/V store.
    assert (mosaic_calls(text), triton_calls(text)) == (1, 1)
    assert donated_arguments(text) == donated


def test_decode_step_lowers_with_one_kernel_between_projection_and_attention():
    text, donated = lower(decode_step, jnp.zeros(4, jnp.int32), tokens=4)
    # Norms behind a residual add, without one (the first), and without use for the sum (the last); rotating and
    # storing; the two of attention.
    assert (mosaic_calls(text), triton_calls(text)) == (0, 6)
    assert "rotate_and_store" in text
    assert '"store_kv"' not in text
    assert donated_arguments(text) == donated
