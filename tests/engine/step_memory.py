"""What the steps that an engine takes need beside their arguments, as the compiler says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sparsejax import LLM


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of a step that was taken. `options` are what it was compiled with."""

    name: str
    options: Any
    scratch: int
    in_place: int


def memory_of_steps(llm: LLM, serve: Callable[[], Any]) -> list[StepMemory]:
    """Every step that `serve()` makes the engine take, once for each way it is compiled."""
    runner = llm.engine.runner
    steps, taken = runner.steps, {}

    def watched(name: str) -> Callable[..., Any]:
        step = getattr(steps, name)

        def take(*args):
            abstract = jax.tree.map(_shape, args)
            taken[name, str(abstract)] = (step, abstract)
            return step(*args)

        return take

    names = ("prefill", "decode", "mixed", "compress", "evict")
    runner.steps = dataclasses.replace(steps, **{name: watched(name) for name in names})
    try:
        serve()
    finally:
        runner.steps = steps
    return [_memory(name, step, args) for (name, _), (step, args) in taken.items()]


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _memory(name: str, step: Any, args: tuple[Any, ...]) -> StepMemory:
    analysis = step.lower(*args).compile().memory_analysis()
    return StepMemory(name, args[-1], analysis.temp_size_in_bytes, analysis.alias_size_in_bytes)
