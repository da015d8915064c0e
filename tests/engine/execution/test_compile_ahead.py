"""Programs that are compiled ahead are the ones that calls run: nothing is traced or compiled twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_engine import CONFIG, ENGINE

from sparsejax import LLM, SamplingParams
from sparsejax.bench.compilations import Compilations, watch_compilations
from sparsejax.engine.execution.compile_ahead import compile_ahead, compiler_threads
from sparsejax.models import init_params


def test_calls_find_their_programs_ready():
    traced, bar = [], []

    def scale(pool, rows, factor):
        traced.append(factor)
        return pool.at[rows].multiply(factor), rows * factor

    jitted = jax.jit(
        scale,
        static_argnums=2,
        donate_argnums=0,
        compiler_options={"xla_disable_hlo_passes": "rematerialization"},
    )
    pool = jnp.ones((8, 4))
    calls = [(np.zeros(size, np.int32), factor) for size in (1, 2, 3) for factor in (2, 3)]

    def progress(programs):
        for program in programs:
            yield program
            bar.append(program)

    with watch_compilations() as compiled:
        programs = compile_ahead([(jitted, (pool, *call)) for call in calls], progress=progress)
    assert len(programs) == len(compiled.programs) == len(bar) == len(traced) == len(calls)
    assert [each.in_avals[0][1].shape for each in programs] == [rows.shape for rows, _ in calls]
    with watch_compilations() as compiled:
        for rows, factor in calls:
            pool, _ = jitted(pool, rows, factor)
            pool, _ = jitted(pool, jax.device_put(rows), factor)
        compile_ahead([(jitted, (pool, *call)) for call in calls])
    assert (compiled.programs, len(traced)) == ([], len(calls))
    assert float(pool[0, 0]) == 6.0**12  # rows name the same row so many times


def test_what_does_not_compile_is_an_error():
    wrong = jax.jit(lambda x: x + 1, compiler_options={"xla_no_such_option": "1"})
    right = jax.jit(lambda x: x + 2)
    with pytest.raises(Exception, match="xla_no_such_option"):
        compile_ahead([(wrong, (jnp.ones(3),)), (right, (jnp.ones(3),))])


def test_the_wall_counts_what_overlaps_once():
    assert Compilations(spans=[(0.0, 2.0), (5.0, 6.0), (1.0, 3.0), (1.5, 1.6)]).wall_seconds == pytest.approx(4.0)
    assert Compilations().wall_seconds == 0
    assert 1 <= compiler_threads() <= 8


@pytest.mark.parametrize("committed", [True, False])
def test_no_step_is_compiled_while_serving(committed):
    """Not for parameters that are bound to a device either, which bind the caches that come back from a step."""
    config = dataclasses.replace(CONFIG, rms_norm_eps=2e-5 if committed else 3e-5)  # of no other test's engine
    params = init_params(config, jax.random.key(0), jnp.float32)
    if committed:
        params = jax.device_put(params, jax.devices()[0])
    engine = ENGINE | {"max_num_seqs": 2, "max_num_batched_tokens": 8 if committed else 4, "max_model_len": 64}
    with watch_compilations() as compiled:
        llm = LLM.from_params(config, params, warmup="greedy", **engine)
    traced = llm.engine.runner.compilations
    for step in ("prefill", "decode", "mixed"):
        # For the very cache that it is called with: made from shapes, and afterwards handed on from step to step.
        assert 0 < sum(f"jit({step})" == name for name, _ in compiled.programs) <= traced[step]
    assert all(leaf.committed for leaf in jax.tree.leaves((llm.engine.runner.cache, llm.engine.runner.state)))
    with watch_compilations() as compiled:
        llm.generate([[5] * 11, [6] * 3, [7] * 30], SamplingParams(temperature=0.0, max_tokens=5), use_tqdm=False)
        llm.engine.runner.reset()
        llm.engine.runner.decode([])
    assert not [name for name, _ in compiled.programs if any(step in name for step in ("prefill", "decode", "mixed"))]
