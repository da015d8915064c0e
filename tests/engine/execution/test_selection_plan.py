"""Which compiled step serves the decodes of a batch that selects, and how the host counts what they read."""

import numpy as np
import pytest

from sparsejax import CompressionParams, SamplingParams
from sparsejax.engine.execution.selection_plan import MOST_CHOICES, Selections, view_widths
from sparsejax.engine.requests.request import Request
from sparsejax.errors import InvalidArgumentError
from sparsejax.models import ModelConfig

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=131072,
    eos_token_ids=(2,),
)
FULL = CompressionParams()
OMNIKV = CompressionParams(method="omnikv", top_tokens=1000)
OTHERS = CompressionParams(method="omnikv", top_tokens=0.5)
QUEST = CompressionParams(method="quest", top_tokens=1000)


@pytest.fixture
def selections():
    return Selections(CONFIG, max_slots=131072, page_size=32)


def request(compression, length):
    return Request("x", [1] * 4, SamplingParams(), compression, num_computed=length)


def options(selections, *asked, mixed=False):
    return selections.step_options([request(*each) for each in asked], mixed=mixed)


def test_widths_are_few_and_reach_the_longest_text():
    assert view_widths(131072) == (2048, 16384, 131072)
    assert view_widths(8191) == (8191,)
    assert view_widths(8192) == (1024, 8192)
    assert view_widths(100) == (100,)


def test_the_cheapest_step_that_serves_all(selections):
    assert options(selections, (FULL, 9000)) is None
    alike = options(selections, (OMNIKV, 9000), (OMNIKV, 100000))
    assert (alike.everyone, alike.width, len(alike.roles)) == (True, 2048, 1)
    wider = options(selections, (OMNIKV, 9000), (OTHERS, 9000))
    assert (wider.everyone, wider.width, wider.roles) == (True, 16384, alike.roles)
    for beside in (
        options(selections, (OMNIKV, 9000), (FULL, 9)),
        options(selections, (OMNIKV, 9000), mixed=True),
    ):
        assert (beside.everyone, beside.width, beside.roles) == (False, 131072, alike.roles)
    both = options(selections, (OMNIKV, 9000), (QUEST, 9))
    assert (both.everyone, len(both.roles), len({number for number, _ in both.roles})) == (False, 2, 2)


def test_a_warm_up_covers_what_steps_ask_for(selections):
    for mixed in (False, True):
        warm = selections.warm_options([OMNIKV, QUEST], mixed=mixed, uniform=False)
        assert len(warm) == len(set(warm)) == (3 if mixed else 2 * 4 + 1)
        for asked in (
            [OMNIKV],
            [OTHERS],
            [QUEST],
            [OMNIKV, FULL],
            [QUEST, FULL],
            [OMNIKV, QUEST],
            [OTHERS, QUEST, FULL],
        ):
            for length in (5, 3000, 30000, 131000):
                assert options(selections, *((each, length) for each in asked), mixed=mixed) in warm
    assert [each.method for each in selections.defaults(["omnikv", "quest"])] == ["omnikv", "quest"]


def test_tokens_that_are_read(selections):
    lengths = np.asarray([10, 500, 9000], np.int32)
    asked = {"top_tokens": 100, "sink_tokens": 4, "recent_tokens": 32}
    omnikv = CompressionParams(method="omnikv", full_attention_layers=(0, 4), **asked)
    followed = np.asarray([10, 136, 136])
    np.testing.assert_allclose(selections.read_tokens(omnikv, lengths), (2 * lengths + 6 * followed) / 8)
    # Whole pages: the one with sinks, four that are chosen, and those from the one that the recent tokens begin in.
    quest = CompressionParams(method="quest", dense_layers=2, **asked)
    pages = np.asarray([10, 32 + 4 * 32 + 500 - 14 * 32, 32 + 4 * 32 + 9000 - 280 * 32])
    np.testing.assert_allclose(selections.read_tokens(quest, lengths), (2 * lengths + 6 * pages) / 8)


def test_choices_of_layers_are_bounded(selections):
    asked = [CompressionParams(method="omnikv", full_attention_layers=(0, layer)) for layer in range(1, 8)]
    asked += [CompressionParams(method="omnikv", full_attention_layers=(0, 1, layer)) for layer in range(2, 8)]
    asked += [CompressionParams(method="quest", dense_layers=layers) for layers in (1, 2, 3)]
    assert len(asked) == MOST_CHOICES
    another = CompressionParams(method="quest", dense_layers=4)
    selections.check(*asked, asked[0])
    with pytest.raises(InvalidArgumentError, match="at most 16 different choices"):
        selections.check(*asked, another)
    selections.check(another)  # to ask for all together has used none up
    for each in asked:
        selections.take(each)
    with pytest.raises(InvalidArgumentError, match="at most 16 different choices"):
        selections.check(another)
    selections.check(asked[0])
