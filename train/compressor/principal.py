"""A linear compressor in closed form: principal components of what a signal is beside its reference.

Without biases, the projections that lose the least of the differences d = x - r (in the squared error) are the leading
eigenvectors of the sum of d d^T (Eckart and Young, 1936). That is where training starts with `--init pca`: it takes the
teacher's signals of a few sequences, one pass over them, and no gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from sparsejax.compressor import CompressorConfig
from sparsejax.compressor.reconstruct import differences
from sparsejax.errors import InvalidArgumentError
from train.compressor.data import Rows, check_tokens
from train.compressor.forward import TwoPass

PRINCIPAL = "pca"
TOKENS = 1 << 17  # more change the components little: a few hundred for each number of a signal


def require_linear(config: CompressorConfig) -> None:
    """Raises InvalidArgumentError unless the projections can be principal components."""
    if (config.down_type, config.up_type) != ("linear", "linear") or config.split_kv:
        raise InvalidArgumentError(
            f"init {PRINCIPAL!r} needs down_type and up_type 'linear' and no split_kv; got {config.down_type!r} and "
            f"{config.up_type!r}{', split_kv' if config.split_kv else ''}."
        )
    if config.kv_compressed_size > config.kv_dim:
        raise InvalidArgumentError(
            f"init {PRINCIPAL!r} needs kv_compressed_size of at most {config.kv_dim}, the numbers of a token; got "
            f"{config.kv_compressed_size}."
        )


def principal_params(passes: TwoPass, frozen: Any, rows: Rows, *, progress: bool) -> dict[str, Any]:
    """Parameters of all layers, float32 on the host, as `sparsejax.compressor.init_params` lays them out.

    Args:
      passes: with a compressor that `require_linear` accepts.
      frozen: the model, in the type of the passes.
      rows: the first of them, `TOKENS` tokens together, are looked at. All processes look at their own devices' share.
      progress: show a progress bar.
    """
    config, placement = passes.compressor, passes.placement
    require_linear(config)
    local, processes, process = jax.local_device_count(), jax.process_count(), jax.process_index()
    batches = max(1, min(-(-TOKENS // (rows.length * local * processes)), len(rows) // (local * processes)))

    @jax.jit
    def moments(tokens: jax.Array, documents: jax.Array | None) -> jax.Array:
        """f32[L, F, F]: sums of d d^T over the tokens that are compressed."""

        def one(signal: jax.Array) -> jax.Array:
            d = differences(config, signal)
            exact = jax.lax.Precision.HIGHEST if d.dtype == jnp.float32 else None
            return jnp.einsum("btf,btg->fg", d, d, precision=exact, preferred_element_type=jnp.float32)

        return jax.lax.map(one, passes.teacher_signals(frozen, tokens, documents))

    total = np.zeros((config.num_layers, config.kv_dim, config.kv_dim))
    for number in tqdm(range(batches), desc="components", unit="batch", disable=not progress):
        first = (number * processes + process) * local
        found = [rows[(first + index) % len(rows)] for index in range(local)]
        for row in found:
            check_tokens(row["tokens"], passes.model.vocab_size)
        tokens, documents = (
            placement.put_batch(np.stack([row[name] for row in found])[None])[0] if name in found[0] else None
            for name in ("tokens", "documents")
        )
        assert tokens is not None
        total += np.asarray(moments(tokens, documents), np.float64)

    def projections(moment: np.ndarray) -> dict[str, Any]:
        _, vectors = np.linalg.eigh(moment)  # ascending
        leading = vectors[:, ::-1][:, : config.kv_compressed_size].astype(np.float32)
        pair: dict[str, Any] = {"down": {"out": {"kernel": leading}}, "up": {"out": {"kernel": leading.T.copy()}}}
        if config.bias:
            for name, projection in pair.items():
                size = leading.shape[1] if name == "down" else leading.shape[0]
                projection["out"]["bias"] = np.zeros(size, np.float32)
        return pair

    return {f"layers_{index}": projections(moment) for index, moment in enumerate(total)}
