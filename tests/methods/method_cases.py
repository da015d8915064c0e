"""Slots with known contents, built from dense arrays, for the tests of scorers and budget rules."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.methods import Slots
from sparsejax.methods.protection import protected_slots


@dataclass(frozen=True)
class Case:
    """What `Slots` hold, as dense numpy arrays: live, position, score [L, K, H, S], k and v [L, K, H, S, D]."""

    live: np.ndarray
    position: np.ndarray
    score: np.ndarray
    k: np.ndarray
    v: np.ndarray
    text_length: np.ndarray
    sinks: int = 0
    recent: int = 0
    window: int = 0
    recorded: int = 1
    seed: int = 0
    group: int = 2
    page_size: int = 4

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def protected(self) -> np.ndarray:
        text_length = self.text_length[:, None, None]
        old = self.position < self.sinks
        return self.live & (old | (self.position >= text_length - self.recent))

    def permuted(self, order: np.ndarray) -> Case:
        """The same slots in another order, i64[L, K, H, S]; dead ones may come to lie between live ones."""
        take = lambda x: np.take_along_axis(x, order, axis=-1)  # noqa: E731
        vectors = lambda x: np.take_along_axis(x, order[..., None], axis=-2)  # noqa: E731
        return self.replace(
            live=take(self.live),
            position=take(self.position),
            score=take(self.score),
            k=vectors(self.k),
            v=vectors(self.v),
        )

    def slots(self) -> Slots:
        """As `gather_slots` gives them. Keys and values of dead slots are NaN in the pool: no method may see them."""
        layers, rows, heads, count = self.live.shape
        columns = count // self.page_size
        pages = np.arange(layers * rows * heads * columns, dtype=np.int32)
        # Pages lie in no order in a pool.
        pages = np.random.default_rng(0).permutation(pages).reshape(layers, rows, heads, columns)
        pools = []
        for values in (self.k, self.v):
            values = np.where(self.live[..., None], values, np.nan)
            pool = np.zeros((pages.size, self.page_size, values.shape[-1]), np.float32)
            pool[pages] = values.reshape(*pages.shape, self.page_size, -1)
            pools.append(jnp.asarray(pool))
        position = jnp.asarray(np.where(self.live, self.position, -1), jnp.int32)
        row = lambda value: jnp.full(rows, value, jnp.int32)  # noqa: E731
        text_length = jnp.asarray(self.text_length, jnp.int32)
        protected = protected_slots(position, text_length[:, None, None], jnp.int32(self.sinks), jnp.int32(self.recent))
        return Slots(
            score=jnp.asarray(np.where(self.live, self.score, 0), jnp.float32),
            position=position,
            live=jnp.asarray(self.live),
            protected=protected & jnp.asarray(self.live),
            text_length=text_length,
            window_tokens=row(self.window),
            recorded=row(self.recorded),
            seed=jnp.full(rows, self.seed, jnp.uint32),
            pages=jnp.asarray(pages),
            k_pages=pools[0],
            v_pages=pools[1],
            moments=None,
            num_query_heads=heads * self.group,
        )


def random_case(
    seed: int,
    *,
    layers: int = 3,
    rows: int = 2,
    heads: int = 2,
    slots: int = 24,
    head_dim: int = 8,
    text_length: int | None = None,
    ragged: bool = False,
    **options,
) -> Case:
    """Rows in text order that hold all of a text of `text_length` tokens (None: `slots`), or, if `ragged`, each head a
    random part of it that contains the sinks and the recent tokens."""
    rng = np.random.default_rng(seed)
    text_length = slots if text_length is None else text_length
    sinks, recent = options.get("sinks", 0), options.get("recent", 0)
    shape = (layers, rows, heads, slots)
    position = np.full(shape, -1, np.int64)
    for lane in np.ndindex(*shape[:3]):
        known = np.arange(text_length)
        if ragged or text_length > slots:
            must = (known < sinks) | (known >= text_length - recent)
            free = known[~must]
            most = min(free.size, slots - int(must.sum()))
            some = rng.permutation(free)[: rng.integers(0 if ragged else most, most + 1)]
            known = np.sort(np.concatenate([known[must], some]))
        position[lane][: known.size] = known
    return Case(
        live=position >= 0,
        position=position,
        score=rng.random(shape).astype(np.float32),
        k=rng.normal(size=(*shape, head_dim)).astype(np.float32),
        v=rng.normal(size=(*shape, head_dim)).astype(np.float32),
        text_length=np.full(rows, text_length),
        **options,
    )


def random_order(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """i64[L, K, H, S]: a permutation of the slots of each lane."""
    return np.argsort(np.random.default_rng(seed).random(shape), axis=-1)


def attention_sums(q: np.ndarray, k: np.ndarray, first: int, power: int = 1) -> np.ndarray:
    """f64[H, T]: what the queries at positions >= first give each key of one layer of one text, causally.

    q [T, H, G, D], k [T, H, D], row by row in float64: the recorded score by its definition.
    """
    tokens, heads, group, dim = q.shape
    total = np.zeros((heads, tokens))
    for t in range(first, tokens):
        for h in range(heads):
            for g in range(group):
                logits = k[: t + 1, h].astype(np.float64) @ q[t, h, g].astype(np.float64) / np.sqrt(dim)
                p = np.exp(logits - logits.max())
                total[h, : t + 1] += (p / p.sum()) ** power
    return total


@functools.partial(jax.jit, static_argnames="method")
def _scores(method, slots):
    return method.scores(slots)


@functools.partial(jax.jit, static_argnames="rule")
def _keep(rule, scores, slots, budget):
    return rule.keep(scores, slots, budget)


def scores(method, case: Case) -> np.ndarray:
    """f32[L, K, H, S]: the method's scores of a case."""
    return np.asarray(_scores(method, case.slots()))


def keep(rule, case: Case, budget, scores: np.ndarray | None = None) -> np.ndarray:
    """bool[L, K, H, S]: what the rule keeps by `scores` (None: the case's own); budget an int or one a row."""
    budget = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), case.text_length.shape)
    return np.asarray(
        _keep(rule, jnp.asarray(case.score if scores is None else scores, jnp.float32), case.slots(), budget)
    )
