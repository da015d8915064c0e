"""How much of its context a request's decode steps have read: host arithmetic over its lengths."""

from __future__ import annotations

import numpy as np

from sparsejax.cache import CacheLayout, DeltaCacheLayout
from sparsejax.engine.execution.selection_plan import Selections
from sparsejax.engine.programs.delta_ops import StoreSpec
from sparsejax.engine.requests.request import Request
from sparsejax.methods import DeltaKV


def read_tokens(
    request: Request,
    layout: CacheLayout | DeltaCacheLayout,
    *,
    selections: Selections | None = None,
    store: StoreSpec | None = None,
) -> float | None:
    """Tokens that a decode step of a request has read, mean over layers and steps.

    None if it took no such step, or if it evicts: the tokens that it keeps are what it reads.
    """
    prompt = len(request.prompt_token_ids)
    lengths = np.arange(
        request.compression.prefilled(prompt) + 1, prompt + len(request.output_token_ids), dtype=np.int32
    )
    if not lengths.size or request.compression.evicts:
        return None
    method = request.compression.policy
    if selections is not None and request.compression.selects:
        lengths = selections.read_tokens(request.compression, lengths)
    elif store is not None and isinstance(method, DeltaKV) and isinstance(layout, DeltaCacheLayout):
        lengths = _read_of_store(method, store, len(layout.full_layers) / layout.num_layers, lengths)
    return float(lengths.mean())


def _read_of_store(method: DeltaKV, store: StoreSpec, whole: float, lengths: np.ndarray) -> np.ndarray:
    """f64 like lengths: of a compressed request, mean over the layers, of which a share `whole` reads everything."""
    history = np.asarray(store.geometry.history_at_query(lengths))
    sinks = np.minimum(history, store.geometry.sinks)
    sparse = lengths - history + sinks + [method.wanted(int(each)) for each in history - sinks]
    return whole * lengths + (1 - whole) * sparse
