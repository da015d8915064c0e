"""What is lowered once is found again: by other programs of the process, and by other processes with the same cache."""

import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from lowering import lower_for_h200

from pallas_kernels import lowered_once as module
from pallas_kernels.lowered_once import lowered_once

LOWERED = []


def scaled(x, *, factor):
    LOWERED.append(x.shape)
    return x * factor


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache on disk; `_lowered` is as in a new process."""
    monkeypatch.setattr(module, "_folder", lambda: tmp_path / "kernels")
    LOWERED.clear()
    forget()
    yield tmp_path / "kernels"
    forget()


def forget():
    """As when the process ends."""
    module._lowered.cache_clear()
    jax.clear_caches()


def lower(tokens=4, factor=3.0):
    def program(x):
        return lowered_once(scaled, x, factor=factor) + 1.0

    return lower_for_h200(program, jax.ShapeDtypeStruct((tokens,), jnp.float32))


def test_programs_of_a_process_share_it_without_a_cache_on_disk(folder, monkeypatch):
    monkeypatch.setattr(module, "_folder", lambda: None)
    lower()
    jax.clear_caches()
    lower()
    assert LOWERED == [(4,)]
    assert not folder.exists()


def test_another_process_finds_it(folder):
    first = lower()
    forget()
    assert lower() == first
    assert LOWERED == [(4,)]
    assert [path.name.split("-")[0] for path in folder.iterdir()] == ["scaled"]


@pytest.mark.parametrize("other", [{"tokens": 8}, {"factor": 2.0}])
def test_other_shapes_and_options_are_other_kernels(folder, other):
    lower()
    lower(**other)
    assert len(LOWERED) == len(list(folder.iterdir())) == 2


def test_other_source_and_versions_are_other_kernels(folder, monkeypatch):
    lower()
    forget()
    monkeypatch.setattr(module, "_source", lambda: "changed")
    lower()
    forget()
    monkeypatch.setattr(jax, "__version__", "0.0")
    lower()
    assert len(LOWERED) == len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) // 2] + bytes(16) + data[len(data) // 2 + 16 :],
    ],
)
def test_a_damaged_file_is_replaced(folder, damage, caplog):
    first = lower()
    (path,) = folder.iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    forget()
    with caplog.at_level(logging.WARNING):
        assert lower() == first
    assert "damaged" in caplog.text
    assert path.read_bytes() == good
    assert path.stat().st_mode & 0o044  # others may share the cache


def test_a_cache_that_cannot_be_written_is_done_without(folder, caplog):
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("where a folder should be")
    with caplog.at_level(logging.WARNING):
        first = lower()
        forget()
        assert lower() == first
    assert "is not kept" in caplog.text
    assert LOWERED == [(4,), (4,)]


@pytest.mark.parametrize(
    ("cache", "folder"),
    [(None, None), ("", None), ("gs://bucket/cache", None), ("cache", Path("cache/lowered_kernels"))],
)
def test_is_kept_beside_what_jax_keeps(monkeypatch, cache, folder):
    monkeypatch.setattr(jax, "config", SimpleNamespace(jax_compilation_cache_dir=cache))
    assert module._folder() == folder
