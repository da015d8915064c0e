"""Choosing an implementation: no silent fallback."""

import jax
import pytest

from pallas_kernels import resolve
from pallas_kernels.dispatch import targets_gpu

on_cpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="tests what happens without a GPU")


@on_cpu
def test_defaults_to_xla_without_a_gpu():
    assert resolve(None, None) == ("xla", False)


@on_cpu
def test_the_kernel_is_not_silently_replaced():
    with pytest.raises(RuntimeError, match="needs a GPU"):
        resolve("triton", None)
    with pytest.raises(RuntimeError, match="interpret=True"):
        resolve("triton", False)


def test_interpreting_means_the_kernel():
    assert resolve(None, True) == ("triton", True)
    assert resolve("triton", True) == ("triton", True)
    assert resolve("xla", True) == ("xla", False)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="mosaic"):
        resolve("mosaic", None)  # pyright: ignore[reportArgumentType]


def test_an_abstract_gpu_counts_as_one():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert targets_gpu()
        assert resolve(None, None) == ("triton", False)


@pytest.mark.gpu
def test_defaults_to_the_kernel_on_a_gpu():
    assert resolve(None, None) == ("triton", False)
