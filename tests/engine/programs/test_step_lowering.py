"""The steps as a GPU would get them, lowered on whatever machine the tests run on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from lowering import donated_arguments, lower_for_h200, mosaic_calls, triton_calls

from sparsejax.bench.presets import model_config
from sparsejax.cache import CacheLayout, Entries, init_cache, init_delta_cache
from sparsejax.compressor import CompressorConfig, StoreGeometry, abstract_params
from sparsejax.engine.build_store import Store
from sparsejax.engine.execution.packing import pack
from sparsejax.engine.programs.delta_compress import compress_full_rings
from sparsejax.engine.programs.delta_ops import StoreSpec
from sparsejax.engine.programs.delta_parts import StoreOptions
from sparsejax.engine.programs.selection import Selecting
from sparsejax.engine.programs.state import init_state
from sparsejax.engine.programs.steps import StepOptions, decode_step, mixed_step, prefill_step, serving_decoder
from sparsejax.methods import LayerRoles
from sparsejax.models import Decoder
from sparsejax.models.decoder import abstract_params as model_params

GREEDY = StepOptions(plain=True)


def lowered(step, make_work, *, tokens, options=GREEDY, selects=False, implementation=None, **layout_options):
    """(text, arguments to be donated) of a step of two layers of Llama-3.1-8B."""
    config = dataclasses.replace(model_config("llama-3.1-8b"), num_layers=2)
    decoder = serving_decoder(config, jnp.bfloat16, implementation)
    layout = CacheLayout(
        num_layers=2, num_kv_heads=8, head_dim=128, num_pages=1 << 17, max_rows=8, max_slots=131072, page_size=32,
        granularity="shared", dtype=jnp.bfloat16, **layout_options,
    )  # fmt: skip
    token = jnp.zeros(tokens, jnp.int32)
    params = jax.eval_shape(
        lambda: decoder.init(
            jax.random.key(0), token, token, None, lambda layer, q, k, v, raw, cache: (q, cache), method="hidden_states"
        )
    )["params"]
    cache = jax.eval_shape(lambda: init_cache(layout))
    state = jax.eval_shape(lambda: init_state(layout.num_rows, config.vocab_size, selects=selects))
    step = functools.partial(step, decoder=decoder, options=options)
    text = lower_for_h200(step, params, cache, state, make_work(), donate_argnums=(1, 2))
    return text, len(jax.tree.leaves((cache, state)))


def test_prefill_step_lowers_for_hopper_with_its_kernels_and_in_place():
    text, donated = lowered(prefill_step, lambda: pack([], size=512, segments=16, eos_token_ids=()), tokens=512)
    # All layers share one lowered kernel for attention, one for the gated product, and one for the K/V store.
    assert (mosaic_calls(text), triton_calls(text)) == (2, 1)
    assert donated_arguments(text) == donated


@pytest.mark.parametrize(
    ("tokens", "implementation", "kernels"),
    # Attention and the gated product; the products that are added to the residual stream, which differ in shape.
    [(64, None, 1), (2048, None, 4), (2048, "triton", 1)],
)
def test_products_of_many_tokens_are_kernels(tokens, implementation, kernels):
    text, donated = lowered(
        prefill_step,
        lambda: pack([], size=tokens, segments=16, eos_token_ids=()),
        tokens=tokens,
        implementation=implementation,
    )
    # What comes out of an exported kernel belongs to the abstract device, and nothing else: two copies of one kernel.
    assert len({line for line in text.splitlines() if "custom_call @mosaic_gpu" in line}) == kernels
    assert donated_arguments(text) == donated


# Norms behind a residual add, without one (the first), and without use for the sum (the last); rotating and storing.
PROJECTION = 4


def test_decode_step_lowers_with_one_kernel_between_projection_and_attention():
    text, donated = lowered(decode_step, lambda: jnp.zeros(4, jnp.int32), tokens=4)
    assert (mosaic_calls(text), triton_calls(text)) == (0, PROJECTION + 2)
    assert "rotate_and_store" in text
    assert '"store_kv"' not in text
    assert donated_arguments(text) == donated


@pytest.mark.parametrize(
    ("roles", "everyone", "kernels"),
    [
        # Spans and merge of both layers; three more make probabilities, eight choose of a long row.
        (("observe", "follow"), True, 2 * 2 + 3 + 8),
        (("observe", "follow"), False, 2 * 2 + 3 + 8 + 2),
        # Bounds are updated and read; a row of 4,096 pages is one program.
        (("all", "pages"), True, 2 * 2 + 2 + 1),
    ],
)
def test_decode_steps_that_select_lower_in_place(roles, everyone, kernels):
    select = Selecting(((1, LayerRoles(roles)),), width=4096, everyone=everyone)
    text, donated = lowered(
        decode_step, lambda: jnp.zeros(8, jnp.int32), tokens=8, options=StepOptions(select=select), selects=True,
        with_bounds="pages" in roles,
    )  # fmt: skip
    assert triton_calls(text) == PROJECTION + kernels
    assert donated_arguments(text) == donated


def test_a_step_over_compressed_requests_lowers_with_its_kernels_and_in_place():
    config = dataclasses.replace(model_config("llama-3.1-8b"), num_layers=2)
    decoder = Decoder(config, jnp.bfloat16)
    compressor = CompressorConfig(num_layers=2, kv_dim=2048, kv_compressed_size=512)
    spec = StoreSpec(compressor, StoreGeometry(sinks=16, step=10, recent=128), config.rope)
    store = Store(spec, (0,), {}, "int4")
    layout = store.layout(
        config, entries=Entries(9000, 4000, 8000), dtype=jnp.bfloat16, max_rows=8, max_slots=32768, page_size=32
    )

    def half(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), tree)

    params = {
        **half(model_params(config, jnp.bfloat16)),
        "compressor": {"layers_1": half(abstract_params(compressor))["layers_1"]},
    }
    cache = jax.eval_shape(lambda: init_delta_cache(layout))
    state = jax.eval_shape(lambda: init_state(layout.num_rows, config.vocab_size, stores=True))
    batch = pack([], size=512, segments=16, eos_token_ids=(), stores=True)
    rows = jax.ShapeDtypeStruct((8,), jnp.int32)
    options = StepOptions(store=StoreOptions(spec, chunk=True, dense=True, compressed=True, top=2048))
    step = functools.partial(mixed_step, decoder=decoder, options=options)
    text = lower_for_h200(step, params, cache, state, batch, rows, rows, donate_argnums=(1, 2))
    # Attention of the chunk in the full and in the sparse layer; the many others are Triton's.
    assert mosaic_calls(text) == 2
    assert triton_calls(text) > 10
    assert donated_arguments(text) == len(jax.tree.leaves((cache, state)))
    rings = functools.partial(compress_full_rings, spec=spec, implementation=None)
    text = lower_for_h200(rings, params, cache, rows, rows, donate_argnums=1)
    assert triton_calls(text) >= 3
    assert donated_arguments(text) == len(jax.tree.leaves(cache))
