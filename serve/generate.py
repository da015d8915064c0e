"""Generation as one compiled program: prefill the prompts, then decode in a `lax.while_loop`, on params and a cache.

No engine, no scheduler, no host in the loop. It runs the engine's own steps, so its tokens are those of a fresh engine
of seed 0. It knows the model config's end tokens; a tokenizer's own go into `stop_token_ids`.

    config, params = load_model("folder", dtype=jnp.bfloat16)
    answers = generate(config, params, [[1, 2, 3], [4, 5]], SamplingParams(temperature=0.0, max_tokens=32))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Implementation
from sparsejax.cache import CacheLayout, Granularity, KVCache, init_cache
from sparsejax.config import EngineConfig
from sparsejax.engine.build import positions_reach
from sparsejax.engine.execution.packing import pack
from sparsejax.engine.programs.sampling import NOT_FINITE
from sparsejax.engine.programs.state import DecodeState, PrefillBatch, init_state
from sparsejax.engine.programs.steps import StepOptions, decode_step, options_for, prefill_step, serving_decoder
from sparsejax.engine.requests import inputs
from sparsejax.engine.requests.request import Request, derive_seed
from sparsejax.engine.requests.sampling_params import SamplingParams
from sparsejax.engine.scheduling.plan import Chunk
from sparsejax.errors import InvalidArgumentError, NotFiniteError, PromptTooLongError
from sparsejax.models import Decoder, ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """tokens: i32[B, max_tokens], each row's answer, zeros behind it. count: i32[B], its length, end token included.

    NOT_FINITE ends an answer, too.
    """

    tokens: jax.Array
    count: jax.Array


def generate_loop(
    params,
    cache: KVCache,
    state: DecodeState,
    batch: PrefillBatch,
    end_tokens: jax.Array,
    limit: jax.Array,
    *,
    decoder: Decoder,
    max_tokens: int,
    options: StepOptions,
) -> tuple[KVCache, DecodeState, Generated]:
    """Prefills `batch` and decodes until every row has ended; pure, to be jitted with cache and state donated.

    Args:
      batch: the whole prompts, one segment a request (every `last` true, rows distinct), S segments.
      end_tokens: i32[S, E], tokens that end each request, -1 for none; the end token itself is part of the answer.
      limit: i32[S], each request's longest answer, at most max_tokens.
      max_tokens: room in the result; the cache must hold every prompt plus its limit.
    """
    rows, lane = jnp.asarray(batch.rows), jnp.arange(batch.rows.shape[0])
    cache, state, output = prefill_step(params, cache, state, batch, decoder=decoder, options=options)

    def record(answer: Generated, running, sampled):
        at = jnp.where(running, answer.count, max_tokens)
        tokens = answer.tokens.at[lane, at].set(sampled, mode="drop")
        count = answer.count + running
        ended = (sampled[:, None] == end_tokens).any(axis=1) | (sampled == NOT_FINITE) | (count >= limit)
        return Generated(tokens=tokens, count=count), running & ~ended

    empty = Generated(tokens=jnp.zeros((rows.shape[0], max_tokens), jnp.int32), count=jnp.zeros_like(rows))
    answer, running = record(empty, rows > 0, output.sample.token)

    def decode(carry):
        cache, state, answer, running = carry
        live = jnp.where(running, rows, 0)
        cache, state, output = decode_step(params, cache, state, live, decoder=decoder, options=options)
        return cache, state, *record(answer, running, output.sample.token)

    cache, state, answer, _ = jax.lax.while_loop(lambda carry: carry[3].any(), decode, (cache, state, answer, running))
    return cache, state, answer


def seed_of(params: SamplingParams, index: int) -> int:
    """The seed of the prompt's draws: its own, or what a fresh engine of seed 0 gives its `index`-th request."""
    return derive_seed(0, index + 1) if params.seed is None else params.seed


_generate_loop = jax.jit(
    generate_loop, static_argnames=("decoder", "max_tokens", "options"), donate_argnames=("cache", "state")
)


def generate(
    config: ModelConfig,
    params,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams | Sequence[SamplingParams],
    *,
    page_size: int = 32,
    table_granularity: Granularity = "shared",
    implementation: Implementation | None = None,
) -> list[list[int]]:
    """Generates from token ids with a cache made to measure.

    Args:
      prompts: token ids of each prompt, none empty.
      sampling: parameters, one for all or one per prompt; n = 1. Stop strings need text and are refused.
      page_size, table_granularity, implementation: as `LLM` takes them.

    Returns:
      Each prompt's generated ids, the end token included.

    Raises:
      InvalidArgumentError: a prompt that is text or empty, ids outside the vocabulary, parameters that need the engine,
        or a bad argument.
      NotFiniteError: a prompt has no next token.
    """
    # For its checks.
    EngineConfig(page_size=page_size, table_granularity=table_granularity, implementation=implementation)
    forms = inputs.as_prompts(prompts)
    for i, prompt in enumerate(forms):
        if isinstance(prompt, str):
            raise InvalidArgumentError(f"prompt {i} is text: this loop takes token ids, LLM.generate takes both.")
    prompts = [inputs.tokenize(prompt, None, config.vocab_size, index=i).token_ids for i, prompt in enumerate(forms)]
    each = inputs.one_each("sampling", sampling, SamplingParams, SamplingParams(), len(prompts))
    if any(p.stop_strings or p.n != 1 or p.logprobs is not None or p.prompt_logprobs is not None for p in each):
        raise InvalidArgumentError("stop strings, n > 1 and log-probabilities need the engine: use LLM.generate.")
    for i, params_ in enumerate(each):
        inputs.check_stop_ids(params_, config.vocab_size, name=f"sampling {i}")
    reach = positions_reach(config)
    for i, prompt in enumerate(prompts):
        if len(prompt) + 1 > reach:
            raise PromptTooLongError(f"prompt {i} has {len(prompt)} tokens; this model's positions reach {reach}.")
    if not prompts:
        return []
    requests = [
        Request(request_id=str(i), prompt_token_ids=prompt, params=params_, row=i + 1, seed=seed_of(params_, i))
        for i, (prompt, params_) in enumerate(zip(prompts, each, strict=True))
    ]
    chunks = [Chunk(request=r, start=0, count=len(r.prompt_token_ids), is_last=True) for r in requests]
    batch = pack(chunks, size=sum(c.count for c in chunks), segments=len(chunks), eos_token_ids=config.eos_token_ids)
    limit = np.array([min(p.max_tokens, reach - len(t)) for p, t in zip(each, prompts, strict=True)], np.int32)
    ends = [p.stop_ids + (() if p.ignore_eos else config.eos_token_ids) for p in each]
    end_tokens = np.full((len(each), max(1, *map(len, ends))), -1, np.int32)
    for row, end in zip(end_tokens, ends, strict=True):
        row[: len(end)] = end
    layout = layout_for(
        config,
        len(prompts),
        max(map(len, prompts)) + int(limit.max()),
        page_size=page_size,
        granularity=table_granularity,
        dtype=params["embed"].dtype,
    )
    state = init_state(len(prompts) + 1, config.vocab_size)
    _, _, answer = _generate_loop(
        params,
        init_cache(layout),
        state,
        batch,
        end_tokens,
        limit,
        decoder=serving_decoder(config, params["embed"].dtype, implementation),
        max_tokens=int(limit.max()),
        options=options_for(each, implementation=implementation),
    )
    tokens, count = np.asarray(answer.tokens), np.asarray(answer.count)
    answers = [tokens[i, : count[i]].tolist() for i in range(len(prompts))]
    for i, each_answer in enumerate(answers):
        if NOT_FINITE in each_answer:
            raise NotFiniteError.after(f"prompt {i}", len(each_answer) - 1)
    return answers


def layout_for(
    config: ModelConfig, rows: int, tokens_per_row: int, *, page_size: int, granularity: Granularity, dtype
) -> CacheLayout:
    """The smallest cache in which `rows` requests of `tokens_per_row` tokens always fit."""
    pages_per_row = config.num_layers * config.num_kv_heads * -(-tokens_per_row // page_size)
    null_pages = config.num_layers * config.num_kv_heads  # covers the null entry at any granularity
    return CacheLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        num_pages=rows * pages_per_row + null_pages,
        page_size=page_size,
        max_rows=rows,
        max_slots=tokens_per_row,
        granularity=granularity,
        dtype=dtype,
    )
