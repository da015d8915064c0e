"""Whole training runs: resumed bit for bit, stopped where they diverge, and refused where they do not fit."""

import dataclasses
import json
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from compressor_cases import COMPRESSOR, LENGTH, write_model, write_packed

from sparsejax.checkpoint import load_compressor
from sparsejax.cli import main
from sparsejax.errors import InvalidArgumentError, SparsejaxError
from train.compressor import run as run_module
from train.compressor.checkpoints import Checkpoints
from train.compressor.options import TrainOptions
from train.compressor.placement import Placement
from train.compressor.run import Run, TrainingDivergedError, train
from train.compressor.step import learning_rate

OPTIONS = TrainOptions(
    max_steps=20,
    batch_size=2,
    accumulation=2,
    learning_rate=3e-3,
    warmup_ratio=0.1,
    document_masks=True,
    dtype="float32",
    log_every=5,
    save_every=5,
    keep=2,
    rematerialisation="none",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    return root, write_model(root / "model"), write_packed(root / "packed")


def make_run(folders, name, **changes):
    root, model, data = folders
    given = {"compressor": COMPRESSOR, "options": OPTIONS, "mesh": "data=1", "progress": False, **changes}
    return Run(model=str(model), data=data, out=root / name, **given)


@pytest.fixture(scope="module")
def whole(folders):
    """A run of twenty steps."""
    return train(make_run(folders, "whole"))


def tree_of_compressor(folder):
    return jax.device_get(load_compressor(folder)[1])


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def test_twenty_steps_are_ten_resumed_and_ten(folders, whole):
    half = make_run(folders, "half", stop_after=10)
    early = tree_of_compressor(train(half))
    assert [line["step"] for line in metrics(half.out)] == [5, 10]
    resumed = train(dataclasses.replace(half, stop_after=None, resume=True))
    assert metrics(half.out) == metrics(whole.parent)
    for folder in (resumed, whole):
        assert sorted(int(path.name) for path in (folder.parent / "checkpoints").iterdir() if path.name.isdigit()) == [
            15,
            20,
        ]
    states = []
    for folder in (resumed, whole):
        manager = Checkpoints(folder.parent / "checkpoints", keep=2)
        states.append(manager._manager.restore(20)["state"])
        manager.close()
    jax.tree.map(np.testing.assert_array_equal, *states)
    late = tree_of_compressor(resumed)
    jax.tree.map(np.testing.assert_array_equal, late, tree_of_compressor(whole))
    assert any(not np.array_equal(*pair) for pair in zip(jax.tree.leaves(early), jax.tree.leaves(late), strict=True))


def test_a_run_leaves_its_record(whole):
    lines = metrics(whole.parent)
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    assert lines[-1]["loss"] == pytest.approx(lines[-1]["ce"] + lines[-1]["mse"], rel=1e-5)
    assert (whole.parent / "loss.png").stat().st_size > 1000
    record = json.loads((whole.parent / "options.json").read_text())
    assert (record["steps"], record["rows_per_step"], record["compressor"]["neighbors"]) == (20, 4, 2)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(folders):
    run = make_run(folders, "diverged", options=dataclasses.replace(OPTIONS, learning_rate=1e30, clip=1e30))
    with pytest.raises(TrainingDivergedError, match=r"Step .* is not finite"):
        train(run)
    (saved,) = run.out.glob("diverged_step_*.npz")
    assert np.load(saved)["tokens"].shape == (2, 2, 24)
    assert not (run.out / "compressor").exists()


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("whole", {}, "holds something already"),
        ("nowhere", {"resume": True}, "There is nothing to resume"),
        ("short", {"options": dataclasses.replace(OPTIONS, length=3)}, "length must be above sink_tokens"),
        ("whole", {"resume": True, "options": dataclasses.replace(OPTIONS, seed=1)}, "seed 42, now 1"),
        ("mesh", {"mesh": "data=3"}, "mesh 'data=3' needs 3 devices"),
        ("nothing", {"options": dataclasses.replace(OPTIONS, max_steps=0)}, "max_steps 0 trains nothing"),
        ("many", {"options": dataclasses.replace(OPTIONS, batch_size=1000)}, "A step takes"),
        ("none", {"compressor": {**COMPRESSOR, "neighbors": 0}}, "neighbors"),
        (
            "gates",
            {"init": "pca", "compressor": {**COMPRESSOR, "down_type": "mlp_swiglu"}},
            "init 'pca' needs down_type",
        ),
        ("file/run", {}, "out .*file/run cannot be made: .*file is no folder"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(folders, whole, monkeypatch, name, changes, words):
    """And is so before the weights, which may be many, are loaded."""

    def load_frozen(*args, **options):
        raise AssertionError("the model was loaded")

    run = make_run(folders, name, **changes)
    if name == "file/run":
        run.out.parent.write_text("")
    if not changes.get("resume"):
        monkeypatch.setattr("train.compressor.run.load_frozen", load_frozen)
    with pytest.raises(SparsejaxError) as error:
        train(run)
    assert re.search(words, str(error.value))
    assert name == "whole" or not run.out.exists()


def test_a_compressor_to_start_from_must_be_of_the_same_kind(folders, whole):
    with pytest.raises(
        InvalidArgumentError, match=r"another compressor than the options ask for: it has neighbors 2, not 3"
    ):
        train(
            dataclasses.replace(make_run(folders, "other", init=str(whole)), compressor={**COMPRESSOR, "neighbors": 3})
        )


def test_a_resumed_run_says_what_of_the_compressor_differs(folders, whole):
    run = make_run(folders, "whole", resume=True)
    with pytest.raises(InvalidArgumentError, match=r"it had compressor\.neighbors 2, now 3\.$"):
        train(dataclasses.replace(run, compressor={**COMPRESSOR, "neighbors": 3}))


def test_a_run_is_not_resumed_on_other_rows(folders, tmp_path):
    data = tmp_path / "rows"
    shutil.copytree(folders[2], data)
    run = dataclasses.replace(make_run(folders, "other_rows", stop_after=1), data=data)
    train(run)
    tokens = np.fromfile(data / "tokens.bin", "<u2")
    tokens[-LENGTH:] = tokens[-LENGTH:][::-1]
    tokens.tofile(data / "tokens.bin")
    with pytest.raises(InvalidArgumentError, match="has other rows than when the run began"):
        train(dataclasses.replace(run, stop_after=2, resume=True))


def test_a_start_that_cannot_be_had_leaves_nothing(folders, tmp_path):
    run = make_run(folders, "no_start", init=str(tmp_path / "nowhere"))
    with pytest.raises(SparsejaxError, match="nowhere"):
        train(run)
    assert not run.out.exists()
    # Components of another model's tokens would be those of whatever its embeddings make of them.
    foreign = write_packed(tmp_path / "foreign")
    np.full((40, 24), 60_000, "<u2").tofile(foreign / "tokens.bin")
    run = dataclasses.replace(make_run(folders, "foreign", init="pca"), data=foreign)
    with pytest.raises(InvalidArgumentError, match="Was it tokenized for another model"):
        train(run)
    assert not run.out.exists()


def test_the_schedule_rises_and_falls_to_the_end():
    options = dataclasses.replace(OPTIONS, learning_rate=1.0, warmup_ratio=0.2)
    rates = [float(learning_rate(options, 10)(step)) for step in range(10)]
    np.testing.assert_allclose(rates, [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    flat = dataclasses.replace(options, warmup_ratio=0.0)
    assert float(learning_rate(flat, 10)(0)) == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "parallel"}, "model_type must be one of e2e, cluster_e2e, cluster_e2e_big; got 'parallel'"),
        ({"train_on": "kl"}, "train_on must be one of both, ce, mse"),
        ({"rematerialisation": "some"}, "rematerialisation must be one of none, dots, full"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"warmup_ratio": 1.0}, "warmup_ratio must be at least 0 and below 1"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and not negative"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite and not negative"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(InvalidArgumentError) as error:
        TrainOptions(**options)
    assert words in str(error.value)


def test_the_command_trains_and_measures(folders, capsys):
    root, model, data = folders
    small = ["--kv-compressed-size", "4", "--down-type", "linear", "--dtype", "float32", "--sink-tokens", "3"]
    command = ["train-compressor", "--model", str(model), "--data", str(data), "--out", str(root / "cli"), *small]
    assert main([*command, "--max-steps", "2", "--model-type", "e2e", "--chunk-size", "4", "--mesh", "data=1"]) == 0
    printed = capsys.readouterr()
    assert f"wrote {root / 'cli' / 'compressor'}" in printed.out
    assert "ce " in printed.err
    assert "tok/s" in printed.err
    assert load_compressor(root / "cli" / "compressor")[0].references == "e2e"
    bench = ["--benchmark", "1", "--random-weights", str(model / "config.json"), "--length", "16", "--mesh", "data=1"]
    assert main(["train-compressor", *bench, *small]) == 0
    printed = capsys.readouterr().out
    assert "model FLOP" in printed
    assert "%" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--data and --out must be given"),
        (["--coordinator", "localhost:1"], "belong together"),
        (["--coordinator", "foo", "--num-processes", "1", "--process-id", "0"], "HOST:PORT, got 'foo'"),
        (["--coordinator", "foo:1", "--num-processes", "2", "--process-id", "5"], "--process-id must be from 0 to 1"),
        (["--coordinator", "foo:1", "--num-processes", "0", "--process-id", "0"], "--num-processes must be at least 1"),
        (["--batch-size", "0"], "batch_size must be a whole number"),
        (["--benchmark", "0"], "--benchmark must be at least 1"),
        (["--benchmark", "1", "--data", "x"], "--data has no meaning with --benchmark"),
        (["--benchmark", "1", "--max-steps", "9"], "--max-steps has no meaning with --benchmark"),
        (["--chunk-size", "4"], "--chunk-size has no meaning with cluster_e2e_big"),
        (["--model-type", "e2e", "--neighbors", "2"], "--neighbors has no meaning with e2e"),
        (["--cluster-temp", "2"], "--cluster-temp has no meaning with hard assignment"),
        (["--up-intermediate-size", "8"], "--up-intermediate-size has no meaning with a linear decoder"),
    ],
)
def test_the_command_says_what_is_missing(capsys, arguments, words):
    assert main(["train-compressor", *arguments]) == 1
    assert words in capsys.readouterr().err


@pytest.fixture
def ctrl_c():
    """Makes Ctrl-C work where tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("place", ["data", "step"])
def test_an_interrupted_run_is_resumed_bit_for_bit(folders, whole, monkeypatch, place):
    """Ctrl-C while a batch is put on the device, and while a step runs."""
    run, calls = make_run(folders, f"interrupted by {place}"), iter(range(1, 1000))

    def pressing(work):
        def pressed(*arguments):
            if next(calls) == 7:
                os.kill(os.getpid(), signal.SIGINT)
            return work(*arguments)

        return pressed

    with monkeypatch.context() as patch:
        if place == "data":
            patch.setattr(Placement, "put_batch", pressing(Placement.put_batch))
        else:
            make = run_module.make_train_step
            patch.setattr(run_module, "make_train_step", lambda *given, **options: pressing(make(*given, **options)))
        with pytest.raises(KeyboardInterrupt):
            train(run)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = train(dataclasses.replace(run, resume=True))
    assert metrics(run.out) == metrics(whole.parent)
    jax.tree.map(np.testing.assert_array_equal, tree_of_compressor(resumed), tree_of_compressor(whole))


def test_a_record_that_was_cut_off_is_gone_on_with(folders, whole):
    run = make_run(folders, "cut", stop_after=10)
    train(run)
    with (run.out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    train(dataclasses.replace(run, stop_after=None, resume=True))
    assert metrics(run.out) == metrics(whole.parent)
