"""Sampling against a plain numpy oracle: exact supports, penalties, log-probabilities, and draws that stand alone."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.engine.programs.sampling import (
    MAX_EOS_IDS,
    MAX_STOP_IDS,
    NOT_FINITE,
    greedy,
    penalise,
    sample,
    support,
    to_rows,
    token_logprobs,
)
from sparsejax.engine.requests.sampling_params import MAX_LOGPROBS, SamplingParams

V = 40
LANES = 12  # small batches are padded to this many rows, to compile once
TRACES: list[tuple] = []


@functools.partial(jax.jit, static_argnames="want_logprobs")
def step(logits, rows, seen, count, num_output, want_logprobs=False):
    TRACES.append((logits.shape, want_logprobs))
    return sample(
        logits, rows, prompt_seen=seen, output_count=count, num_output=num_output, want_logprobs=want_logprobs
    )


def draw(logits, params, *, seeds=None, num_output=None, count=None, eos=(), want_logprobs=False, lanes=LANES):
    """One step on a batch, padded to `lanes` with greedy rows; what is not given is neutral."""
    batch, vocabulary = logits.shape
    idle = max(lanes - batch, 0)

    def padded(array, dtype):
        return np.concatenate([np.asarray(array, dtype), np.zeros((idle, *np.shape(array)[1:]), dtype)])

    seeds = range(batch) if seeds is None else seeds
    out = step(
        padded(logits, np.float32),
        to_rows([*params, *[SamplingParams(temperature=0)] * idle], eos, [*seeds, *[0] * idle]),
        np.zeros((batch + idle, vocabulary), bool),
        padded(np.zeros((batch, vocabulary)) if count is None else count, np.int32),
        padded(np.zeros(batch) if num_output is None else num_output, np.int32),
        want_logprobs=want_logprobs,
    )
    return jax.tree.map(lambda x: np.asarray(x)[:batch], out)


jitted_support = jax.jit(support)


def random_logits(batch: int, seed: int = 0, vocabulary: int = V) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3.0, size=(batch, vocabulary)).astype(np.float32)


def oracle_support(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Tokens of one row that may be drawn, bool[V], in float64 by sorting."""
    scaled = logits.astype(np.float64) / p.temperature
    probability = np.exp(scaled - scaled.max())
    probability /= probability.sum()
    keep = probability >= p.min_p * probability.max()
    order = np.lexsort((np.arange(len(logits)), -logits))  # likeliest first, lower ids first among equals
    order = order[keep[order]]
    if p.top_k:
        order = order[: p.top_k]
    total, kept = 0.0, []
    for token in order:
        if kept and p.top_p < 1 and total >= p.top_p:
            break
        kept.append(token)
        total += probability[token] / probability[order].sum()
    allowed = np.zeros(len(logits), bool)
    allowed[kept] = True
    return allowed


def oracle_penalties(logits, p: SamplingParams, seen, count, num_output: int, held_back) -> np.ndarray:
    out = logits.astype(np.float64).copy()
    for token in range(len(out)):
        if seen[token] or count[token]:
            out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
        out[token] -= p.frequency_penalty * count[token] + p.presence_penalty * (count[token] > 0)
        if num_output < p.min_tokens and token in held_back:
            out[token] = -np.inf
    return out


FILTERS = [
    SamplingParams(),
    SamplingParams(top_k=1),
    SamplingParams(top_k=7),
    SamplingParams(top_k=V + 5),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.3, temperature=2.0),
    SamplingParams(top_p=1e-6),
    SamplingParams(min_p=0.05),
    SamplingParams(min_p=1.0),
    SamplingParams(min_p=0.02, top_k=9, top_p=0.8, temperature=1.7),
    SamplingParams(top_k=5, top_p=0.95, temperature=0.3),
    SamplingParams(temperature=1e-30),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("ties", [False, True])
def test_support_is_exactly_the_oracles(seed, ties):
    logits = random_logits(len(FILTERS), seed)
    if ties:
        logits = np.round(logits / 2)
    rows = to_rows(FILTERS, (), range(len(FILTERS)))
    out = np.asarray(jitted_support(logits, rows))
    for i, params in enumerate(FILTERS):
        # Float32 rounding at a tie's edge of top-p is not the subject here, so ties are tested for the other filters.
        if ties and params.top_p < 1:
            continue
        np.testing.assert_array_equal(out[i] > -np.inf, oracle_support(logits[i], params), err_msg=str(params))
    assert (out.max(axis=-1) == 0).all()


def test_support_keeps_the_temperature_scaled_logits():
    logits = random_logits(LANES)
    params = [SamplingParams(temperature=0.5, top_k=10)] * LANES
    out = np.asarray(jitted_support(logits, to_rows(params, (), range(LANES))))
    kept = out > -np.inf
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / 0.5
    assert (kept.sum(axis=-1) == 10).all()
    np.testing.assert_allclose(out[kept], scaled[kept], rtol=1e-6)


def test_greedy_is_argmax_and_the_lowest_of_equals():
    logits = random_logits(4)
    logits[2] = 1.0
    logits[3, [5, 9]] = 50.0
    best = logits.argmax(axis=-1)
    np.testing.assert_array_equal(draw(logits, [SamplingParams(temperature=0)] * 4).token, best)
    np.testing.assert_array_equal(draw(logits, [SamplingParams(top_k=1)] * 4).token, best)
    np.testing.assert_array_equal(greedy(jnp.asarray(logits)).token, best)
    assert best.tolist()[2:] == [0, 5]


def test_greedy_rows_do_not_notice_drawing_rows():
    logits = np.repeat(random_logits(1), 4, axis=0)
    params = [SamplingParams(temperature=0), SamplingParams(top_p=0.5), SamplingParams(temperature=0, top_k=3),
              SamplingParams(temperature=5)]  # fmt: skip
    token = np.asarray(draw(logits, params).token)
    assert token[0] == token[2] == logits[0].argmax()


@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=0.6), SamplingParams(top_k=3), SamplingParams(top_p=0.8)]
)
def test_draws_follow_the_distribution(params):
    draws, vocabulary = 4000, 6
    logits = random_logits(1, seed=3, vocabulary=vocabulary)[0] / 2
    allowed = oracle_support(logits, params)
    expected = np.where(allowed, np.exp(logits / params.temperature), 0)
    expected = expected / expected.sum() * draws
    batch = np.broadcast_to(logits, (draws, vocabulary))
    token = np.asarray(draw(batch, [params] * draws, seeds=range(draws)).token)
    seen = np.bincount(token, minlength=vocabulary)
    assert not seen[~allowed].any()
    chi_square = ((seen - expected)[allowed] ** 2 / expected[allowed]).sum()
    assert chi_square < 25, "far beyond the 99.9 % point of five degrees of freedom (20.5)"
    # One seed's successive draws follow it just as well.
    token = np.asarray(draw(batch, [params] * draws, seeds=[11] * draws, num_output=range(draws)).token)
    seen = np.bincount(token, minlength=vocabulary)
    assert ((seen - expected)[allowed] ** 2 / expected[allowed]).sum() < 25


def test_a_seed_gives_the_same_tokens_in_any_batch_at_any_place():
    logits = random_logits(6, seed=4)
    params = [SamplingParams(), SamplingParams(top_k=4), SamplingParams(top_p=0.7), SamplingParams(min_p=0.1),
              SamplingParams(temperature=3.0), SamplingParams(temperature=0)]  # fmt: skip
    seeds, numbers = np.array([5, 6, 7, 8, 2**32 - 1, 10]), np.array([0, 3, 1, 9, 2, 4])
    together = np.asarray(draw(logits, params, seeds=seeds, num_output=numbers).token)
    order = np.array([4, 2, 0, 5, 3, 1])
    shuffled = draw(logits[order], [params[i] for i in order], seeds=seeds[order], num_output=numbers[order]).token
    np.testing.assert_array_equal(shuffled, together[order])
    for i in range(6):
        alone = draw(logits[i : i + 1], [params[i]], seeds=seeds[i : i + 1], num_output=numbers[i : i + 1], lanes=1)
        assert alone.token[0] == together[i]
    # A row that needs no sorting draws the same whether or not another row makes the batch sort.
    plain = draw(logits[[0, 4]], [params[0], params[4]], seeds=seeds[[0, 4]], num_output=numbers[[0, 4]]).token
    np.testing.assert_array_equal(plain, together[[0, 4]])


def test_seeds_and_draw_numbers_matter():
    logits = np.zeros((LANES, V), np.float32)
    params = [SamplingParams()] * LANES
    by_seed = draw(logits, params, seeds=range(LANES)).token
    by_number = draw(logits, params, seeds=[0] * LANES, num_output=range(LANES)).token
    assert len(set(by_seed.tolist())) > LANES // 2
    assert len(set(by_number.tolist())) > LANES // 2


def test_penalties_are_the_oracles():
    rng = np.random.default_rng(7)
    params = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(repetition_penalty=0.7),
        SamplingParams(presence_penalty=1.5),
        SamplingParams(frequency_penalty=0.8),
        SamplingParams(frequency_penalty=-1.1, presence_penalty=-0.4, repetition_penalty=2.0),
        SamplingParams(min_tokens=3, stop_token_ids=[4, 9]),
        SamplingParams(min_tokens=3, stop_token_ids=[4, 9], ignore_eos=True),
        SamplingParams(min_tokens=2, repetition_penalty=1.2),
        SamplingParams(),
    ]
    logits = random_logits(len(params), seed=8)
    seen = rng.random((len(params), V)) < 0.3
    count = rng.integers(0, 3, (len(params), V)).astype(np.int32)
    eos, num_output = (0, 39), np.full(len(params), 2, np.int32)
    out = jax.jit(penalise)(logits, to_rows(params, eos, [0] * len(params)), prompt_seen=seen,
                   output_count=count, num_output=num_output)  # fmt: skip
    for i, p in enumerate(params):
        held_back = set(p.stop_ids) | (set() if p.ignore_eos else set(eos))
        expected = oracle_penalties(logits[i], p, seen[i], count[i], 2, held_back)
        np.testing.assert_allclose(np.asarray(out[i]), expected, rtol=1e-5, atol=1e-5, err_msg=str(p))
    np.testing.assert_array_equal(np.asarray(out[-1]), logits[-1], err_msg="no parameter, no change")


def test_min_tokens_hold_back_even_a_certain_end_token():
    logits = np.zeros((2, V), np.float32)
    logits[:, 3] = 100.0
    params = [SamplingParams(temperature=0, min_tokens=2, max_tokens=9)] * 2
    token = np.asarray(draw(logits, params, num_output=[1, 2], eos=(3,)).token)
    assert token.tolist() == [0, 3]


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(3, seed=9)
    count = np.ones((3, V), np.int32)
    params = [SamplingParams(temperature=0.1, top_k=2, frequency_penalty=2.0), SamplingParams(temperature=4.0),
              SamplingParams(temperature=0, presence_penalty=1.0)]  # fmt: skip
    out = draw(logits, params, count=count, want_logprobs=True)
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    token = np.asarray(out.token)
    for i in range(3):
        np.testing.assert_allclose(out.logprob[i], exact[i, token[i]], atol=1e-5)
        assert out.rank[i] == 1 + (logits[i] > logits[i, token[i]]).sum()
        order = np.argsort(-logits[i])[:MAX_LOGPROBS]
        np.testing.assert_array_equal(out.top_ids[i], order)
        np.testing.assert_allclose(out.top_logprobs[i], exact[i, order], atol=1e-5)
    plain = draw(logits, params, count=count)
    np.testing.assert_array_equal(plain.token, token, err_msg="asking for log-probabilities changes no token")
    assert plain.logprob is None


def test_a_small_vocabulary_pads_the_rivals():
    out = token_logprobs(jnp.asarray(random_logits(2, vocabulary=5)), jnp.array([0, 4]))
    assert out.top_ids.shape == out.top_logprobs.shape == (2, MAX_LOGPROBS)
    assert sorted(np.asarray(out.top_ids[0, :5]).tolist()) == [0, 1, 2, 3, 4]
    assert (np.asarray(out.top_ids[:, 5:]) == -1).all()
    assert (np.asarray(out.top_logprobs[:, 5:]) == -np.inf).all()


@pytest.mark.parametrize(("value", "where"), [(np.nan, 7), (np.inf, 7), (-np.inf, slice(None))])
def test_there_is_no_token_where_logits_are_not_finite(value, where):
    logits = random_logits(3, seed=3)
    params = [SamplingParams(temperature=0), SamplingParams(temperature=0), SamplingParams(seed=1)]
    logits[0, 1] = -np.inf  # only never drawn
    expected = draw(logits, params).token
    logits[1:, where] = value
    assert draw(logits, params).token.tolist() == [expected[0], NOT_FINITE, NOT_FINITE]
    assert np.asarray(greedy(jnp.asarray(logits)).token).tolist() == [expected[0], NOT_FINITE, NOT_FINITE]


def test_one_compilation_a_shape_whatever_the_parameters():
    logits = random_logits(len(FILTERS), seed=12)
    draw(logits, FILTERS)
    before = len(TRACES)
    draw(logits, [SamplingParams(temperature=0)] * len(FILTERS))
    draw(logits, FILTERS[::-1], eos=(1, 2), num_output=range(len(FILTERS)))
    assert len(TRACES) == before


def test_rows_have_fixed_shapes_and_dtypes():
    rows = to_rows([SamplingParams(top_k=2**40, max_tokens=2**40, min_tokens=2**40, seed=1)], (7,), [2**32 - 1])
    kinds = {name: (value.dtype.name, value.shape) for name, value in vars(rows).items()}
    assert kinds.pop("stop_ids") == ("int32", (1, MAX_STOP_IDS))
    assert kinds.pop("seed") == ("uint32", (1,))
    assert {kinds.pop("top_k"), kinds.pop("min_tokens")} == {("int32", (1,))}
    assert set(kinds.values()) == {("float32", (1,))}
    assert rows.stop_ids[0, :2].tolist() == [7, -1]
    assert rows.top_k[0] == 2**31 - 1
    with pytest.raises(ValueError, match="eos_token_ids"):
        to_rows([SamplingParams()], range(MAX_EOS_IDS + 1), [0])
