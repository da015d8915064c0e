"""Small random cases of the kernels behind sparse methods and DeltaKV, as those of `kernel_checks`."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

import pallas_kernels as kernels
from pallas_kernels.centers import center_count, latent_count
from sparsejax.cli.kernel_checks import ADDRESS, DIM, GROUP, HEADS, LENGTHS, PAGE, ROWS, draw, error, paged

SCALE = DIM**-0.5
HELD = 1 + np.arange(ROWS - 1, dtype=np.int32)  # the rows that hold something
# A DeltaKV request: 52 tokens that have left the recent window, and 9 recent ones.
HISTORY, RECENT, SINKS, STEP, RING, SIZE, NEIGHBORS = 52, 9, 4, 4, 16, 32, 4


def _decode_scores() -> float:
    rng = np.random.default_rng(10)
    k, v, table, lengths = paged(rng)
    score = jnp.zeros(k.shape[:2], jnp.float32)
    args = (draw(rng, HELD.size, HEADS * GROUP, DIM), k, v, table, lengths, jnp.asarray(HELD))
    options = {"address": ADDRESS, "num_kv_heads": HEADS, "scale": SCALE, "power": jnp.asarray([1, 2], jnp.int32)}
    got = kernels.decode_attention(*args, **options, score=score)
    out, _, expected = kernels.decode_attention_reference(*args, **options, score=score)
    return error(got, (out, expected))


def _slot_probabilities() -> float:
    rng = np.random.default_rng(11)
    k, v, table, lengths = paged(rng)
    q, rows, last = draw(rng, HELD.size, HEADS * GROUP, DIM), jnp.asarray(HELD), jnp.asarray(LENGTHS[1:], jnp.int32)
    first, options = jnp.full_like(last, 2), {"address": ADDRESS, "num_kv_heads": HEADS, "scale": SCALE}
    out, got = kernels.slot_probabilities(q, k, v, table, lengths, rows, first, last, **options)
    attended = kernels.decode_attention_reference(q, k, v, table, lengths, rows, **options)[0]
    expected = kernels.slot_probabilities_reference(q, k, table, rows, first, last, **options)
    slot = jnp.arange(got.shape[1])
    got = jnp.where((slot >= first[:, None]) & (slot < last[:, None]), got, 0.0)  # elsewhere it may be anything
    return error((out, got), (attended, expected))


def _select_top() -> float:
    rng = np.random.default_rng(12)
    scores = jnp.asarray(rng.standard_normal((3, 3000)), jnp.float32)
    bounds = (jnp.asarray(x, jnp.int32) for x in ([0, 5, 7], [3000, 2900, 60], [64, 40, 64]))
    args = (scores, *bounds)
    return error(kernels.select_top(*args, k=64), kernels.select_top_reference(*args, k=64))


def _record_attention() -> float:
    rng = np.random.default_rng(13)
    k, _, table, lengths = paged(rng)
    tokens, starts = 12, jnp.asarray([0, 7, 12], jnp.int32)
    history = jnp.maximum(lengths - 12, 0)  # the chunk is stored already
    args = (jnp.zeros(k.shape[:2], jnp.float32), draw(rng, tokens, HEADS * GROUP, DIM))
    lse = jnp.full((tokens, HEADS * GROUP), 5.0, jnp.float32)
    args += (lse, k, table, history, jnp.asarray(HELD), starts, jnp.asarray([2, 7], jnp.int32), jnp.asarray([1, 2]))
    options = {"address": ADDRESS, "num_kv_heads": HEADS, "scale": SCALE}
    return error(kernels.record_attention(*args, **options), kernels.record_attention_reference(*args, **options))


def _block_mass() -> float:
    rng = np.random.default_rng(14)
    args = (draw(rng, 200, HEADS * GROUP, DIM), draw(rng, 200, HEADS, DIM), jnp.asarray([0, 150, 190], jnp.int32))
    options = {"block": 64, "scale": SCALE}
    expected = kernels.block_attention_mass_reference(*args, **options)
    return error(kernels.block_attention_mass(*args, **options), expected) / GROUP


def _page_bounds() -> float:
    rng = np.random.default_rng(15)
    k, _, table, lengths = paged(rng)
    rows, entry = jnp.asarray(HELD), table[0, HELD, 0].reshape(-1, 1)
    columns = jnp.arange(table.shape[3]) * PAGE
    count = jnp.clip(lengths[0, HELD] - columns, 0, PAGE).reshape(-1, 1)
    args = (jnp.zeros((k.shape[0], 2, DIM), k.dtype), k, entry, count)
    options = {"address": ADDRESS, "num_kv_heads": HEADS}
    bounds = kernels.update_page_bounds(*args, **options)
    q = draw(rng, HELD.size, HEADS * GROUP, DIM)
    upper = kernels.page_upper_bounds(q, bounds, table, lengths, rows, page_size=PAGE, **options)
    expected = kernels.page_upper_bounds_reference(q, bounds, table, rows, **options)
    held = (columns < lengths[0, HELD])[:, None]
    upper, expected = (jnp.where(held, x, 0.0) * SCALE for x in (upper, expected))
    return error((bounds, upper), (kernels.update_page_bounds_reference(*args, **options), expected))


def _scan_pages() -> float:
    rng = np.random.default_rng(16)
    _, _, table, lengths = paged(rng)
    pages = table[0, HELD, 0]
    position = jnp.asarray(rng.integers(-1, 64, (int(pages.max()) + 1, PAGE)), jnp.int32)
    score = jnp.asarray(rng.standard_normal(position.shape), jnp.float32)
    args = (position, score, pages, lengths[0, HELD, 0], jnp.asarray([3, 0]), jnp.asarray([30, 64]))
    got, expected = kernels.scan_pages(*args), kernels.scan_pages_reference(*args)
    there = jnp.isfinite(expected.key)  # where there is no slot, it may be any
    return error(got._replace(slot=jnp.where(there, got.slot, expected.slot)), expected)


def _invert_spd() -> float:
    x = np.random.default_rng(17).standard_normal((3, 48, 96)).astype(np.float32)
    matrices = jnp.asarray(x @ x.swapaxes(1, 2) / 96 + np.eye(48, dtype=np.float32))
    return error(kernels.invert_spd(matrices), kernels.invert_spd_reference(matrices))


def _add_rms_norm() -> float:
    rng = np.random.default_rng(18)
    args = (draw(rng, 4, 192), draw(rng, 4, 192), draw(rng, 192) / 8)
    return error(kernels.add_rms_norm(*args, eps=1e-6), kernels.add_rms_norm_reference(*args, eps=1e-6))


def _reference_search() -> float:
    """The share of wrong choices: a center is right or wrong."""
    rng = np.random.default_rng(19)
    k, v, table, _ = paged(rng)
    x = draw(rng, 30, 2 * HEADS * DIM)
    starts, positions = jnp.asarray([0, 18, 30], jnp.int32), jnp.asarray([*range(40, 58), *range(90, 102)], jnp.int32)
    args = (x, k, v, table, jnp.asarray(HELD), starts, positions)
    options = {"address": ADDRESS, "num_kv_heads": HEADS, "neighbors": NEIGHBORS, "sinks": SINKS, "step": STEP}
    got = kernels.reference_search(*args, **options)
    return float((got != kernels.reference_search_reference(*args, **options)).mean())


def _reference_mean() -> float:
    rng = np.random.default_rng(20)
    k, v, table, _ = paged(rng)
    ids = jnp.asarray(rng.integers(0, 37, (30, NEIGHBORS)), jnp.int32)
    args = (k, v, table, jnp.asarray(HELD), jnp.asarray([0, 18, 30], jnp.int32), ids)
    options = {"address": ADDRESS, "num_kv_heads": HEADS}
    return error(kernels.reference_mean(*args, **options), kernels.reference_mean_reference(*args, **options))


def _delta_compress() -> float:
    rng = np.random.default_rng(23)
    k, v, table, _ = paged(rng)
    ids, x = jnp.asarray(rng.integers(0, 37, (30, NEIGHBORS)), jnp.int32), draw(rng, 30, 2 * HEADS * DIM)
    down = draw(rng, 2 * HEADS * DIM, SIZE) / 16
    args = (x, k, v, table, jnp.asarray(HELD), jnp.asarray([0, 18, 30], jnp.int32), ids, down)
    options = {"address": ADDRESS, "num_kv_heads": HEADS}
    return error(kernels.delta_compress(*args, **options), kernels.delta_compress_reference(*args, **options))


def _store(rng: np.random.Generator) -> tuple[kernels.DeltaStore, kernels.DeltaLayout]:
    """One DeltaKV request: its history in row 1 of both tables, its recent tokens in row 2 of the near table."""
    k, v, near_table, _ = paged(rng)
    latents = latent_count(HISTORY, sinks=SINKS, step=STEP)
    columns = -(-latents // PAGE)
    reference = rng.integers(0, center_count(HISTORY, sinks=SINKS, step=STEP), (1 + columns, PAGE, NEIGHBORS))
    pages = kernels.LatentPages(draw(rng, 1 + columns, PAGE, SIZE), None, jnp.asarray(reference, jnp.uint16))
    latent_table = np.zeros((1, 2, 1, columns), np.int32)
    latent_table[0, 1, 0] = 1 + rng.permutation(columns)
    latent = kernels.PageAddress(table_layer=0, entry_stride=1, layer_offset=0, head_stride=1)
    layout = kernels.DeltaLayout(near=ADDRESS, latent=latent, sinks=SINKS, step=STEP, ring=RING)
    return kernels.DeltaStore(k, v, near_table, pages, jnp.asarray(latent_table)), layout


def _delta(rng: np.random.Generator):
    """(what `delta_attention` and `delta_reconstruct` both take, options, all positions [1, T], their rotations)."""
    store, layout = _store(rng)
    row, recent_row, history = (jnp.asarray([x], jnp.int32) for x in (1, 2, HISTORY))
    positions = jnp.arange(HISTORY + RECENT, dtype=jnp.int32)[None]
    angle = positions[..., None] * jnp.asarray(10000.0 ** (-np.arange(0, DIM, 2) / DIM), jnp.float32)
    options = {"layout": layout, "num_kv_heads": HEADS}
    return (store, row, recent_row, history), options, positions, (jnp.cos(angle), jnp.sin(angle))


def _delta_attention() -> float:
    rng = np.random.default_rng(21)
    where, options, positions, rotation = _delta(rng)
    up = draw(rng, SIZE, 2 * HEADS * DIM) / 8
    args = (draw(rng, 1, HEADS * GROUP, DIM), *where, positions, *rotation, up)
    expected = kernels.delta_attention_reference(*args, **options, scale=SCALE)[0]
    return error(kernels.delta_attention(*args, **options, scale=SCALE), expected)


def _delta_reconstruct() -> float:
    rng = np.random.default_rng(22)
    where, options, positions, rotation = _delta(rng)
    length = jnp.asarray([positions.shape[1]], jnp.int32)
    args, up = (*where, length, *rotation), draw(rng, SIZE, 2 * HEADS * DIM) / 8
    got = kernels.delta_reconstruct(*args, **options, up=up)
    expected = kernels.delta_reconstruct_reference(*args, **options, up=up)
    live = jnp.arange(got[0].shape[0] // HEADS * PAGE).reshape(-1, 1, PAGE, 1) < length[0]
    heads = [x.reshape(-1, HEADS, PAGE, DIM) for x in (*got, *expected)]
    k, v, want_k, want_v = (jnp.where(live, x.astype(jnp.float32), 0.0) for x in heads)
    largest = max(float(jnp.abs(x).max()) for x in (want_k, want_v))
    return error((k, v), (want_k, want_v)) / largest


CHECKS: dict[str, Callable[[], float]] = {
    "decode attention, scores": _decode_scores,
    "probabilities of slots": _slot_probabilities,
    "largest scores": _select_top,
    "recorded attention": _record_attention,
    "attention mass of blocks": _block_mass,
    "bounds of pages": _page_bounds,
    "scan of pages": _scan_pages,
    "inverse": _invert_spd,
    "residual and norm": _add_rms_norm,
    "DeltaKV references": _reference_search,
    "DeltaKV mean of references": _reference_mean,
    "DeltaKV compression": _delta_compress,
    "DeltaKV attention": _delta_attention,
    "DeltaKV reconstruction": _delta_reconstruct,
}
