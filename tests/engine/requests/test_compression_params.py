"""CompressionParams: what it resolves to, and what it refuses."""

import dataclasses
import pickle

import pytest

import sparsejax
from sparsejax import methods
from sparsejax.engine.requests.compression_params import CompressionParams
from sparsejax.errors import InvalidArgumentError, UnknownArgumentError
from sparsejax.methods.budgets import Adaptive, Pyramid, Uniform


def test_one_class_by_two_names():
    assert sparsejax.CompressionParams is CompressionParams


def test_full_keeps_everything():
    params = CompressionParams()
    assert params.method == "full"
    assert params.policy == methods.Full()
    assert not params.evicts
    assert params.once
    assert not params.per_step
    assert params.budget(100) == 100
    assert params.record_from(100) == 100
    assert params == CompressionParams(method="full")
    for name, value in {"budget_tokens": 3, "sink_tokens": 0, "compress_once": True, "budget_rule": "uniform"}.items():
        with pytest.raises(InvalidArgumentError, match=f"method 'full' keeps everything; it takes no {name}"):
            CompressionParams(**{name: value})


def test_methods_that_select_keep_everything_and_read_a_part():
    params = CompressionParams(method="omnikv", top_tokens=0.25, full_attention_layers="4,0,1", sink_tokens=3)
    assert params.policy == methods.OmniKV(top_tokens=0.25, full_attention_layers=(0, 1, 4))
    assert (params.selects, params.evicts, params.once, params.per_step) == (True, False, True, False)
    assert (params.sinks, params.recent_window, params.budget(100)) == (3, methods.OmniKV.recent_tokens, 100)
    assert (params.prefilled(100), params.decodes_again) == (100, True)
    assert CompressionParams(method="quest", context_tokens=40, recent_tokens=0).prefilled(100) == 40
    assert CompressionParams(method="quest", context_tokens=40).prefilled(30) == 30
    assert not CompressionParams(method="snapkv", keep_fraction=0.5, context_tokens=40).selects
    for name, value in {"budget_tokens": 3, "keep_fraction": 0.5, "strategy": "reuse", "budget_rule": "layer"}.items():
        with pytest.raises(
            InvalidArgumentError, match=f"method 'quest' keeps everything; it takes no {name}. How much"
        ):
            CompressionParams(method="quest", **{name: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "omnikv", "top_tokens": 0}, "top_tokens must be a whole number of at least 1"),
        ({"method": "omnikv", "top_tokens": 1.0}, "or a fraction in \\(0, 1\\), got 1.0"),
        ({"method": "quest", "top_tokens": "many"}, "top_tokens must be a whole number"),
        ({"method": "omnikv", "full_attention_layers": (1, 2)}, "layer 0 among them"),
        ({"method": "omnikv", "full_attention_layers": ()}, "full_attention_layers must be layer numbers"),
        ({"method": "omnikv", "full_attention_layers": "0,x"}, "full_attention_layers must be layer numbers"),
        ({"method": "quest", "dense_layers": -1}, "dense_layers must be a whole number of at least 0"),
        ({"method": "quest", "full_attention_layers": (0,)}, "no argument 'full_attention_layers'"),
    ],
)
def test_what_selecting_methods_refuse(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        CompressionParams(**arguments)


def test_options_reach_the_method_and_the_rule():
    params = CompressionParams(method="pyramidkv", budget_tokens=100, pooling="avg", layer_ratios=[2, 1])
    assert params.policy == methods.PyramidKV(pooling="avg")
    assert params.rule == Pyramid(layer_ratios=(2, 1))
    adaptive = CompressionParams(method="keydiff", budget_tokens=9, budget_rule="adaptive", budget_floor=0.5)
    assert adaptive.rule == Adaptive(floor=0.5)
    assert CompressionParams(method="keydiff", budget_tokens=9).rule == Uniform()


def test_equal_requests_are_equal_and_hashable():
    one = CompressionParams(method="pyramidkv", budget_tokens=100, layer_ratios=[2, 1], pooling="avg")
    two = CompressionParams(method="pyramidkv", budget_tokens=100, pooling="avg", layer_ratios=(2.0, 1.0))
    assert one == two
    assert hash(one) == hash(two)
    assert one.policy is one.policy
    assert pickle.loads(pickle.dumps(one)) == one
    assert one != dataclasses.replace(one, budget_tokens=99)
    assert dataclasses.replace(one, budget_tokens=99).rule == one.rule
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.budget_tokens = 3  # type: ignore[misc]


def test_aliases():
    params = CompressionParams(method="keydiff", max_cache_tokens=64, protected_window_size=8)
    assert params == CompressionParams(method="keydiff", budget_tokens=64, recent_tokens=8)
    with pytest.raises(InvalidArgumentError, match="max_cache_tokens is another name of budget_tokens"):
        CompressionParams(method="keydiff", max_cache_tokens=64, budget_tokens=64)


@pytest.mark.parametrize(
    ("arguments", "text_length", "expected"),
    [
        ({"method": "snapkv", "budget_tokens": 100}, 1000, (100, 0, 32, 968)),
        ({"method": "snapkv", "budget_tokens": 100, "window_tokens": 8, "recent_tokens": 3}, 1000, (100, 0, 8, 992)),
        ({"method": "snapkv", "budget_tokens": 100, "window_tokens": 8, "recent_tokens": 30}, 1000, (100, 0, 30, 992)),
        ({"method": "snapkv", "keep_fraction": 0.25}, 1001, (251, 0, 32, 969)),
        ({"method": "snapkv", "keep_fraction": 0.01, "sink_tokens": 4}, 1000, (36, 4, 32, 968)),
        ({"method": "h2o", "budget_tokens": 100}, 1000, (100, 0, 50, 0)),
        ({"method": "h2o", "keep_fraction": 0.5}, 1000, (500, 0, 250, 0)),
        ({"method": "h2o", "budget_tokens": 100, "recent_ratio": 1.0, "sink_tokens": 10}, 1000, (100, 10, 90, 0)),
        ({"method": "h2o", "budget_tokens": 100, "recent_tokens": 7, "prefill_window": 9}, 1000, (100, 0, 7, 991)),
        ({"method": "streaming_llm", "budget_tokens": 100}, 1000, (100, 4, 0, 1000)),
        ({"method": "keydiff", "budget_tokens": 100, "recent_tokens": 9}, 1000, (100, 0, 9, 1000)),
    ],
)
def test_what_it_resolves_to(arguments, text_length, expected):
    params = CompressionParams(**arguments)
    got = (params.budget(text_length), params.sinks, params.recent(text_length), params.record_from(text_length))
    assert got == expected
    assert params.sinks + params.recent(text_length) <= params.budget(text_length)


@pytest.mark.parametrize(
    ("arguments", "once", "per_step", "interval"),
    [
        ({"method": "snapkv"}, True, False, None),
        ({"method": "keydiff"}, True, False, None),
        ({"method": "keydiff", "compress_once": False}, False, False, 128),
        ({"method": "keydiff", "interval_tokens": 16}, False, False, 16),
        ({"method": "h2o"}, False, True, None),
        ({"method": "h2o", "compress_once": True}, True, False, None),
        ({"method": "random", "interval_tokens": 16}, False, False, 16),
        ({"method": "h2o", "interval_tokens": 16, "budget_rule": "adaptive"}, False, False, 16),
    ],
)
def test_when_it_compresses(arguments, once, per_step, interval):
    params = CompressionParams(budget_tokens=64, **arguments)
    assert (params.once, params.per_step, params.interval) == (once, per_step, interval)


def test_strategies_of_eviction_per_step():
    assert CompressionParams(method="h2o", budget_tokens=64).evict_strategy == "reuse"
    params = CompressionParams(method="random", budget_tokens=64, strategy="sparse_copy", num_per_evict=8)
    assert (params.evict_strategy, params.evict_count) == ("sparse_copy", 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs exactly one of budget_tokens .* and keep_fraction .*; got neither"),
        ({"budget_tokens": 64, "keep_fraction": 0.5}, "got both"),
        ({"budget_tokens": 0}, "budget_tokens must be a whole number of at least 1, got 0"),
        ({"budget_tokens": 64.0}, "budget_tokens must be a whole number"),
        ({"keep_fraction": 0}, r"keep_fraction must be a finite number in \(0, 1\], got 0"),
        ({"keep_fraction": 1.01}, r"keep_fraction must be a finite number in \(0, 1\]"),
        ({"budget_tokens": 31}, r"window_tokens \(32\) must be at most budget_tokens \(31\)"),
        ({"budget_tokens": 64, "window_tokens": 65}, r"window_tokens \(65\) must be at most budget_tokens \(64\)"),
        ({"budget_tokens": 64, "window_tokens": 0}, "window_tokens must be a whole number of at least 1"),
        ({"budget_tokens": 64, "sink_tokens": 33}, r"sink_tokens \(33\) and recent_tokens \(32.*at most budget_tokens"),
        ({"budget_tokens": 64, "sink_tokens": -1}, "sink_tokens must be a whole number of at least 0"),
        ({"budget_tokens": 64, "recent_tokens": 65}, r"recent_tokens \(65"),
        ({"budget_tokens": 64, "context_tokens": 0}, "context_tokens must be a whole number of at least 1"),
        ({"budget_tokens": 64, "compress_once": 1}, "compress_once must be True or False, got 1"),
        ({"budget_tokens": 64, "compress_once": False}, "'snapkv' cannot score generated tokens"),
        ({"budget_tokens": 64, "interval_tokens": 8}, "'snapkv' cannot score generated tokens"),
        ({"budget_tokens": 64, "strategy": "reuse"}, "strategy has a meaning only where every decode step evicts"),
        ({"budget_tokens": 64, "num_per_evict": 2}, "num_per_evict has a meaning only where every decode step evicts"),
        ({"budget_tokens": 64, "budget_floor": 0.2}, "budget_floor has no meaning for budget_rule 'uniform'"),
        ({"budget_tokens": 64, "budget_rule": "adaptive", "budget_floor": 2}, r"budget_floor must be .* \[0, 1\]"),
        ({"budget_tokens": 64, "pooling": "mean"}, "pooling must be one of"),
    ],
)
def test_bad_values_say_what_is_allowed(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        CompressionParams(method="snapkv", **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "keydiff", "window_tokens": 8}, "'keydiff' has no observation window"),
        ({"method": "h2o", "compress_once": True, "interval_tokens": 8}, "interval_tokens has no meaning"),
        ({"method": "h2o", "compress_once": True, "strategy": "reuse"}, "strategy has a meaning only"),
        (
            {"method": "h2o", "strategy": "copy"},
            "strategy must be one of 'reuse', 'free_block', 'sparse_copy', 'no_op'",
        ),
        ({"method": "h2o", "num_per_evict": 34}, "num_per_evict must be at most 33"),
        ({"method": "h2o", "recent_tokens": 64, "num_per_evict": 2}, "num_per_evict must be at most 1"),
        ({"method": "h2o", "budget_rule": "adaptive"}, "budget_rule 'adaptive' cannot evict at every step"),
        ({"method": "h2o", "scope": "all", "budget_rule": "pyramid"}, "gives layers and heads different budgets"),
        (
            {"method": "h2o", "scope": "layer", "budget_rule": "layer", "compress_once": True},
            "gives heads of a layer different budgets",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        CompressionParams(budget_tokens=64, **arguments)


@pytest.mark.parametrize("options", ["abc", 5, None, ["pooling"], {5: 3}])
def test_options_that_are_none_are_refused(options):
    with pytest.raises(InvalidArgumentError, match="options must be a dictionary from names to values"):
        CompressionParams(method="snapkv", budget_tokens=64, options=options)


def test_an_option_is_given_once():
    with pytest.raises(InvalidArgumentError, match="pooling is given twice"):
        CompressionParams(method="snapkv", budget_tokens=64, options={"pooling": "max"}, pooling="avg")


def test_unknown_names_get_the_nearest_and_the_options():
    with pytest.raises(UnknownArgumentError, match=r"no argument 'poolng'. Did you mean 'pooling'\?") as caught:
        CompressionParams(method="snapkv", budget_tokens=64, poolng="max")
    assert isinstance(caught.value, TypeError)
    assert "options of method 'snapkv' with budget rule 'uniform': kernel_size, pooling." in str(caught.value)
    # An option of another method, or of another rule, is unknown to this one.
    for name, value in {"recent_ratio": 0.5, "beta": 3, "floor": 0.5}.items():
        with pytest.raises(UnknownArgumentError, match=f"has no argument '{name}'"):
            CompressionParams(method="snapkv", budget_tokens=64, **{name: value})
    assert CompressionParams(method="snapkv", budget_tokens=64, budget_rule="pyramid", beta=3).rule == Pyramid(beta=3)
    with pytest.raises(UnknownArgumentError, match="budget_rule must be one of"):
        CompressionParams(method="snapkv", budget_tokens=64, budget_rule="even")


@pytest.mark.parametrize(
    ("fraction", "length", "budget"), [(0.07, 100, 7), (0.28, 25, 7), (0.28, 200, 56), (0.1, 3, 1)]
)
def test_fractions_are_those_that_are_written(fraction, length, budget):
    assert CompressionParams(method="keydiff", keep_fraction=fraction).budget(length) == budget


def test_a_window_that_is_not_looked_at_may_be_of_any_size():
    assert CompressionParams(method="kv_compress", budget_tokens=20, full_range=True).budget(100) == 20
    with pytest.raises(InvalidArgumentError, match=r"window_tokens \(32\) must be at most budget_tokens \(20\)"):
        CompressionParams(method="kv_compress", budget_tokens=20)


@pytest.mark.parametrize("name", ["budget_rule", "sink_tokens", "max_cache_tokens"])
def test_arguments_are_no_options(name):
    with pytest.raises(InvalidArgumentError, match=f"{name} is no option of a method or a rule: give it by name"):
        CompressionParams(method="h2o", budget_tokens=5, options={name: 1})
