"""The view of some rows' slots that a method scores: what was recorded of each, and keys and values on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp

from sparsejax.cache import KVCache
from sparsejax.methods.observed import ObservedQueries
from sparsejax.methods.protection import protected_slots

# positions i32[K, ...] -> (cos, sin), each f32[K, ..., D / 2], as the keys were rotated, scale included.
RopeAngles = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
# layer -> [Hq, D, d_model], the attention's output projection.
OutputKernel = Callable[[int], jax.Array]


@partial(jax.tree_util.register_dataclass, data_fields=["first", "second", "count"], meta_fields=[])
@dataclass(frozen=True)
class QueryMoments:
    """Sums over a prompt's queries before RoPE; L is absent in the view of one layer.

    Attributes:
      first: f32[L, K, Hq, D], the sum of the queries.
      second: f32[L, K, Hq, D, D], the sum of their outer products.
      count: f32[L, K], how many.
    """

    first: jax.Array
    second: jax.Array
    count: jax.Array


@dataclass(frozen=True)
class LayerSlots:
    """One layer of `Slots`. K rows, H KV heads, S slots of each, D numbers a key, G = Hq / H query heads a KV head.

    The order of the slots means nothing: use `position`. Slots that are not `live` hold zeros, and position -1.

    Attributes:
      index: which layer; an int if the method unrolls layers, else i32[].
      score: f32[K, H, S], what was recorded.
      position: i32[K, H, S], position of the slot's token in its text.
      live: bool[K, H, S], whether the slot holds a token.
      protected: bool[K, H, S], whether the slot is kept whatever its score.
      text_length: i32[K], tokens of the text so far, evicted ones included.
      window_tokens: i32[K], observation window of the request.
      recorded: i32[K], queries that added to `score`.
      seed: u32[K], of the request.
      moments: of the layer's queries, or None.
      num_query_heads: Hq.
      in_text_order: the live slots are known to lie at the front, in the order of their positions.
    """

    index: int | jax.Array
    score: jax.Array
    position: jax.Array
    live: jax.Array
    protected: jax.Array
    text_length: jax.Array
    window_tokens: jax.Array
    recorded: jax.Array
    seed: jax.Array
    moments: QueryMoments | None
    num_query_heads: int
    in_text_order: bool
    _pages: jax.Array = field(repr=False)
    _k_pages: jax.Array = field(repr=False)
    _v_pages: jax.Array = field(repr=False)
    _rope: RopeAngles | None = field(repr=False)
    _output_kernel: OutputKernel | None = field(repr=False)

    @property
    def k(self) -> jax.Array:
        """dtype[K, H, S, D]: keys, after RoPE; read from the pages where it is used."""
        return self._gather(self._k_pages)

    @property
    def v(self) -> jax.Array:
        """dtype[K, H, S, D]: values; read from the pages where they are used."""
        return self._gather(self._v_pages)

    @property
    def group_size(self) -> int:
        """G: query heads that share a KV head."""
        return self.num_query_heads // self.live.shape[1]

    def rope(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cos, sin), each f32[K, ..., D / 2], of the rotation at `position` i32[K, ...].

        Raises:
          ValueError: the view was gathered without RoPE angles.
        """
        if self._rope is None:
            raise ValueError("RoPE angles were not given to gather_slots; this method needs them.")
        return self._rope(position)

    def k_before_rope(self) -> jax.Array:
        """f32[K, H, S, D]: keys with their rotation (and its scale) undone; half-split layout, as in the decoder.

        Raises:
          ValueError: the view was gathered without RoPE angles.
        """
        cos, sin = self.rope(jnp.maximum(self.position, 0))
        first, second = jnp.split(self.k.astype(jnp.float32), 2, axis=-1)
        scale = 1.0 / (cos * cos + sin * sin)
        return jnp.concatenate([(first * cos + second * sin) * scale, (second * cos - first * sin) * scale], axis=-1)

    def output_kernel(self) -> jax.Array:
        """[Hq, D, d_model]: the output projection of the layer's attention.

        Raises:
          ValueError: the view was gathered without it, or the method does not set `unrolls_layers`.
        """
        if self._output_kernel is None:
            raise ValueError("the output projection was not given to gather_slots; this method needs it.")
        if not isinstance(self.index, int):
            raise ValueError("a method that uses output_kernel must set unrolls_layers = True.")
        return self._output_kernel(self.index)

    def _gather(self, pages: jax.Array) -> jax.Array:
        found = pages[self._pages]  # [K, H, M, page_size, D]
        found = found.reshape(*self.live.shape, found.shape[-1])
        return jnp.where(self.live[..., None], found, 0)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "score",
        "position",
        "live",
        "protected",
        "text_length",
        "window_tokens",
        "recorded",
        "seed",
        "pages",
        "k_pages",
        "v_pages",
        "moments",
        "budget",
        "observed",
    ],
    meta_fields=["num_query_heads", "in_text_order", "rope", "output_kernel"],
)
@dataclass(frozen=True)
class Slots:
    """The slots of K rows in all L layers and H KV heads, S of each; see `LayerSlots` for what the fields mean.

    Attributes:
      score: f32[L, K, H, S].
      position: i32[L, K, H, S], -1 at slots that are not live.
      live: bool[L, K, H, S].
      protected: bool[L, K, H, S], only at live slots.
      text_length, window_tokens, recorded: i32[K].
      seed: u32[K].
      pages: i32[L, K, H, S / page_size], page of each run of slots.
      k_pages, v_pages: dtype[P, page_size, D], the cache's pool.
      moments: sums over the queries, or None.
      budget: i32[K], tokens to keep per layer and head, on average; for methods that choose in stages, or None.
      observed: where the `recorded` queries stand; None: they are the last ones of the text.
      num_query_heads: Hq, static.
      in_text_order: static; the live slots are known to lie at the front, in the order of their positions, as they do
        until something is evicted.
      rope: angles by position, or None.
      output_kernel: output projection by layer, or None.
    """

    score: jax.Array
    position: jax.Array
    live: jax.Array
    protected: jax.Array
    text_length: jax.Array
    window_tokens: jax.Array
    recorded: jax.Array
    seed: jax.Array
    pages: jax.Array
    k_pages: jax.Array
    v_pages: jax.Array
    moments: QueryMoments | None
    num_query_heads: int
    in_text_order: bool = False
    rope: RopeAngles | None = None
    output_kernel: OutputKernel | None = None
    budget: jax.Array | None = None
    observed: ObservedQueries | None = None

    @property
    def num_layers(self) -> int:
        """L."""
        return self.live.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """H."""
        return self.live.shape[2]

    @property
    def group_size(self) -> int:
        """G: query heads that share a KV head."""
        return self.num_query_heads // self.num_kv_heads

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self.k_pages.shape[1]

    def layer(self, index: int | jax.Array) -> LayerSlots:
        """The view of one layer; `index` an int, or i32[] inside a loop."""
        return LayerSlots(
            index=index,
            score=self.score[index],
            position=self.position[index],
            live=self.live[index],
            protected=self.protected[index],
            text_length=self.text_length,
            window_tokens=self.window_tokens,
            recorded=self.recorded,
            seed=self.seed,
            moments=jax.tree.map(lambda leaf: leaf[index], self.moments),
            num_query_heads=self.num_query_heads,
            in_text_order=self.in_text_order,
            _pages=self.pages[index],
            _k_pages=self.k_pages,
            _v_pages=self.v_pages,
            _rope=self.rope,
            _output_kernel=self.output_kernel,
        )


def gather_slots(
    cache: KVCache,
    rows: jax.Array,
    *,
    max_slots: int,
    text_length: jax.Array,
    sink_tokens: jax.Array,
    recent_tokens: jax.Array,
    window_tokens: jax.Array,
    recorded: jax.Array,
    seed: jax.Array,
    num_query_heads: int,
    in_text_order: bool = False,
    moments: QueryMoments | None = None,
    budget: jax.Array | None = None,
    observed: ObservedQueries | None = None,
    rope: RopeAngles | None = None,
    output_kernel: OutputKernel | None = None,
) -> Slots:
    """The slots of K rows. Scores and positions are read now, keys and values where a method asks for them.

    Args:
      cache: with granularity "per_head", scores and positions.
      rows: i32[K]; the null row is empty.
      max_slots: static bound on the tokens that a head of these rows holds; S is it rounded up to whole pages, and at
        most what a row can hold.
      text_length: i32[K], tokens of each text so far, evicted ones included.
      sink_tokens: i32[K], first positions that are protected.
      recent_tokens: i32[K], last positions that are protected.
      window_tokens: i32[K], observation window.
      recorded: i32[K], queries that added to the scores.
      seed: u32[K], of each request.
      num_query_heads: Hq.
      in_text_order: nothing was ever evicted from these rows, so their slots lie in the order of the text.
      moments: sums over the queries of these rows, for methods that record them.
      budget: i32[K], tokens to keep per layer and head, on average, for methods that choose in stages.
      observed: where the recorded queries stand, if they are not the last ones.
      rope: rotation angles by position, for methods that undo the rotation.
      output_kernel: output projection by layer, for methods that weigh values with it.

    Raises:
      ValueError: the cache has no table per head, no scores or no positions.
    """
    layout, pool = cache.layout, cache.pool
    if layout.granularity != "per_head" or pool.score is None or pool.position is None:
        raise ValueError(
            'the cache must have granularity "per_head", scores and positions; got '
            f"{layout.granularity!r}, with_score={layout.with_score}, with_position={layout.with_position}."
        )
    columns = min(-(-max_slots // layout.page_size), layout.max_entries_per_row)
    pages = cache.table.pages[:, rows, :, :columns]  # [L, K, H, columns]
    shape = (*pages.shape[:3], columns * layout.page_size)
    held = jnp.arange(shape[-1], dtype=jnp.int32) < cache.table.length[:, rows][..., None]
    position = pool.position[pages].reshape(shape)
    live = held & (position >= 0)
    position = jnp.where(live, position, -1)
    lane = (slice(None), None, None)
    return Slots(
        score=jnp.where(live, pool.score[pages].reshape(shape), 0.0),
        position=position,
        live=live,
        protected=live & protected_slots(position, text_length[lane], sink_tokens[lane], recent_tokens[lane]),
        text_length=text_length,
        window_tokens=window_tokens,
        recorded=recorded,
        seed=seed,
        pages=pages,
        k_pages=pool.k,
        v_pages=pool.v,
        moments=moments,
        budget=budget,
        observed=observed,
        num_query_heads=num_query_heads,
        in_text_order=in_text_order,
        rope=rope,
        output_kernel=output_kernel,
    )
