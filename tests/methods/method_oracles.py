"""Slow float64 formulas to hold the scorers against, and views with what these scorers need beyond keys and values."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from method_cases import Case

from sparsejax.methods import QueryMoments, Slots


def rope_angles(position, dim):
    """(cos, sin), each f32[..., dim / 2], of half-split RoPE with base 100."""
    frequency = (100.0 ** -(np.arange(0, dim, 2) / dim)).astype(np.float32)
    angle = jnp.asarray(position, jnp.float32)[..., None] * frequency
    return jnp.cos(angle), jnp.sin(angle)


def keys_before_rope(k, position):
    """f64[..., D]: keys k [..., D] at position [...], turned back."""
    cos, sin = (np.asarray(part, np.float64) for part in rope_angles(np.maximum(position, 0), k.shape[-1]))
    first, second = np.split(k.astype(np.float64), 2, axis=-1)
    return np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def full_view(case: Case, *, moments: QueryMoments | None = None, kernels: np.ndarray | None = None) -> Slots:
    """The case's slots with RoPE angles, moments of queries, and output projections [L, Hq, D, d_model]."""
    dim = case.k.shape[-1]
    return dataclasses.replace(
        case.slots(),
        rope=lambda position: rope_angles(position, dim),
        moments=moments,
        output_kernel=None if kernels is None else lambda index: jnp.asarray(kernels[index], jnp.float32),
    )


def one_row(slots: Slots, row: int) -> Slots:
    """The view of a single row, as if it were planned alone."""
    lanes = {
        name: getattr(slots, name)[:, row : row + 1] for name in ("score", "position", "live", "protected", "pages")
    }
    each = {name: getattr(slots, name)[row : row + 1] for name in ("text_length", "window_tokens", "recorded", "seed")}
    moments = jax.tree.map(lambda leaf: leaf[:, row : row + 1], slots.moments)
    return dataclasses.replace(slots, **lanes, **each, moments=moments)


def thinned(case: Case, counts, seed: int = 0) -> Case:
    """The case after an eviction: each head holds `counts`, broadcastable to [L, K, H], of its tokens, at random."""
    rng = np.random.default_rng(seed)
    live = np.zeros_like(case.live)
    counts = np.broadcast_to(counts, live.shape[:3])
    for lane in np.ndindex(*live.shape[:3]):
        live[lane][rng.choice(np.flatnonzero(case.live[lane]), counts[lane], replace=False)] = True
    return case.replace(live=live)


def standardised(values):
    """Zero mean, unit variance (biased)."""
    return (values - values.mean()) / np.sqrt(values.var() + 1e-6)


def compactor_oracle(case: Case, sketch, *, chunk, regularization, blend):
    """[L, K, H, S]; zeros where not live."""
    out = np.zeros(case.live.shape)
    before = keys_before_rope(case.k, case.position)
    for layer, row in np.ndindex(*case.live.shape[:2]):
        live = case.live[layer, row]
        attention = np.zeros(live.shape)
        attention[live] = standardised(case.score[layer, row][live].astype(np.float64))
        chunks: dict[int, list[tuple[int, int, float]]] = {}
        for head in range(live.shape[0]):
            held = np.flatnonzero(live[head])
            held = held[np.argsort(case.position[layer, row, head, held])]
            for number, start in enumerate(range(0, len(held), chunk)):
                members = held[start : start + chunk]
                x = before[layer, row, head, members] @ sketch.astype(np.float64)
                x = x - x.mean(0)
                gram = x.T @ x + regularization * np.eye(x.shape[1])
                leverage = np.einsum("ti,ij,tj->t", x, np.linalg.inv(gram), x)
                chunks.setdefault(number, []).extend(
                    (head, slot, value) for slot, value in zip(members, leverage, strict=True)
                )
        for members in chunks.values():
            values = standardised(np.array([value for _, _, value in members]))
            for (head, slot, _), value in zip(members, values, strict=True):
                out[layer, row, head, slot] = attention[head, slot] + blend * value
    return out


def greedy_pages_oracle(score, position, live, protected, *, budget, page_size):
    """Kept slots of one request, bool[L, H, S], by the greedy walk of KV-Compress.

    Page by page, the head whose next page costs least frees it; equal costs go to the first layer and head. The tokens
    of a head go in ascending order of (score, position); the first page it frees is its last, partly filled one, and
    costs the score of the worst token that must go to empty it.
    """
    layers, heads, _ = live.shape
    lanes = list(np.ndindex(layers, heads))
    queue, hang, pages = {}, {}, 0
    for lane in lanes:
        slots = np.flatnonzero(live[lane] & ~protected[lane])
        values = np.nan_to_num(score[lane][slots], nan=-np.inf)
        queue[lane] = slots[np.lexsort((position[lane][slots], values))]
        held = int(live[lane].sum())
        hang[lane] = (held - 1) % page_size + 1
        pages += math.ceil(held / page_size)
    excess = pages - math.ceil(budget / page_size) * layers * heads
    freed = dict.fromkeys(lanes, 0)
    for _ in range(max(excess, 0)):
        best = None
        for lane in lanes:
            last = freed[lane] * page_size + hang[lane] - 1
            if last < len(queue[lane]):
                cost = np.nan_to_num(score[lane][queue[lane][last]], nan=-np.inf)
                if best is None or cost < best[0]:
                    best = (cost, lane)
        if best is None:
            break
        freed[best[1]] += 1
    keep = live.copy()
    for lane in lanes:
        if freed[lane]:
            keep[lane][queue[lane][: (freed[lane] - 1) * page_size + hang[lane]]] = False
    return keep


def random_moments(seed, *, layers, rows, query_heads, dim, count=50) -> QueryMoments:
    """Sums over `count` queries that are normal about a random mean."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((count, layers, rows, query_heads, dim)) + rng.standard_normal(dim)
    return QueryMoments(
        first=jnp.asarray(q.sum(0), jnp.float32),
        second=jnp.asarray(np.einsum("nlkhd,nlkhe->lkhde", q, q), jnp.float32),
        count=jnp.full((layers, rows), count, jnp.float32),
    )


def expected_attention_oracle(case: Case, moments, *, future, skip, epsilon, use_covariance, use_vnorm):
    """[L, K, H, S]; zeros where not live. Rotates with a full matrix, head by head."""
    out = np.zeros(case.live.shape)
    dim = case.k.shape[-1]
    group = case.group
    for layer, row, head in np.ndindex(*case.live.shape[:3]):
        live = case.live[layer, row, head]
        counted = live & (case.position[layer, row, head] >= skip)
        k = case.k[layer, row, head].astype(np.float64)
        cos, sin = rope_angles(int(case.text_length[row]) + np.arange(future), dim)
        cos, sin = (np.diag(np.asarray(part, np.float64).mean(0)) for part in (cos, sin))
        rotation = np.block([[cos, -sin], [sin, cos]])
        total = np.zeros(live.shape)
        for each in range(head * group, (head + 1) * group):
            count = float(moments.count[layer, row])
            mean = np.asarray(moments.first[layer, row, each], np.float64) / count
            covariance = np.asarray(moments.second[layer, row, each], np.float64) / count - np.outer(mean, mean)
            logits = k @ (rotation @ mean) / math.sqrt(dim)
            if use_covariance:
                logits += np.einsum("si,ij,sj->s", k, rotation @ covariance @ rotation.T, k) / (2 * dim)
            weights = np.exp(logits - logits[counted].max())
            total += np.minimum(weights / weights[counted].sum(), 1.0)
        score = total / group
        if use_vnorm:
            score = (score + epsilon) * np.linalg.norm(case.v[layer, row, head].astype(np.float64), axis=-1)
        out[layer, row, head] = np.where(live, score, 0.0)
    return out
