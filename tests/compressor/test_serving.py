"""What serving stores and reads back with the DeltaKV kernels is what training reconstructs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    DeltaLayout,
    DeltaStore,
    PageAddress,
    delta_compress,
    delta_reconstruct,
    init_latents,
    reference_mean,
    reference_search,
    store_kv,
    store_latents,
)
from sparsejax.compressor import (
    Compressor,
    CompressorConfig,
    center_count,
    center_ordinals,
    init_params,
    is_center,
    latent_ordinals,
    reconstruct,
)

HEADS, DIM, SIZE, PAGE, LENGTH = 2, 16, 32, 4, 45
MODES = [
    pytest.param({"implementation": "xla"}, id="xla"),
    pytest.param({"implementation": "triton"}, id="native", marks=pytest.mark.gpu),
]


def slots_of(ordinals):
    """(entries i32[N], in-page slots i32[N]) of logical slots in a row whose entries are 1, 2, 3, ..."""
    return jnp.asarray(ordinals // PAGE + 1, jnp.int32), jnp.asarray(ordinals % PAGE, jnp.int32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("up_type", ["linear", "mlp_gelu"])
def test_a_text_is_read_back_as_training_reads_it(up_type, mode):
    config = CompressorConfig(
        num_layers=1, kv_dim=2 * HEADS * DIM, kv_compressed_size=SIZE, sink_tokens=3, cluster_ratio=0.25,
        down_type=up_type, up_type=up_type, bias=True,
    )  # fmt: skip
    params = jax.tree.map(lambda leaf: 10 * leaf, init_params(config, jax.random.key(0))["layers_0"])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((LENGTH, config.kv_dim)), jnp.float32)
    geometry = {"sinks": config.sink_tokens, "step": config.step}
    near, latent = PageAddress(0, HEADS, 0, 1), PageAddress(0, 1, 0, 1)
    table = jnp.asarray([[[[0] * 16], [list(range(1, 17))]]], jnp.int32)

    kept = np.flatnonzero(is_center(np.arange(LENGTH), **geometry))
    keys, values = x[kept].reshape(-1, 2, HEADS, DIM).swapaxes(0, 1)
    entry, slot = (a[None, :, None] for a in slots_of(center_ordinals(kept, **geometry)))
    pool = jnp.full((17 * HEADS, PAGE, DIM), jnp.nan)
    pools = store_kv(pool, pool, keys, values, entry, slot, address=near, **mode)

    others = np.setdiff1d(np.arange(LENGTH), kept)
    where = (*pools, table, jnp.array([1], jnp.int32), jnp.array([0, others.size], jnp.int32))
    options = {"address": near, "num_kv_heads": HEADS, **mode}
    ids = reference_search(
        x[others], *where, jnp.asarray(others, jnp.int32), neighbors=config.neighbors, **geometry, **options
    )
    compressor = Compressor(config, jnp.float32)
    if up_type == "linear":
        z = delta_compress(x[others], *where, ids, params["down"]["out"]["kernel"], **options)
    else:
        z = compressor.apply({"params": params}, x[others], reference_mean(*where, ids, **options), method="encode")
    latents = init_latents(17, PAGE, size=SIZE, neighbors=config.neighbors, max_centers=100, dtype="float32")
    latents = store_latents(
        latents, jnp.asarray(z), ids, *slots_of(latent_ordinals(others, **geometry)), address=latent
    )

    store = DeltaStore(*pools, table, latents, table)
    one = jnp.ones(1, jnp.int32)
    if up_type == "linear":
        read = {"up": params["up"]["out"]["kernel"], "up_bias": params["up"]["out"]["bias"]}
    else:
        numbers = jnp.zeros((1, LENGTH, SIZE)).at[0, others].set(z)
        read = {"residual": compressor.apply({"params": params}, numbers, None, method="decode")}
    k, v = delta_reconstruct(
        store, one, one, one * LENGTH, one * LENGTH, jnp.ones((1, LENGTH, DIM // 2)), jnp.zeros((1, LENGTH, DIM // 2)),
        layout=DeltaLayout(near, latent, config.sink_tokens, config.step, ring=8), num_kv_heads=HEADS, **read, **mode,
    )  # fmt: skip
    tokens = [pages.reshape(-1, HEADS, PAGE, DIM).swapaxes(1, 2).reshape(-1, HEADS * DIM)[:LENGTH] for pages in (k, v)]
    expected = reconstruct(config, params, x[None])[0]
    assert center_count(LENGTH, **geometry) == kept.size
    assert np.abs(np.asarray(expected - x)).max() > 0.1  # it is not an identity
    np.testing.assert_allclose(jnp.concatenate(tokens, axis=1), expected, rtol=1e-4, atol=1e-4)
