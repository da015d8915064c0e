"""KV-cache methods: one file a method. A method is policy and owns no arrays; importing its file registers it.

Three parts compose: a method scores slots (`base.Method`), a budget rule says how many each layer and head keeps
(`budgets.BudgetRule`), and protection keeps the first and the last tokens whatever their score (`protection`).
"""

from __future__ import annotations

from sparsejax.methods.base import Method
from sparsejax.methods.budgets import BudgetRule, available_rules, get_rule, register_rule
from sparsejax.methods.calibrated_ratio import CalibratedRatio
from sparsejax.methods.compactor import Compactor
from sparsejax.methods.criticalkv import CriticalKV
from sparsejax.methods.deltakv import DeltaKV
from sparsejax.methods.expected_attention import ExpectedAttention
from sparsejax.methods.full import Full
from sparsejax.methods.global_pages import GlobalPages
from sparsejax.methods.h2o import H2O
from sparsejax.methods.keydiff import KeyDiff
from sparsejax.methods.kv_compress import KVCompress
from sparsejax.methods.kvzip import KVzip
from sparsejax.methods.observed import ObservedQueries
from sparsejax.methods.omnikv import OmniKV
from sparsejax.methods.pyramidkv import PyramidKV
from sparsejax.methods.quest import Quest
from sparsejax.methods.random import Random
from sparsejax.methods.registry import MethodDescription, available, describe, get, register
from sparsejax.methods.selection import LayerRoles, SelectionMethod
from sparsejax.methods.slots import LayerSlots, QueryMoments, Slots, gather_slots
from sparsejax.methods.snapkv import SnapKV
from sparsejax.methods.streaming_llm import StreamingLLM

__all__ = [
    "H2O",
    "BudgetRule",
    "CalibratedRatio",
    "Compactor",
    "CriticalKV",
    "DeltaKV",
    "ExpectedAttention",
    "Full",
    "GlobalPages",
    "KVCompress",
    "KVzip",
    "KeyDiff",
    "LayerRoles",
    "LayerSlots",
    "Method",
    "MethodDescription",
    "ObservedQueries",
    "OmniKV",
    "PyramidKV",
    "QueryMoments",
    "Quest",
    "Random",
    "SelectionMethod",
    "Slots",
    "SnapKV",
    "StreamingLLM",
    "available",
    "available_rules",
    "describe",
    "gather_slots",
    "get",
    "get_rule",
    "register",
    "register_rule",
]
