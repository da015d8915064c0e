"""Each scorer against an independent formula in numpy, on random K, Q and V."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import Case, attention_sums, keep, random_case, random_order, scores

from sparsejax import methods
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import H2O, KeyDiff, PyramidKV, Random, SnapKV, StreamingLLM
from sparsejax.methods.budgets import Uniform

TEXT, WINDOW, GROUP = 24, 6, 2
SCORERS = [SnapKV(), SnapKV(pooling="avg"), H2O(), H2O(scope="all"), KeyDiff(), Random(), StreamingLLM()]


def recorded_case(seed: int, first: int) -> tuple[Case, np.ndarray]:
    """A text whose score was recorded from queries at positions >= first; also the queries [L, K, T, H, G, D]."""
    case = random_case(seed, slots=TEXT, group=GROUP, window=WINDOW, recorded=TEXT - first)
    layers, rows, heads, tokens, dim = case.k.shape
    q = np.random.default_rng(seed + 1).normal(size=(layers, rows, tokens, heads, GROUP, dim)).astype(np.float32)
    sums = np.array(
        [
            [attention_sums(q[layer, row], case.k[layer, row].swapaxes(0, 1), first) for row in range(rows)]
            for layer in range(layers)
        ]
    )
    return case.replace(score=sums), q


def softmax_rows(q, k):
    """[T, T] causal attention probabilities of one query head, all at once."""
    logits = q.astype(np.float64) @ k.astype(np.float64).T / np.sqrt(q.shape[-1])
    logits[np.triu_indices(len(q), 1)] = -np.inf
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize(
    ("method", "reduce", "size"),
    [
        (SnapKV(), np.max, 7),
        (SnapKV(pooling="avg"), np.mean, 5),
        (SnapKV(kernel_size=3), np.max, 3),
        (SnapKV(pooling="none"), np.mean, 1),
        (PyramidKV(), np.max, 7),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_snapkv_is_pooled_mean_attention_of_the_window(method, reduce, size):
    case, q = recorded_case(0, TEXT - WINDOW)
    got = scores(method, case)
    prefix = TEXT - WINDOW
    for layer, row, head in np.ndindex(*case.k.shape[:3]):
        p = np.mean([softmax_rows(q[layer, row, :, head, g], case.k[layer, row, head]) for g in range(GROUP)], axis=0)
        observed = p[prefix:, :prefix].mean(0)
        near = [observed[max(j - size // 2, 0) : j + size // 2 + 1] for j in range(prefix)]
        np.testing.assert_allclose(got[layer, row, head, :prefix], [reduce(each) for each in near], rtol=1e-5)


def test_snapkv_keeps_its_window_and_chooses_per_head():
    case, _ = recorded_case(1, TEXT - WINDOW)
    case = case.replace(recent=SnapKV().default_recent_tokens(12, WINDOW))
    kept = keep(Uniform(), case, 12, scores(SnapKV(), case))
    assert np.all(kept[..., -WINDOW:])
    assert np.all(kept.sum(-1) == 12)
    assert np.any(kept[:, :, 0] != kept[:, :, 1])


def test_h2o_is_the_accumulated_attention():
    case, q = recorded_case(2, 0)
    got = scores(H2O(), case)
    for layer, row, head in np.ndindex(*case.k.shape[:3]):
        p = [softmax_rows(q[layer, row, :, head, g], case.k[layer, row, head]) for g in range(GROUP)]
        np.testing.assert_allclose(got[layer, row, head], np.sum(p, axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize(("scope", "axes"), [("layer", 2), ("all", (0, 2))])
def test_h2o_scopes_average_before_choosing(scope, axes):
    case, _ = recorded_case(3, 0)
    got = scores(H2O(scope=scope), case)
    expected = np.broadcast_to(case.score.mean(axes, keepdims=True), case.score.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    kept = keep(Uniform(), case, 9, got)
    assert np.all(kept == kept[:, :, :1])
    assert np.all(kept == kept[:1]) == (scope == "all")


def test_h2o_records_all_queries_or_the_last():
    assert H2O().record_from(100, 0) == 0
    assert H2O(prefill_window=30).record_from(100, 0) == 70
    assert H2O(prefill_window=300).record_from(100, 0) == 0
    assert H2O(recent_ratio=0.25).default_recent_tokens(101, 0) == 25
    assert SnapKV().record_from(100, 32) == 68
    assert SnapKV().record_from(20, 32) == 0


def test_keydiff_is_minus_the_cosine_to_the_mean_direction():
    case = random_case(4, ragged=True)
    got = scores(KeyDiff(), case)
    for lane in np.ndindex(*case.k.shape[:3]):
        live = case.live[lane]
        keys = case.k[lane][live].astype(np.float64)
        if not len(keys):
            continue
        anchor = np.mean([key / np.linalg.norm(key) for key in keys], axis=0)
        cosine = [key @ anchor / np.linalg.norm(key) / np.linalg.norm(anchor) for key in keys]
        np.testing.assert_allclose(got[lane][live], -np.array(cosine), rtol=1e-4, atol=1e-6)


def test_keydiff_survives_keys_of_zero():
    case = random_case(5)
    assert np.all(np.isfinite(scores(KeyDiff(), case.replace(k=np.zeros_like(case.k)))))


def murmur_word(bits: int) -> int:
    """MurmurHash3's 32-bit finaliser in Python integers."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits ^ (bits >> 16)


def test_random_is_the_hash_of_seed_position_layer_and_head():
    case = random_case(6, ragged=True).replace(seed=2**31 + 5)
    got = scores(Random(), case)
    for layer, row, head, slot in zip(*np.nonzero(case.live), strict=True):
        bits = murmur_word((case.seed + 0x9E3779B9) & 0xFFFFFFFF)
        for word in (int(case.position[layer, row, head, slot]), int(layer), int(head)):
            bits = murmur_word(bits ^ word)
        assert got[layer, row, head, slot] == (bits >> 8) / 2**24


def test_random_is_uniform_and_depends_on_all_it_should():
    case = random_case(7, slots=4096, page_size=64, layers=2, rows=1)
    got = scores(Random(), case)
    for lane in got.reshape(-1, 4096):
        # Kolmogorov-Smirnov at one in a million.
        assert np.abs(np.sort(lane) - np.arange(4096) / 4096).max() < 2.7 / 64
    lanes = [*got.reshape(-1, 4096), *scores(Random(), case.replace(seed=1)).reshape(-1, 4096)]
    correlation = np.corrcoef(lanes) - np.eye(len(lanes))
    assert np.abs(correlation).max() < 0.1


@pytest.mark.parametrize(("scope", "layers", "heads"), [("head", 2, 2), ("layer", 2, 1), ("all", 1, 1)])
def test_random_scopes(scope, layers, heads):
    got = scores(Random(scope=scope), random_case(8, layers=2, rows=1))
    assert len(np.unique(got[:, 0, 0], axis=0)) == layers
    assert len(np.unique(got[0, 0], axis=0)) == heads


def test_streaming_llm_keeps_sinks_and_the_latest():
    case = random_case(9, sinks=StreamingLLM.default_sink_tokens)
    case = case.permuted(random_order(0, case.live.shape))
    kept = keep(Uniform(), case, [10, 11], scores(StreamingLLM(), case))
    for layer, row, head in np.ndindex(*case.live.shape[:3]):
        expected = {*range(4), *range(TEXT - 6 - row, TEXT)}
        assert set(case.position[layer, row, head][kept[layer, row, head]]) == expected


@pytest.mark.parametrize("method", SCORERS, ids=str)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_permuted_slots_get_permuted_scores(method, seed):
    # A scope over heads holds the same slots in all of them, so they are permuted alike.
    shared = method.equal_heads
    case = random_case(seed, window=3, ragged=not shared)
    order = random_order(seed, case.live.shape)
    order = np.broadcast_to(order[:1, :, :1], order.shape) if shared else order
    before, after = scores(method, case), scores(method, case.permuted(order))
    expected = np.where(case.live, before, 0)
    got = np.where(case.permuted(order).live, after, 0)
    np.testing.assert_allclose(got, np.take_along_axis(expected, order, axis=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", SCORERS, ids=str)
def test_no_victim_is_protected(method):
    case = random_case(11, sinks=3, recent=7, window=5, ragged=True)
    for name in ("uniform", "pyramid", "adaptive", "layer", "global"):
        rule = methods.get_rule(name)()
        kept = keep(rule, case, [4, 11], scores(method, case))
        assert np.all(kept[case.protected])


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("snapkv", {"pooling": "mean"}, "pooling must be one of 'max', 'avg', 'none'; got 'mean'"),
        ("snapkv", {"kernel_size": 4}, "kernel_size must be odd"),
        ("pyramidkv", {"kernel_size": 0}, "kernel_size must be a whole number of at least 1"),
        ("h2o", {"scope": "heads"}, "scope must be one of 'head', 'layer', 'all'"),
        ("h2o", {"recent_ratio": 1.5}, r"recent_ratio must be a finite number in \[0, 1\]"),
        ("h2o", {"prefill_window": 0}, "prefill_window must be a whole number of at least 1"),
        ("random", {"scope": None}, "scope must be one of"),
    ],
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        methods.get(method)(**options)
