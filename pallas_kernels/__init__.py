"""Operations on a paged KV cache: arrays in, arrays out. Each has a Pallas-Triton kernel, an XLA program and a
reference; prefill attention has a Mosaic GPU kernel for Hopper, too. Nothing here knows of models, requests or sparse
methods.
"""

from pallas_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm
from pallas_kernels.block_attention import BlockTile, block_attention_mass, block_attention_mass_reference
from pallas_kernels.decode_attention import decode_attention, decode_attention_reference
from pallas_kernels.decode_work import DecodeTile, SpanLimits, WorkList, decode_work_list
from pallas_kernels.dispatch import Implementation, resolve
from pallas_kernels.invert_spd import invert_spd, invert_spd_reference
from pallas_kernels.move_slots import move_slots, move_slots_reference
from pallas_kernels.online_softmax import EMPTY_LSE
from pallas_kernels.paging import PageAddress
from pallas_kernels.prefill_attention import PrefillTile, prefill_attention, prefill_attention_reference
from pallas_kernels.record_attention import record_attention, record_attention_reference
from pallas_kernels.record_attention_triton import RecordTile
from pallas_kernels.rotate_and_store import rotate, rotate_and_store, rotate_and_store_reference
from pallas_kernels.store_kv import store_kv, store_kv_reference

__all__ = [
    "EMPTY_LSE",
    "BlockTile",
    "DecodeTile",
    "Implementation",
    "PageAddress",
    "PrefillTile",
    "RecordTile",
    "SpanLimits",
    "WorkList",
    "add_rms_norm",
    "add_rms_norm_reference",
    "block_attention_mass",
    "block_attention_mass_reference",
    "decode_attention",
    "decode_attention_reference",
    "decode_work_list",
    "invert_spd",
    "invert_spd_reference",
    "move_slots",
    "move_slots_reference",
    "prefill_attention",
    "prefill_attention_reference",
    "record_attention",
    "record_attention_reference",
    "resolve",
    "rms_norm",
    "rotate",
    "rotate_and_store",
    "rotate_and_store_reference",
    "store_kv",
    "store_kv_reference",
]
