"""docs/performance.sh: every command in it is one that the command line takes."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from sparsejax.cli import build_parser

SCRIPT = Path(__file__).parents[2] / "docs" / "performance.sh"
PARTS = dict(line.split(maxsplit=1) for line in SCRIPT.read_text().splitlines() if " bench " in line and line[0] != "#")


def run(*arguments, command):
    return subprocess.run(
        [SCRIPT, *arguments], env=os.environ | {"SPARSEJAX": command}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("part", PARTS)
def test_commands_are_understood(part):
    build_parser().parse_args(shlex.split(PARTS[part]))


def test_parts_that_ended_well_are_not_run_again(tmp_path):
    folder = tmp_path / "figures"
    assert run(folder, "itl", "start-cold", command="echo").returncode == 0
    assert (folder / "itl.txt").read_text().split() == PARTS["itl"].split()
    assert f"--compilation-cache {folder}/cache " in (folder / "start-cold.txt").read_text()
    failing = run(folder, "itl", "itl-128", command="false")
    assert failing.returncode == 1
    assert "itl-128" in failing.stderr
    assert {path.name for path in folder.iterdir()} == {"itl.txt", "start-cold.txt", "itl-128.unfinished"}


def test_unknown_parts_are_refused(tmp_path):
    result = run(tmp_path / "figures", "itl", "attention", command="echo")
    assert result.returncode == 2
    assert "no part is called attention. There are: decode-attention " in result.stderr
    assert run(command="echo").returncode != 0
