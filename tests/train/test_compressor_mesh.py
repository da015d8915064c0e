"""Training over a mesh gives what one device gives; in a process of its own, with eight CPU devices or two GPUs."""

import os
import subprocess
import sys

import jax
import pytest

from sparsejax.errors import InvalidArgumentError
from train.compressor.placement import parse_mesh

SCRIPT = """
import jax, numpy as np
from compressor_cases import COMPRESSOR, MODEL, model_params, tokens
from sparsejax.compressor import CompressorConfig, init_params
from train.compressor.forward import TwoPass
from train.compressor.frozen import stack_compressor, stack_layers
from train.compressor.options import TrainOptions
from train.compressor.placement import Placement
from train.compressor.step import init_state, make_train_step

devices = jax.device_count()
meshes = (f"data={devices}", f"data={devices // 2},model=2")
config = CompressorConfig(num_layers=2, kv_dim=32, **COMPRESSOR)
options = TrainOptions(max_steps=4, dtype="float32", learning_rate=1e-2, document_masks=True)
rows = tokens(2 * devices).reshape(2, devices, -1)
documents = np.broadcast_to(np.arange(rows.shape[-1]) // 10, rows.shape).astype(np.int32)
found = {}
for name in ("one", *meshes):
    placement = Placement(jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * 2)) if name == "one" else Placement.make(name)
    frozen = stack_layers(MODEL, model_params(), placement)
    if "model" in name:
        cut = [leaf for leaf in jax.tree.leaves(frozen) if not leaf.sharding.is_fully_replicated]
        assert sum(leaf.size for leaf in cut) > 0.9 * sum(leaf.size for leaf in jax.tree.leaves(frozen))
    params = stack_compressor(init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: placement.put(leaf, placement.whole), params)
    passes = TwoPass(MODEL, config, placement, np.float32, recompute="full")
    state = jax.tree.map(lambda leaf: placement.put(leaf, placement.whole), init_state(params, options, 4))
    step = make_train_step(passes, options, 4)
    for _ in range(2):
        batch = (placement.put_batch(rows), placement.put_batch(documents))
        state, metrics = step(state, frozen, *batch)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    found[name] = jax.device_get((state.params, metrics))
for name in meshes:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), found[name], found["one"])
print(devices, "equal")
"""


def run_script(devices: int, **environment: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.stdout.strip() == f"{devices} equal", result.stderr[-3000:]


def test_eight_devices_train_as_one_does():
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    run_script(8, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")


@pytest.mark.gpu
def test_two_gpus_train_as_one_does():
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"
    run_script(
        2,
        CUDA_VISIBLE_DEVICES=",".join(visible.split(",")[:2]),
        JAX_DEFAULT_MATMUL_PRECISION="highest",
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )


@pytest.mark.parametrize("text", ["data", "rows=2", "data=0", "data=2,", "data=x"])
def test_a_mesh_that_cannot_be_read_is_named(text):
    with pytest.raises(InvalidArgumentError, match="mesh must look like data=4"):
        parse_mesh(text, devices=2)


def test_a_mesh_takes_all_devices_as_data():
    assert parse_mesh(None, devices=8) == {"data": 8, "model": 1}
    assert parse_mesh("model=2,data=4", devices=8) == {"data": 4, "model": 2}
