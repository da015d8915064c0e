"""The reconstruction pass: the model repeats a text over its own cache, and each slot notes the most attention it got.

    cache = reconstruct(params, cache, batch, decoder=..., implementation=...)

For methods that score by it (KVzip). The tokens of a pass attend to the row and, causally, to each other; their K and V
are not kept. Costs a prefill of the pass's tokens behind the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from sparsejax.cache import KVCache
from sparsejax.engine.programs.recording import attend_chunk
from sparsejax.engine.programs.steps import apply_decoder
from sparsejax.engine.scheduling import buckets
from sparsejax.engine.scheduling.plan import Compress
from sparsejax.methods import KVzip
from sparsejax.models import Decoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReconstructBatch:
    """One pass over one row.

    Attributes:
      tokens, positions, rope_lengths: i32[T], as in a prefill.
      row: i32[], table row of the text.
      count: i32[], live tokens.
    """

    tokens: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    rope_lengths: jax.Array | np.ndarray
    row: jax.Array | np.ndarray
    count: jax.Array | np.ndarray


def reconstruct(
    params, cache: KVCache, batch: ReconstructBatch, *, decoder: Decoder, implementation: Implementation | None
) -> KVCache:
    """Runs a pass; raises each slot's score to the largest probability that a query of the pass gives it."""
    rows = jnp.asarray(batch.row)[None]
    starts = jnp.stack([jnp.zeros((), jnp.int32), jnp.asarray(batch.count)])
    history = cache.table.length

    def attend(layer, q, k, v, k_pre_rope, cache):
        del k_pre_rope
        return attend_chunk(
            cache,
            layer,
            q,
            k,
            v,
            history=history,
            rows=rows,
            starts=starts,
            first=jnp.zeros(1, jnp.int32),
            power=jnp.ones(1, jnp.int32),
            own=False,
            reduce="max",
            implementation=implementation,
        )

    _, cache = apply_decoder(
        decoder,
        params,
        jnp.asarray(batch.tokens),
        jnp.asarray(batch.positions),
        cache,
        attend,
        rope_lengths=jnp.asarray(batch.rope_lengths),
        method="hidden_states",
    )
    return cache


@dataclass(frozen=True)
class Reconstruction:
    """How texts are repeated.

    Attributes:
      first_instruction, next_instruction: token ids of what asks for the first part and for the others.
      longest: most tokens of a text.
    """

    first_instruction: tuple[int, ...]
    next_instruction: tuple[int, ...]
    longest: int

    def batches(self, entry: Compress) -> Iterator[ReconstructBatch]:
        """The passes over the text that an entry compresses (numpy)."""
        request, length = entry.request, entry.text_length
        method = request.compression.policy
        assert isinstance(method, KVzip)
        passes = method.reconstruction_passes(
            request.tokens[:length],
            first_instruction=self.first_instruction,
            next_instruction=self.next_instruction,
        )
        size = buckets.bucket(max(len(each.tokens) for each in passes), self._sizes(method))
        for each in passes:
            count = len(each.tokens)
            tokens, positions = np.zeros(size, np.int32), np.zeros(size, np.int32)
            tokens[:count] = each.tokens
            positions[:count] = length + np.arange(count)
            yield ReconstructBatch(
                tokens=tokens,
                positions=positions,
                rope_lengths=np.maximum(positions + 1, len(request.prompt_token_ids)),
                row=np.asarray(request.row or 0, np.int32),
                count=np.asarray(count, np.int32),
            )

    def idle_batches(self, method: KVzip) -> Iterator[ReconstructBatch]:
        """Passes of every size that the method's texts can need, without tokens, over the null row."""
        none = np.asarray(0, np.int32)
        for size in self._sizes(method):
            idle = np.zeros(size, np.int32)
            yield ReconstructBatch(tokens=idle, positions=idle, rope_lengths=idle + 1, row=none, count=none)

    def _sizes(self, method: KVzip) -> tuple[int, ...]:
        """Token counts that passes are padded to: few, for each costs a compilation of the whole model."""
        instruction = max(len(self.first_instruction), len(self.next_instruction) + method.lead_in_tokens)
        most = instruction + min(method.chunk_tokens, self.longest)
        unit = buckets.SMALLEST_PREFILL
        return buckets.prefill_buckets(-(-most // unit) * unit)
