"""From a configuration to a running engine: defaults for the device, the size of the pool, warm-up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
from tqdm import tqdm

from sparsejax import methods as methods_registry
from sparsejax.cache import CacheLayout, DeltaCacheLayout, Entries, Granularity
from sparsejax.config import EngineConfig
from sparsejax.engine.build_store import Store, load_store
from sparsejax.engine.engine import Engine
from sparsejax.engine.execution import memory
from sparsejax.engine.execution.runner import Runner
from sparsejax.engine.execution.variants import most_read
from sparsejax.engine.execution.warm_up import warm_up
from sparsejax.engine.programs.recording import CHUNK_RECORDS, idle_record
from sparsejax.engine.programs.sampling import MAX_EOS_IDS
from sparsejax.engine.programs.state import init_state
from sparsejax.engine.programs.steps import serving_decoder
from sparsejax.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import DeltaKV, Method
from sparsejax.methods.kvzip import FIRST_INSTRUCTION, NEXT_INSTRUCTION
from sparsejax.models import Decoder, ModelConfig

MAX_HEAD_DIM = 256  # of the kernels on a GPU
STRETCHING_ROPE = ("linear", "dynamic", "yarn")  # kinds whose factor reaches beyond max_position_embeddings


@dataclass(frozen=True)
class _Limits:
    """What `EngineConfig` leaves open, settled for a model and a device; its names."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_mixed_tokens: int
    max_prefill_seqs: int
    max_model_len: int
    max_resident_rows: int


@dataclass(frozen=True)
class _CachePlan:
    """What the methods ask of the cache, whose size is not known yet.

    Attributes:
      dense: the layout of dense and evicting requests, of the smallest size.
      evicting: methods that do.
      selecting: names of methods that do.
      store: of requests that are stored compressed; None: there are none.
    """

    dense: CacheLayout
    evicting: tuple[type[Method], ...]
    selecting: tuple[str, ...]
    store: Store | None

    @property
    def records(self) -> frozenset[str]:
        """What steps note down for the methods that evict."""
        return frozenset().union(*(method.records for method in self.evicting))

    @property
    def _sizes(self) -> dict[str, int]:
        return {"max_rows": self.dense.max_rows, "max_slots": self.dense.max_slots, "page_size": self.dense.page_size}

    def smallest(self, model: ModelConfig) -> CacheLayout | DeltaCacheLayout:
        """A layout that steps can be compiled for, to see what they take."""
        if self.store is None:
            return self.dense
        return self.store.layout(model, entries=Entries(2, 2, 2), dtype=self.dense.dtype, **self._sizes)

    def fit(self, model: ModelConfig, num_pages: int) -> CacheLayout | DeltaCacheLayout:
        """The layout whose pools take as much as so many pages of `dense`."""
        dense = self.dense
        if self.store is None:
            return memory.fit_pool(dense, num_pages, needed_tokens=1)
        budget = num_pages * dense.bytes_of(1) // dense.pages_per_entry
        sizes = {**self._sizes, "max_model_len": dense.max_slots}
        return self.store.fit(model, budget, dtype=dense.dtype, **sizes)


def build_engine(
    model_config: ModelConfig,
    params: Any,
    tokenizer: Any,
    config: EngineConfig,
    *,
    eos_token_ids: tuple[int, ...],
    methods: Iterable[str],
) -> Engine:
    """An engine for parameters that are on the device.

    Args:
      methods: which requests may use; they decide the layout of the cache.
      eos_token_ids: tokens that end an answer.

    Raises:
      InvalidArgumentError: max_model_len beyond the model's, or a head_dim that no kernel takes.
      OutOfMemoryError: no room for a KV cache.
    """
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    _check_device(device, model_config, config)
    if len(eos_token_ids) > MAX_EOS_IDS:
        raise InvalidArgumentError(
            f"the model and its tokenizer name {len(eos_token_ids)} end tokens; at most {MAX_EOS_IDS} are supported."
        )
    limits = _limits(model_config, config, device.platform)
    decoder = serving_decoder(model_config, params["embed"].dtype, config.implementation)
    plan = _cache_plan(model_config, config, limits, tuple(methods), dtype=decoder.dtype)
    if plan.store is not None:
        params = {**params, "compressor": plan.store.params}
        limits = replace(limits, max_resident_rows=0)  # what compressed rows hold is not shared
    num_pages = config.num_pages
    if num_pages is None:
        num_pages = _pages_that_fit(decoder, params, config, limits, plan, device)
    layout = plan.fit(model_config, num_pages)
    with memory.explain_out_of_memory("making the engine ready"):
        runner = Runner(
            decoder,
            params,
            layout,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_mixed_tokens=limits.max_mixed_tokens,
            max_prefill_seqs=limits.max_prefill_seqs,
            eos_token_ids=eos_token_ids,
            implementation=config.implementation,
            records=plan.records,
            may_evict_per_step=any(method.evicts_per_step for method in plan.evicting),
            selecting=plan.selecting,
            instructions=_instructions(tokenizer),
            store=None if plan.store is None else plan.store.spec,
            allocate=not config.warmup,
        )
        if config.warmup:
            warm_up(
                runner,
                greedy_only=config.warmup == "greedy",
                forks=limits.max_resident_rows > 0,
                compression=config.default_compression,
                progress=lambda variants: tqdm(variants, desc="compiling", unit="step"),
            )
    pool = layout if isinstance(layout, CacheLayout) else layout.full
    store_limits = None
    if plan.store is not None and isinstance(layout, DeltaCacheLayout):
        store_limits = plan.store.limits(layout, limits.max_mixed_tokens)
    scheduler = Scheduler(
        SchedulerConfig(
            **asdict(limits),
            page_size=layout.page_size,
            num_free_entries=pool.num_entries - 1,
            entries_per_page_column=plan.dense.entries_per_page_column,
            store=store_limits,
        )
    )
    return Engine(runner, scheduler, tokenizer=tokenizer, seed=config.seed)


def _check_device(device: Any, model: ModelConfig, config: EngineConfig) -> None:
    """Refuses an implementation, or a head_dim, that the device cannot serve."""
    on_cpu = device.platform == "cpu"
    if on_cpu and config.implementation == "triton":
        raise InvalidArgumentError('implementation="triton" needs an NVIDIA GPU, and the model is on a CPU: use "xla".')
    if not on_cpu and config.implementation != "xla" and model.head_dim > MAX_HEAD_DIM:
        raise InvalidArgumentError(
            f"head_dim must be at most {MAX_HEAD_DIM} for the GPU kernels, and the model's is {model.head_dim}: "
            'use implementation="xla".'
        )


def _limits(model: ModelConfig, config: EngineConfig, platform: str) -> _Limits:
    max_num_seqs = config.max_num_seqs or (16 if platform == "cpu" else 256)
    max_num_batched_tokens = config.max_num_batched_tokens or default_batched_tokens(platform)
    max_mixed_tokens = config.max_mixed_tokens or max_num_batched_tokens
    if max_mixed_tokens > max_num_batched_tokens:
        raise InvalidArgumentError(
            f"max_mixed_tokens must be at most max_num_batched_tokens={max_num_batched_tokens}, got {max_mixed_tokens}."
        )
    return _Limits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_mixed_tokens=max_mixed_tokens,
        max_prefill_seqs=config.max_prefill_seqs,
        max_model_len=_max_model_len(model, config.max_model_len),
        max_resident_rows=_max_resident_rows(model, config, max_num_seqs),
    )


def _cache_plan(
    model: ModelConfig, config: EngineConfig, limits: _Limits, names: tuple[str, ...], *, dtype: Any
) -> _CachePlan:
    check_methods(names)
    allowed = {name: methods_registry.get(name) for name in names}
    stores = any(method.family == "store" for method in allowed.values())
    evicting = tuple(method for method in allowed.values() if method.family == "evict")
    dense = CacheLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_pages=2 * model.num_layers * model.num_kv_heads,
        max_rows=limits.max_num_seqs + (0 if stores else limits.max_resident_rows),
        max_slots=limits.max_model_len,
        page_size=config.page_size,
        granularity=_granularity(config, evicting),
        dtype=dtype,
        with_score=bool(evicting),
        with_position=bool(evicting),
        with_bounds=any(method.needs_page_bounds for method in allowed.values()),
    )
    return _CachePlan(
        dense=dense,
        evicting=evicting,
        selecting=tuple(sorted(name for name, method in allowed.items() if method.family == "select")),
        store=load_store(model, config, dtype=dtype) if stores else None,
    )


def _pages_that_fit(
    decoder: Decoder, params: Any, config: EngineConfig, limits: _Limits, plan: _CachePlan, device: Any
) -> int:
    """Pages of `plan.dense` for which the device has room beside weights, state and a step's scratch."""
    model, dense, smallest = decoder.config, plan.dense, plan.smallest(decoder.config)
    scratch = 0
    if device.platform != "cpu":
        scratch = memory.scratch_bytes(
            decoder,
            params,
            smallest,
            decode_batch=limits.max_num_seqs,
            prefill_tokens=limits.max_num_batched_tokens,
            prefill_seqs=limits.max_prefill_seqs,
            implementation=config.implementation,
            records=plan.records & CHUNK_RECORDS,
            store=None if plan.store is None else plan.store.spec,
            store_top=_store_top(config, limits.max_model_len),
            selecting=plan.selecting,
        )
    state = jax.eval_shape(
        lambda: init_state(
            dense.num_rows,
            model.vocab_size,
            idle_record(dense, model, plan.records, limits.max_prefill_seqs),
            stores=plan.store is not None,
            selects=bool(plan.selecting),
        )
    )
    other = memory.tree_bytes([state]) + smallest.table_bytes()
    return memory.pages_that_fit(dense, device=device, scratch=scratch, other=other)


def _store_top(config: EngineConfig, max_model_len: int) -> int:
    """History tokens that compressed requests read by default."""
    asked = config.default_compression
    method = asked.policy if asked is not None and asked.compresses else DeltaKV()
    assert isinstance(method, DeltaKV)
    return most_read(method, max_model_len)


def named_methods(config: EngineConfig) -> tuple[str, ...]:
    """The methods that a configuration names; an engine is built for them from the start."""
    default = () if config.default_compression is None else (config.default_compression.method,)
    return (*(config.methods or ()), *default)


def check_methods(names: Iterable[str]) -> None:
    """Refuses methods that no one cache serves.

    Raises:
      InvalidArgumentError: some evict, others store compressed.
    """
    families = {name: methods_registry.get(name).family for name in names}
    stores = [name for name, family in families.items() if family == "store"]
    others = [name for name, family in families.items() if family not in ("store", "full")]
    if stores and others:
        raise InvalidArgumentError(
            f"methods {stores[0]!r} and {others[0]!r} need different caches: an engine that stores requests compressed "
            "serves dense ones beside them, and no others. (An engine keeps the methods that requests have named.)"
        )


def _instructions(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of what asks a model to repeat a text; none without a tokenizer, the text then stands for itself."""
    if tokenizer is None:
        return (), ()
    first, others = (
        tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (FIRST_INSTRUCTION, NEXT_INSTRUCTION)
    )
    return first, others


def _granularity(config: EngineConfig, evicting: Sequence[type[Method]]) -> Granularity:
    """The coarsest slot tables that the methods allow, or those that were asked for."""
    if not evicting:
        return config.table_granularity or "shared"
    if config.table_granularity not in (None, "per_head"):
        raise InvalidArgumentError(
            f'table_granularity must be "per_head" for method {evicting[0].name!r}, which lets heads keep different '
            f"tokens; got {config.table_granularity!r}."
        )
    return "per_head"


def default_batched_tokens(platform: str) -> int:
    """`max_num_batched_tokens` of an engine that was told none. platform: of its device, as JAX names it."""
    return 1024 if platform == "cpu" else 2048


def _max_resident_rows(model: ModelConfig, config: EngineConfig, max_num_seqs: int) -> int:
    """Rows for prefix caching; 0 without it, and with dynamic RoPE, where keys depend on the prompt's length."""
    if not config.enable_prefix_caching or model.rope.kind == "dynamic":
        return 0
    return config.max_resident_rows or max_num_seqs


def positions_reach(model: ModelConfig) -> int:
    """Longest text, in tokens, that the model's positions are made for."""
    longest = model.max_position_embeddings
    if model.rope.kind in STRETCHING_ROPE:  # configs differ in whether that length counts the stretch already
        original = model.rope.original_max_position_embeddings or longest
        longest = max(longest, int(original * model.rope.factor))
    return longest


def _max_model_len(model: ModelConfig, asked: int | None) -> int:
    longest = positions_reach(model)
    if asked is not None and asked > longest:
        raise InvalidArgumentError(
            f"max_model_len must be at most {longest}, what this model's positions reach; got {asked}."
        )
    return asked or model.max_position_embeddings
