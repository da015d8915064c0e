"""KV-Compress's metric against its definition, and what it asks of the engine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import attention_sums, random_case, random_order

from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import ObservedQueries, get
from sparsejax.methods.kv_compress import KVCompress

TEXT = 20


def scores(method, slots):
    return np.asarray(jax.jit(method.scores)(slots))


def observed_case(power, first):
    """A prompt whose recorded scores are those of queries from `first` on."""
    rng = np.random.default_rng(0)
    case = random_case(0, layers=1, rows=1, slots=24, text_length=TEXT)
    q = rng.standard_normal((TEXT, 2, 2, 8))
    score = np.zeros(case.live.shape)
    score[0, 0, :, :TEXT] = attention_sums(q, case.k[0, 0, :, :TEXT].swapaxes(0, 1), first, power)
    return case.replace(score=score, recorded=TEXT - first), score[0, 0, :, :TEXT]


def pooled(values, size):
    reach = size // 2
    return np.stack([values[:, max(j - reach, 0) : j + reach + 1].max(1) for j in range(values.shape[1])], axis=1)


@pytest.mark.parametrize(("norm", "power"), [("L2", 2), ("L1", 1)])
def test_equals_the_definition(norm, power):
    method = KVCompress(norm=norm)
    assert method.power == power
    case, metric = observed_case(power, method.record_from(TEXT, 6))
    got = scores(method, case.slots())[0, 0, :, :TEXT]
    np.testing.assert_allclose(got, pooled(metric, 7), rtol=1e-6)


def test_full_range_observes_all_queries_and_does_not_pool():
    method = KVCompress(full_range=True)
    assert method.record_from(TEXT, 6) == 0
    case, metric = observed_case(2, 0)
    np.testing.assert_allclose(scores(method, case.slots())[0, 0, :, :TEXT], metric, rtol=1e-6)
    got = scores(KVCompress(full_range=True, kernel_size=3), case.slots())[0, 0, :, :TEXT]
    np.testing.assert_allclose(got, pooled(metric, 3), rtol=1e-6)


def test_avg_divides_by_the_queries_that_could_see_a_token():
    case, metric = observed_case(2, 14)
    got = scores(KVCompress(aggregation="avg", kernel_size=1), case.slots())[0, 0, :, :TEXT]
    seen = np.minimum(6, TEXT - np.arange(TEXT))
    np.testing.assert_allclose(got, metric / seen, rtol=1e-6)


def test_avg_knows_of_gaps_between_observed_queries():
    case, metric = observed_case(2, 14)
    # The last two of the first twelve, the last two of the prompt's other five, and three decoded ones.
    observed = ObservedQueries(*(jnp.array([value]) for value in (12, 2, 12, 17)))
    slots = dataclasses.replace(case.slots(), observed=observed)
    got = scores(KVCompress(aggregation="avg", kernel_size=1), slots)[0, 0, :, :TEXT]
    standing = np.isin(np.arange(TEXT), [10, 11, 15, 16, 17, 18, 19])
    seen = np.cumsum(standing[::-1])[::-1]
    np.testing.assert_allclose(got, metric / seen, rtol=1e-6)


def test_the_order_of_slots_means_nothing():
    case = random_case(1, slots=24, text_length=60, ragged=True, recorded=5)
    order = random_order(2, case.live.shape)
    method = KVCompress(aggregation="avg")
    moved = case.permuted(order)
    expected = np.take_along_axis(scores(method, case.slots()), order, -1)
    np.testing.assert_array_equal(scores(method, moved.slots())[moved.live], expected[moved.live])


def test_frees_pages_and_goes_on_while_decoding_by_default():
    method = get("kv_compress")
    assert method.default_budget_rule == "global_pages"
    assert not method.default_compress_once
    assert method.scores_decoded_tokens()
    assert method().default_recent_tokens(1024, 32) == 32
    assert method().default_recent_tokens(40, 32) == 20
    assert method().record_from(1000, 32) == 968


@pytest.mark.parametrize(
    "option", [{"norm": "L3"}, {"aggregation": "max"}, {"full_range": 1}, {"kernel_size": 4}, {"kernel_size": 0}]
)
def test_bad_options_are_named(option):
    with pytest.raises(InvalidArgumentError, match=next(iter(option))):
        KVCompress(**option)


def test_nothing_observed_scores_zero():
    case = random_case(3, slots=24).replace(recorded=0)
    slots = case.replace(score=np.zeros_like(case.score)).slots()
    assert not jnp.any(KVCompress(aggregation="avg").scores(slots))
