"""Training by two processes that find each other, as on two hosts, gives what one process gives."""

import dataclasses
import json
import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from compressor_cases import COMPRESSOR, write_model, write_packed

from sparsejax.checkpoint import load_compressor
from train.compressor.options import TrainOptions
from train.compressor.run import Run, train

OPTIONS = TrainOptions(
    max_steps=2, batch_size=1, learning_rate=3e-3, dtype="float32", log_every=1, rematerialisation="none"
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def command(model, data, out, *more):
    """The command line that makes `OPTIONS`."""
    compressor = {**COMPRESSOR, "down_type": "linear"}  # its default, not that of the command
    options = [f"--{name.replace('_', '-')}={value}" for name, value in compressor.items()]
    for field in dataclasses.fields(TrainOptions):
        value = getattr(OPTIONS, field.name)
        if value != field.default:
            options.append(f"--{field.name.replace('_', '-')}={value}")
    run = ["train-compressor", f"--model={model}", f"--data={data}", f"--out={out}", *options, *more]
    return [sys.executable, "-m", "sparsejax", *run]


def test_two_processes_train_as_one_does(tmp_path):
    model = write_model(tmp_path / "model")
    # All rows alike, as each process reads rows of its own, in an order of its own.
    data = write_packed(tmp_path / "packed", rows=8, alike=True)
    hosts = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--mesh=data=1,model=2"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            command(model, data, tmp_path / "two", *hosts, "--process-id", str(process)),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    one = train(
        Run(
            model=str(model),
            data=data,
            out=tmp_path / "one",
            compressor=COMPRESSOR,
            options=dataclasses.replace(OPTIONS, batch_size=2),
            mesh="data=1",
            progress=False,
        )
    )
    records = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert [line["step"] for line in records[1]] == [1, 2]
    for ours, theirs in zip(*records, strict=True):
        for name in ("loss", "ce", "mse", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
    trees = [load_compressor(folder)[1] for folder in (one, tmp_path / "two" / one.name)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *trees)
