"""Operations on a paged KV cache, and linear layers: arrays in, arrays out. Most have a Pallas-Triton kernel, an XLA
program and a reference; prefill attention and linear layers have Mosaic GPU kernels for Hopper. Nothing here knows of
models, requests or sparse methods.
"""

from pallas_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm
from pallas_kernels.beside import beside
from pallas_kernels.block_attention import BlockTile, block_attention_mass, block_attention_mass_reference
from pallas_kernels.decode_attention import decode_attention, decode_attention_reference
from pallas_kernels.decode_work import DecodeTile, SpanLimits, WorkList, decode_work_list
from pallas_kernels.delta_attention import delta_attention, delta_attention_reference
from pallas_kernels.delta_attention_triton import DeltaTile
from pallas_kernels.delta_compress import (
    delta_compress,
    delta_compress_reference,
    reference_mean,
    reference_mean_reference,
)
from pallas_kernels.delta_compress_triton import CompressTile
from pallas_kernels.delta_places import delta_places
from pallas_kernels.delta_reconstruct import (
    delta_reconstruct,
    delta_reconstruct_reference,
    scratch_address,
    scratch_table,
)
from pallas_kernels.delta_reconstruct_triton import ReconstructTile
from pallas_kernels.delta_store import DeltaLayout, DeltaStore, Places, view_positions
from pallas_kernels.delta_store_xla import read_latents
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.in_order import in_order, in_order_for_xla
from pallas_kernels.invert_spd import invert_spd, invert_spd_reference
from pallas_kernels.latents import LatentPages, dequantise, init_latents, quantise, store_latents
from pallas_kernels.linear import (
    add_linear,
    add_linear_reference,
    gated_linear,
    gated_linear_reference,
    linear,
    matmul_precision,
)
from pallas_kernels.linear_mosaic import LinearTile
from pallas_kernels.move_slots import move_slots, move_slots_reference
from pallas_kernels.online_softmax import EMPTY_LSE
from pallas_kernels.page_bounds import (
    page_upper_bounds,
    page_upper_bounds_reference,
    update_page_bounds,
    update_page_bounds_reference,
)
from pallas_kernels.page_scan import PageScan, scan_pages, scan_pages_reference
from pallas_kernels.paging import PageAddress
from pallas_kernels.prefill_attention import PrefillTile, prefill_attention, prefill_attention_reference
from pallas_kernels.record_attention import record_attention, record_attention_reference
from pallas_kernels.record_attention_triton import RecordTile
from pallas_kernels.reference_search import reference_search, reference_search_reference
from pallas_kernels.reference_search_triton import SearchTile
from pallas_kernels.rotate_and_store import rotate, rotate_and_store, rotate_and_store_reference
from pallas_kernels.select_top import select_top, select_top_reference
from pallas_kernels.slot_probabilities import attend_then_rank, slot_probabilities, slot_probabilities_reference
from pallas_kernels.store_kv import store_kv, store_kv_reference

__all__ = [
    "EMPTY_LSE",
    "BlockTile",
    "CompressTile",
    "DecodeTile",
    "DeltaLayout",
    "DeltaStore",
    "DeltaTile",
    "Implementation",
    "LatentPages",
    "LinearTile",
    "PageAddress",
    "PageScan",
    "Places",
    "PrefillTile",
    "ReconstructTile",
    "RecordTile",
    "SearchTile",
    "SpanLimits",
    "WorkList",
    "add_linear",
    "add_linear_reference",
    "add_rms_norm",
    "add_rms_norm_reference",
    "attend_then_rank",
    "beside",
    "block_attention_mass",
    "block_attention_mass_reference",
    "decode_attention",
    "decode_attention_reference",
    "decode_work_list",
    "delta_attention",
    "delta_attention_reference",
    "delta_compress",
    "delta_compress_reference",
    "delta_places",
    "delta_reconstruct",
    "delta_reconstruct_reference",
    "dequantise",
    "gated_linear",
    "gated_linear_reference",
    "in_order",
    "in_order_for_xla",
    "init_latents",
    "invert_spd",
    "invert_spd_reference",
    "linear",
    "matmul_precision",
    "move_slots",
    "move_slots_reference",
    "page_upper_bounds",
    "page_upper_bounds_reference",
    "prefill_attention",
    "prefill_attention_reference",
    "quantise",
    "read_latents",
    "record_attention",
    "record_attention_reference",
    "reference_mean",
    "reference_mean_reference",
    "reference_search",
    "reference_search_reference",
    "resolve",
    "rms_norm",
    "rotate",
    "rotate_and_store",
    "rotate_and_store_reference",
    "scan_pages",
    "scan_pages_reference",
    "scratch_address",
    "scratch_table",
    "select_top",
    "select_top_reference",
    "slot_probabilities",
    "slot_probabilities_reference",
    "store_kv",
    "store_kv_reference",
    "store_latents",
    "update_page_bounds",
    "update_page_bounds_reference",
    "view_positions",
]
