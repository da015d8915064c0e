"""The comparison of methods, with a model that knows how much it kept in place of the engine."""

from types import SimpleNamespace

import pytest
from embedded import embedded_llm

from sparsejax import CompressionParams
from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation import build_samples, encode_sample
from sparsejax.evaluation.method_sweep import compare_methods, format_methods, make_settings, over_tasks
from sparsejax.evaluation.plots import plot_methods
from sparsejax.evaluation.scoring import bootstrap_interval

TOKEN_BYTES = 100
SAMPLES = {"tasks": ["single", "multi_key"], "lengths": [128, 192], "samples": 3, "seed": 4}


class KnowingModel:
    """Answers correctly if it was not compressed, or kept at least half; remembers what it was asked."""

    def __init__(self):
        self.tokenizer = embedded_llm().get_tokenizer()
        items = build_samples(self.tokenizer, **SAMPLES)
        self.encoded = [encode_sample(self.tokenizer, item) for item in items]
        self.answers = {
            tuple(each.tokens): " ".join(item.answers) for each, item in zip(self.encoded, items, strict=True)
        }
        self.asked: list[CompressionParams] = []
        self.interrupted_at: int | None = None

    def get_tokenizer(self):
        return self.tokenizer

    def generate(self, prompts, sampling_params, compression_params, *, use_tqdm, on_output):
        assert sampling_params.temperature == 0.0
        self.asked = compression_params
        for i, each in enumerate(zip(prompts, compression_params, strict=True)):
            if i == self.interrupted_at:
                raise KeyboardInterrupt
            on_output(i, self.answer(*each))

    @staticmethod
    def read(length, compression):
        if not compression.selects:
            return None if compression.evicts else length
        return compression.sinks + compression.recent_window + compression.policy.top_tokens

    def answer(self, prompt, compression):
        text = compression.context_tokens or len(prompt)
        budget = min(compression.budget(text), text)
        right = budget >= text / 2
        if compression.selects:
            right = self.read(len(prompt), compression) >= len(prompt) / 2
        metrics = SimpleNamespace(
            kv_bytes=TOKEN_BYTES * len(prompt), kv_bytes_before_compression=TOKEN_BYTES * text * (budget < text),
            kv_bytes_after_compression=TOKEN_BYTES * budget, read_tokens=self.read(len(prompt), compression),
        )  # fmt: skip
        said = self.answers[tuple(prompt)] if right else "wrong"
        return SimpleNamespace(outputs=[SimpleNamespace(text=said)], metrics=metrics)


def sweep(methods=("snapkv",), budgets=(0.25, 0.5), **settings):
    model = KnowingModel()
    return model, compare_methods(
        model, make_settings(methods, budgets, **settings), **SAMPLES, progress=False
    )  # fmt: skip


def test_modes_see_what_they_say():
    model, rows = sweep(budgets=(0.5,))
    count = len(model.encoded)
    dense, aware, agnostic = (model.asked[start : start + count] for start in (0, count, 2 * count))
    assert not any(each.evicts for each in dense)
    assert [each.context_tokens for each in aware] == [len(prompt.tokens) - 1 for prompt in model.encoded]
    assert [each.context_tokens for each in agnostic] == [prompt.context_tokens for prompt in model.encoded]
    assert all(each.once and each.method == "snapkv" and each.keep_fraction == 0.5 for each in (*aware, *agnostic))
    assert [(row.mode, row.length, row.task) for row in rows] == [
        (mode, length, task)
        for mode in ("dense", "aware", "agnostic")
        for length in (128, 192)
        for task in ("single", "multi_key")
    ]


def test_scores_and_bytes_belong_to_their_setting():
    _, rows = sweep(budgets=(0.25, 0.5, 1000))
    for row in rows:
        assert len(row.hits) == 3
        assert row.score == (0.0 if row.budget == 0.25 else 1.0)
        # Whole-number budgets beyond the prompt leave it as it is.
        assert row.kept == pytest.approx(row.budget if row.budget in (0.25, 0.5) else 1.0, abs=0.12)
        assert row.as_dict()["kept"] == row.kept
    pooled = over_tasks(rows)
    assert [row.task for row in pooled] == ["all"] * (2 * (1 + 2 * 3))
    assert all(len(row.hits) == 6 and row.score == (0.0 if row.budget == 0.25 else 1.0) for row in pooled)


def test_tables_keep_modes_apart_with_the_dense_line_first(tmp_path):
    _, rows = sweep()
    tables = [table.splitlines() for table in format_methods(rows).split("\n\n")]
    assert len(tables) == 4
    for table, (length, mode) in zip(
        tables, [(length, mode) for length in (128, 192) for mode in ("aware", "agnostic")], strict=True
    ):
        assert table[0].startswith(f"query-{mode}: ")
        assert f"; {length} tokens, 3 samples a task" in table[0]
        assert [line.split()[:2] for line in table[2:]] == [["full", "-"], ["snapkv", "25%"], ["snapkv", "50%"]]
        assert table[2].split()[5:8] == ["100.0"] * 3
        assert table[3].split()[5:8] == ["0.0"] * 3
    plot_methods(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_read_is_apart_from_what_is_kept(tmp_path):
    model, rows = sweep(["omnikv", "snapkv"], (0.5, 48), modes=["aware"])
    selecting = [each for each in model.asked if each.selects]
    lengths = [len(prompt.tokens) for prompt in model.encoded]
    assert [each.context_tokens for each in selecting] == [length - 1 for length in lengths] * 2
    read = [model.read(length, each) for length, each in zip(lengths * 2, selecting, strict=True)]
    assert read == [-(-length // 2) for length in lengths] + [48] * len(lengths)
    reading = [row for row in rows if row.mode == "reading"]
    assert {(row.method, row.budget, row.score) for row in reading} == {("omnikv", 0.5, 1.0), ("omnikv", 48, 0.0)}
    for row in reading:
        assert row.kept == 1.0
        assert row.read == pytest.approx(0.5 if row.budget == 0.5 else 48 / row.length, abs=0.12)
        assert row.as_dict()["read"] == row.read
    assert all(row.read == row.kept for row in rows if row.method == "snapkv")
    tables = [table.splitlines() for table in format_methods(rows).split("\n\n")]
    assert [table[0].split(":")[0] for table in tables] == ["query-aware", "reading a part"] * 2
    assert all(table[1].split()[4:6] == ["kept", "read"] for table in tables)
    plot_methods(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_another_engine_are_compared_with_the_first_ones_dense_lines(tmp_path):
    model, rows = sweep(["snapkv"], (0.5,), modes=["aware"])
    asked = make_settings(["deltakv"], [0.5, 32], variant="int4")
    stored = compare_methods(model, asked[1:], **SAMPLES, dense=rows, progress=False)
    dense = [row for row in rows if row.mode == "dense"]
    assert {(row.name, row.mode, row.budget) for row in stored} == {
        ("deltakv int4", "storing", 0.5),
        ("deltakv int4", "storing", 32),
    }
    assert [row.dense_kv_bytes for row in stored] == [row.kv_bytes for row in dense] * 2
    assert all(row.kept == row.read == 1.0 for row in stored)  # the model does not store anything
    table = format_methods([*rows, *stored]).split("\n\n")[1]
    assert [line.split()[:3] for line in table.splitlines()[3:]] == [
        ["deltakv", "int4", "50%"],
        ["deltakv", "int4", "32"],
    ]
    plot_methods([*rows, *stored], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_options_reach_their_method():
    settings = make_settings(
        ["full", "snapkv", "h2o"],
        [64],
        ["agnostic"],
        common={"sink_tokens": 2},
        options={"snapkv": {"pooling": "avg", "sink_tokens": 3}, "h2o": {"compress_once": False}},
    )
    dense, snapkv, h2o = [each.compression for each in settings]
    assert not dense.evicts
    assert (snapkv.policy.pooling, snapkv.sinks, snapkv.budget_tokens, snapkv.once) == ("avg", 3, 64, True)
    assert (h2o.sinks, h2o.once) == (2, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": ["snapkv"], "budgets": [16]}, "method 'snapkv' at budget 16: window_tokens"),
        ({"methods": ["keydiff"], "budgets": [0.5], "common": {"window_tokens": 8}}, "'keydiff' has no observation"),
        ({"methods": ["keydiff"], "budgets": [0.5], "options": {"snapkv": {}}}, "'snapkv', which is not among"),
        ({"methods": ["keydiff"], "budgets": []}, "budgets must have"),
        ({"methods": ["keydiff"], "budgets": [0.5], "modes": ["blind"]}, "modes must be of aware, agnostic"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make_settings(**arguments)


def test_the_first_setting_is_dense():
    with pytest.raises(InvalidArgumentError, match="begin with a dense one"):
        compare_methods(KnowingModel(), make_settings(["snapkv"], [0.5])[1:])


def test_an_interrupted_comparison_hands_over_what_is_complete():
    model, complete = sweep()
    count, seen = len(model.encoded), []
    model.interrupted_at = 2 * count - 1  # in the last group of the second line
    with pytest.raises(KeyboardInterrupt):
        compare_methods(
            model, make_settings(["snapkv"], [0.25, 0.5]), **SAMPLES, progress=False, on_rows=seen.append
        )  # fmt: skip
    groups = len({(row.length, row.task) for row in complete})
    assert seen == [complete[: 2 * groups - 1]]
    table = format_methods(seen[0]).splitlines()
    assert [line.split()[-1] for line in table if line.startswith("snapkv")] == ["0.0", "-"], "one length is whole"
    model.interrupted_at, seen = SAMPLES["samples"] - 1, []  # before any group is complete
    with pytest.raises(KeyboardInterrupt):
        compare_methods(
            model, make_settings(["snapkv"], [0.25, 0.5]), **SAMPLES, progress=False, on_rows=seen.append
        )  # fmt: skip
    assert seen == [[]]


def test_bootstrap_intervals():
    low, high = bootstrap_interval([True] * 30 + [False] * 70)
    # The normal approximation's half width is 0.09.
    assert low == pytest.approx(0.21, abs=0.02)
    assert high == pytest.approx(0.39, abs=0.02)
    assert bootstrap_interval([True] * 30 + [False] * 70) == (low, high)
    assert bootstrap_interval([True] * 5) == (1.0, 1.0)
    wide = bootstrap_interval([True, False, False])
    assert wide[1] - wide[0] > high - low
