"""What the engine can serve at all: refuses prompts, and clips answers to what the model and the empty pool hold."""

from __future__ import annotations

from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.engine.requests.compression_schedule import CompressionSchedule
from sparsejax.engine.requests.footprint import Footprint, footprint_of
from sparsejax.engine.requests.request import Request
from sparsejax.engine.scheduling.scheduler_config import SchedulerConfig
from sparsejax.engine.scheduling.store_limits import StoreLimits
from sparsejax.errors import EmptyPromptError, InvalidArgumentError, PromptTooLongError


def check_limits(request: Request, config: SchedulerConfig, *, name: str) -> Footprint | None:
    """The footprint of a request that can be served; None if it compresses nothing.

    Args:
      name: what messages call the prompt.

    Raises:
      EmptyPromptError: no tokens.
      PromptTooLongError: the prompt plus one token exceeds max_model_len, or what is kept of it the whole pool.
      InvalidArgumentError: its method needs larger chunks than the engine's, or evicts more at once than may go.
    """
    length, pool = len(request.prompt_token_ids), config.pool
    check_length(length, config.max_model_len, name=name)
    params = request.compression
    if params.prefilled(length) < length:
        _check_decoded_prompt(request, name)
    if config.store is not None:
        _check_store(request, config.store, name)
        return None
    if not params.evicts:
        if pool.uniform(length) > pool.num_entries:
            raise PromptTooLongError(_too_long(name, length, config))
        return None
    if params.per_step:
        _check_evict_count(params, length, name)
    schedule = CompressionSchedule(params, length)
    footprint = footprint_of(schedule, pool, max_chunk=config.max_num_batched_tokens)
    if footprint is None:
        why = "does not compress between the chunks of a prompt, so all of it has to fit before."
        if params.policy.between_chunks:
            why = (
                f"compresses between chunks, but the {params.budget(length)} tokens that it keeps of each layer and "
                "head do not fit beside what comes next, a chunk or the rest of the prompt. Lower the budget."
            )
        raise PromptTooLongError(f"{_too_long(name, length, config)} Method {params.method!r} {why}")
    _check_alignment(footprint, config)
    return footprint


def check_length(length: int, max_model_len: int, *, name: str) -> None:
    """Raises unless a prompt of so many tokens leaves room for one that is generated.

    Raises:
      EmptyPromptError, PromptTooLongError: as `check_limits` says.
    """
    if length == 0:
        raise EmptyPromptError(f"{name} is empty: give at least one token.")
    if length + 1 > max_model_len:
        raise PromptTooLongError(
            f"{name} has {length} tokens; with at least one generated token it must fit into "
            f"max_model_len={max_model_len}. Shorten the prompt or raise max_model_len."
        )


def _check_store(request: Request, store: StoreLimits, name: str) -> None:
    """Refuses what the pools of an engine that stores compressed cannot hold or do."""
    params, length = request.compression, len(request.prompt_token_ids)
    if not params.compresses and params.method != "full":
        raise InvalidArgumentError(
            f"method {params.method!r} needs another cache than method 'deltakv', for which this engine is built."
        )
    if not store.fits(length, compressed=params.compresses):
        most = store.most_tokens(length, compressed=params.compresses)
        raise PromptTooLongError(
            f"{name} has {length} tokens, but with method {params.method!r} the KV cache holds {most}. Shorten the "
            "prompt, or give the cache more memory (num_pages, gpu_memory_utilization)."
        )


def _check_decoded_prompt(request: Request, name: str) -> None:
    """Refuses what needs all tokens of the prompt in chunks, for a request that decodes some of them."""
    for argument, off in (("prompt_logprobs", None), ("repetition_penalty", 1.0)):
        if getattr(request.params, argument) != off:
            raise InvalidArgumentError(
                f"{name} is decoded from its context_tokens={request.compression.context_tokens} on, where "
                f"{argument} is not available: leave one of them out."
            )


def _check_evict_count(params: CompressionParams, length: int, name: str) -> None:
    """Refuses to evict more tokens at once than there are to choose from; later, budgets are never smaller."""
    most = params.most_evicted(length)
    if params.evict_count > most:
        raise InvalidArgumentError(
            f"num_per_evict must be at most {most}, the tokens that are not protected when {name}, of {length} tokens, "
            f"exceeds the {params.budget(length)} that keep_fraction leaves of it; got {params.evict_count}."
        )


def _check_alignment(footprint: Footprint, config: SchedulerConfig) -> None:
    """Refuses a text that has to be cut where its method cannot be."""
    schedule, room = footprint.schedule, config.least_prompt_room
    alignment = schedule.params.policy.chunk_alignment
    if room < alignment and schedule.longest_stage > room:
        raise InvalidArgumentError(
            f"method {schedule.params.method!r} computes prompts in multiples of {alignment} tokens, but beside "
            f"{config.max_num_seqs} decoding requests a step has room for {room}. Raise max_num_batched_tokens and "
            f"max_mixed_tokens to {2 * alignment}."
        )


def most_tokens(request: Request, footprint: Footprint | None, config: SchedulerConfig) -> int:
    """Most tokens a request can generate, up to its `max_tokens`, so that alone it always fits."""
    length = len(request.prompt_token_ids)
    most = min(request.max_tokens, config.max_model_len - length)
    # The last generated token never enters the cache, hence the + 1.
    if config.store is not None:
        fitting = config.store.most_tokens(length + most - 1, compressed=request.compression.compresses)
        return min(most, fitting - length + 1)
    if footprint is None:
        return min(most, config.max_tokens_in_pool - length + 1)
    return footprint.most_decoded(most - 1) + 1


def _too_long(name: str, length: int, config: SchedulerConfig) -> str:
    return (
        f"{name} has {length} tokens, but the whole KV cache holds "
        f"{config.max_tokens_in_pool}. Shorten the prompt, or give the cache more pages (num_pages, "
        "gpu_memory_utilization)."
    )
