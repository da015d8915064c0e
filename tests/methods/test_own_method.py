"""A scorer of one's own: one short file, the one in docs/methods.md, and it composes with everything."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from method_cases import random_case

from sparsejax import CompressionParams, methods
from sparsejax.cli import main
from sparsejax.engine.programs.compression import choose_slots
from sparsejax.engine.requests import compression_params
from sparsejax.errors import InvalidArgumentError
from sparsejax.methods import registry

GUIDE = Path(__file__).parents[2] / "docs" / "methods.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
(SOURCE,) = [block for block in BLOCKS if "@register" in block]


@pytest.fixture
def long_values(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    assert len(SOURCE.splitlines()) < 60
    path = tmp_path / "long_values.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("long_values", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "long_values", module)
    spec.loader.exec_module(module)
    return module.LongValues


@pytest.mark.parametrize("rule", ["uniform", "pyramid", "adaptive", "layer", "global"])
def test_a_new_file_scores_under_every_budget_rule(long_values, rule):
    params = CompressionParams(
        method="long_values", keep_fraction=0.5, sink_tokens=2, recent_tokens=3, budget_rule=rule, exponent=2
    )
    assert isinstance(params.policy, long_values)
    case = random_case(0, sinks=params.sinks, recent=params.recent(24))
    scores = params.policy.scores(case.slots())
    np.testing.assert_allclose(scores, (case.v.astype(np.float64) ** 2).sum(-1), rtol=1e-5)
    kept = np.asarray(params.rule.keep(scores, case.slots(), jnp.full(2, params.budget(24))))
    assert np.all(kept[case.protected])
    np.testing.assert_array_equal(kept.sum(axis=(0, 2, 3)), 3 * 2 * 12)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"power": 2.0}, "'power', which means something else"),
        ({"records": 1}, "'records', which means something else"),
        ({"sink_tokens": 4}, "'sink_tokens', which is an argument of CompressionParams"),
        ({"max_cache_tokens": 4}, "'max_cache_tokens', which is an argument of CompressionParams"),
        ({"strength": dataclasses.MISSING}, "must give its option 'strength' a default"),
    ],
)
def test_options_need_a_name_of_their_own_and_a_default(option, words):
    ((name, default),) = option.items()
    fields = [(name, float) if default is dataclasses.MISSING else (name, float, dataclasses.field(default=default))]
    own = dataclasses.make_dataclass(
        "Own",
        fields,
        bases=(methods.Method,),
        namespace={"name": "own", "summary": "Own.", "layer_scores": lambda self, layer: layer.score},
        frozen=True,
    )
    with pytest.raises(InvalidArgumentError, match=re.escape(words)):
        methods.register(own)
    assert "own" not in methods.available()


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (lambda layer: layer.score[0], r"method 'own' must give a float for each slot of a layer, f32\[2, 2, "),
        (lambda layer: layer.live, "of 3 layers it gave bool"),
        (lambda layer: layer.position, "of 3 layers it gave int32"),
    ],
)
def test_scores_must_be_a_float_for_each_slot(scores, words):
    own = dataclasses.make_dataclass(
        "Own", [], bases=(methods.Method,), frozen=True,
        namespace={"name": "own", "summary": "Own.", "layer_scores": lambda self, layer: scores(layer)},
    )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match=words):
        choose_slots(own(), methods.get_rule("uniform")(), random_case(0).slots(), jnp.full(2, 4))


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (lambda scores: scores, "budget rule 'own' must say of each slot whether it stays, bool.* it gave float32"),
        (lambda scores: scores[0] > 0, "it gave bool"),
    ],
)
def test_a_rule_must_say_of_each_slot_whether_it_stays(keep, words):
    own = dataclasses.make_dataclass(
        "Own", [], bases=(methods.BudgetRule,), frozen=True,
        namespace={"name": "own", "summary": "Own.", "keep": lambda self, scores, slots, budget: keep(scores)},
    )  # fmt: skip
    with pytest.raises(InvalidArgumentError, match=words):
        choose_slots(methods.get("keydiff")(), own(), random_case(0).slots(), jnp.full(2, 4))


def test_common_arguments_are_those_of_compression_params():
    fields = {field.name for field in dataclasses.fields(CompressionParams)}
    assert fields | set(compression_params._ALIASES) == registry.COMMON_ARGUMENTS


def test_it_is_listed_and_described(long_values):
    assert "long_values" in methods.available()
    described = methods.describe("long_values")
    assert described.summary == "Tokens with the longest values."
    assert described.options == {"exponent": 1.0}
    with pytest.raises(InvalidArgumentError, match="exponent must be"):
        CompressionParams(method="long_values", keep_fraction=0.5, exponent=0)


def test_what_is_no_method_is_refused(long_values):
    with pytest.raises(InvalidArgumentError, match="must derive from"):
        registry.register(int)  # type: ignore[type-var]

    class Plain(methods.Method):
        pass

    with pytest.raises(InvalidArgumentError, match="dataclass"):
        registry.register(Plain)

    @dataclasses.dataclass(frozen=True)
    class Nameless(methods.Method):
        pass

    with pytest.raises(InvalidArgumentError, match="class variable name"):
        registry.register(Nameless)

    @dataclasses.dataclass(frozen=True)
    class Unscored(methods.Method):
        name = "unscored"
        summary = "Nothing."

    with pytest.raises(InvalidArgumentError, match="must define layer_scores"):
        registry.register(Unscored)

    @dataclasses.dataclass(frozen=True)
    class Twin(long_values):
        pass

    with pytest.raises(InvalidArgumentError, match="named 'long_values' exists"):
        registry.register(Twin)


@pytest.mark.parametrize("name", [name for name in methods.available() if name != "full"])
def test_every_built_in_method_says_what_it_is(name):
    described = methods.describe(name)
    assert described.summary.endswith(".")
    assert described.source or name == "random"
    assert described.family != "full"
    methods.get_rule(described.budget_rule)


def test_commands_import_it_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.delitem(sys.modules, "long_values", raising=False)
    path = tmp_path / "long_values.py"
    path.write_text(SOURCE)
    assert main(["--import", str(path), "methods", "long_values"]) == 0
    assert "Tokens with the longest values." in capsys.readouterr().out
    for wrong in (tmp_path / "nothing.py", tmp_path):
        assert main(["--import", str(wrong), "methods"]) == 1
        assert f"--import must be a Python file, got {wrong}" in capsys.readouterr().err
