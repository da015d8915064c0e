"""Imports point down only, as docs/architecture.md says: a package never needs one that is built on it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up. Packages of one floor do not import each other.
FLOORS = [
    ["pallas_kernels"],
    ["sparsejax.cache"],
    ["sparsejax.models", "sparsejax.methods"],
    ["sparsejax.compressor"],
    ["sparsejax.checkpoint"],
    ["sparsejax.engine.requests"],
    ["sparsejax.engine.scheduling"],
    ["sparsejax.engine.programs"],
    ["sparsejax.engine.execution"],
    ["sparsejax.engine"],
    ["sparsejax.evaluation", "sparsejax.bench", "serve"],
    ["train"],
    ["sparsejax.cli"],
]
FLOOR_OF = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}


def package_of(module: str) -> str | None:
    """The innermost of the packages above that holds a module."""
    parts = module.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in FLOOR_OF), None)


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("package", FLOOR_OF)
def test_imports_point_down(package):
    folder = ROOT / package.replace(".", "/")
    checked = 0
    for path in folder.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if package_of(module) != package:
            continue
        checked += 1
        for name in imports(path):
            other = package_of(name)
            if other not in (None, package):
                assert FLOOR_OF[other] < FLOOR_OF[package], f"{module} imports {name}"
    assert checked
