"""The meaning of what a DeltaStore holds, one token after the other: the reference of the kernels that read it back."""

import jax
import numpy as np

from pallas_kernels.delta_store import DeltaLayout, DeltaStore
from pallas_kernels.latents import GROUP, PER_CODE


def read_token_reference(
    store: DeltaStore, row: int, recent_row: int, history: int, position: int, *, layout: DeltaLayout, num_kv_heads: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """(exact or mean reference f64[2*H*D], latent f64[d] or None for a token that has none); arrays of numpy."""

    def near(table_row: int, slot: int) -> np.ndarray:
        page_size = store.k_pages.shape[1]
        entry = int(store.near_table[0, table_row, 0, slot // page_size])
        pages = [int(layout.near.page(entry, head)) for head in range(num_kv_heads)]
        both = [pool[pages, slot % page_size].astype(np.float64) for pool in (store.k_pages, store.v_pages)]
        return np.concatenate([half.reshape(-1) for half in both])

    centers = [p for p in range(position + 1) if p < layout.sinks or (p - layout.sinks) % layout.step == 0]
    if position >= history:
        return near(recent_row, position % layout.ring), None
    if centers[-1] == position:
        return near(row, len(centers) - 1), None
    slot = position - len(centers)
    latents = store.latents
    page_size = latents.values.shape[1]
    page = int(layout.latent.page(int(store.latent_table[0, row, 0, slot // page_size]), 0))
    values = np.asarray(latents.values[page, slot % page_size])
    if latents.scale is None:
        z = values.astype(np.float64)
    else:
        scale = np.asarray(latents.scale[page, slot % page_size], np.float64)
        quarter = len(values)
        z = np.array(
            [
                (((int(values[j % quarter]) >> (4 * (j // quarter))) & 15) - 8) * scale[j // GROUP]
                for j in range(PER_CODE * quarter)
            ]
        )
    ids = latents.reference[page, slot % page_size].tolist()
    return np.mean([near(row, i) for i in ids], axis=0), z


def read_back_reference(
    store: DeltaStore, rows, recent_rows, history, positions, cos, sin, up, up_bias=None, residual=None, *,
    layout: DeltaLayout, num_kv_heads: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(K after RoPE f32[B, T, H, D], V) of the tokens at `positions` [B, T]; 0 where a position is below 0."""
    store, positions = jax.tree.map(np.asarray, (store, positions))
    batch, tokens = positions.shape
    dim = store.k_pages.shape[2]
    out = np.zeros((2, batch, tokens, num_kv_heads, dim))
    for b, t in np.ndindex(batch, tokens):
        if positions[b, t] < 0:
            continue
        x, z = read_token_reference(
            store, int(rows[b]), int(recent_rows[b]), int(history[b]), int(positions[b, t]),
            layout=layout, num_kv_heads=num_kv_heads,
        )  # fmt: skip
        if z is not None and residual is not None:
            x = x + np.asarray(residual[b, t], np.float64)
        elif z is not None:
            x = x + z @ np.asarray(up, np.float64) + (0.0 if up_bias is None else np.asarray(up_bias, np.float64))
        k, v = x.reshape(2, num_kv_heads, dim)
        first, second = np.split(k, 2, axis=-1)
        c, s = np.asarray(cos[b, t], np.float64), np.asarray(sin[b, t], np.float64)
        out[0, b, t] = np.concatenate([first * c - second * s, second * c + first * s], axis=-1)
        out[1, b, t] = v
    return out[0].astype(np.float32), out[1].astype(np.float32)
