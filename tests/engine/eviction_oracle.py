"""What eviction must amount to, from the dense model alone: which tokens a query saw, its logits, and its attention.

`serve` runs one request step by step and notes what its row holds between the steps. `Forward` computes the whole text
at once with plain masked attention, in which every query sees what the row held when its step began, and itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from tiny_engine import CONFIG

from sparsejax import LLM, CompressionParams, SamplingParams
from sparsejax.engine.requests.inputs import TokenizedPrompt
from sparsejax.engine.requests.outputs import RequestOutput
from sparsejax.models import Decoder

LONGEST = 160  # tokens of a text, padding included: one shape for everything
LAYERS, HEADS, QUERY_HEADS = CONFIG.num_layers, CONFIG.num_kv_heads, CONFIG.num_heads
GROUP = QUERY_HEADS // HEADS


@dataclass(frozen=True)
class Held:
    """What a row holds. length: tokens computed; live: bool[L, H, LONGEST] by position; score: f32, likewise."""

    length: int
    live: np.ndarray
    score: np.ndarray


def held(cache, row: int, length: int) -> Held:
    """Reads a row of the cache, table by table; checks that no position is there twice."""
    pages, lengths = np.asarray(cache.table.pages[:, row]), np.asarray(cache.table.length[:, row])
    position, scores = np.asarray(cache.pool.position), np.asarray(cache.pool.score)
    live, score = np.zeros((LAYERS, HEADS, LONGEST), bool), np.zeros((LAYERS, HEADS, LONGEST), np.float32)
    for layer in range(LAYERS):
        for head in range(HEADS):
            used = slice(lengths[layer, head])
            at = position[pages[layer, head]].reshape(-1)[used]
            noted = scores[pages[layer, head]].reshape(-1)[used]
            assert len(set(at[at >= 0])) == (at >= 0).sum(), "a token is held twice"
            live[layer, head, at[at >= 0]] = True
            score[layer, head, at[at >= 0]] = noted[at >= 0]
    assert not live[..., length:].any()
    return Held(length, live, score)


@dataclass
class Run:
    """A request that was served alone.

    Attributes:
      output: what it got.
      before: by position of a query, what the row held before the step that computed it.
      after: what the row held after each step, in order.
    """

    output: RequestOutput
    before: dict[int, Held] = field(default_factory=dict)
    after: list[Held] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        return [*self.output.prompt_token_ids, *self.output.outputs[0].token_ids]

    def mask(self) -> np.ndarray:
        """bool[L, H, LONGEST, LONGEST]: what each query sees."""
        mask = causal()
        for position, row in self.before.items():
            mask[:, :, position, : row.length] = row.live[:, :, : row.length]
        return mask


def serve(llm: LLM, prompt: list[int], params: SamplingParams, compression: CompressionParams | None = None) -> Run:
    """Serves a request alone; nothing of it may come from a cache."""
    engine = llm.engine
    submission = engine.add("watched", TokenizedPrompt(None, prompt), params, compression)
    request = submission.answers[0].request
    before, after = {}, []
    empty = np.zeros((LAYERS, HEADS, LONGEST))
    last = Held(0, empty.astype(bool), empty)
    while engine.has_unfinished:
        engine.step()
        if request.finished:
            continue
        assert request.num_reused == 0
        assert request.row is not None
        before |= dict.fromkeys(range(last.length, request.num_computed), last)
        last = held(engine.runner.cache, request.row, request.num_computed)
        after.append(last)
    return Run(submission.output(), before, after)


def causal() -> np.ndarray:
    """bool[L, H, LONGEST, LONGEST]."""
    return np.broadcast_to(np.tri(LONGEST, dtype=bool), (LAYERS, HEADS, LONGEST, LONGEST)).copy()


@dataclass(frozen=True)
class Forward:
    """The dense model on one text.

    Attributes:
      logprobs: f64[LONGEST, V], of the token behind each one.
      p: f64[L, Hq, LONGEST, LONGEST], attention probabilities, query by key.
      q: f64[L, LONGEST, Hq, D], queries after RoPE.
      k: f64[L, LONGEST, H, D], keys after RoPE.
    """

    logprobs: np.ndarray
    p: np.ndarray
    q: np.ndarray
    k: np.ndarray

    def mass(self, queries: range, *, power: int = 1) -> np.ndarray:
        """f64[L, H, LONGEST]: sum over queries and the query heads of the group of p**power."""
        p = self.p[:, :, queries.start : queries.stop] ** power
        return p.sum(2).reshape(LAYERS, HEADS, GROUP, LONGEST).sum(2)


@jax.jit
def _forward(params, tokens, mask):
    seen = []

    def attend(layer, q, k, v, k_pre_rope, cache):
        del k_pre_rope
        keys, values = (jnp.repeat(x, GROUP, axis=1) for x in (k, v))
        logits = jnp.einsum("qhd,khd->hqk", q, keys, precision="highest") * CONFIG.head_dim**-0.5
        logits = jnp.where(jnp.repeat(mask[layer], GROUP, axis=0), logits, -jnp.inf)
        p = jax.nn.softmax(logits, axis=-1)
        seen.append((p, q, k))
        return jnp.einsum("hqk,khd->qhd", p, values, precision="highest"), cache

    positions = jnp.arange(LONGEST, dtype=jnp.int32)
    logits, _ = Decoder(CONFIG, jnp.float32).apply({"params": params}, tokens, positions, None, attend)
    return jax.nn.log_softmax(logits), *(jnp.stack(each) for each in zip(*seen, strict=True))


def forward(params, text: list[int], mask: np.ndarray | None = None) -> Forward:
    """The dense model; mask: bool[L, H, LONGEST, LONGEST], what each query sees; None: all before it."""
    tokens = np.zeros(LONGEST, np.int32)
    tokens[: len(text)] = text
    results = _forward(params, tokens, causal() if mask is None else mask)
    return Forward(*(np.asarray(each, np.float64) for each in results))


def assert_logprobs(run: Run, expected: Forward, *, atol: float = 2e-4) -> None:
    """Every generated token's log-probabilities are those of the dense model behind the token before it."""
    answer, prompt = run.output.outputs[0], len(run.output.prompt_token_ids)
    assert answer.logprobs
    for i, entry in enumerate(answer.logprobs):
        ids = list(entry)
        got = np.asarray([entry[token].logprob for token in ids])
        np.testing.assert_allclose(got, expected.logprobs[prompt - 1 + i, ids], rtol=1e-4, atol=atol, err_msg=str(i))


def assert_greedy(run: Run, expected: Forward) -> None:
    """Every generated token is the dense model's likeliest behind the one before it."""
    prompt, answer = len(run.output.prompt_token_ids), run.output.outputs[0].token_ids
    assert answer == expected.logprobs[prompt - 1 : prompt - 1 + len(answer)].argmax(-1).tolist()
