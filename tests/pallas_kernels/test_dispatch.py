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
    with pytest.raises(ValueError, match="cudnn"):
        resolve("cudnn", None)  # pyright: ignore[reportArgumentType]


def abstract_gpu(kind):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def test_an_abstract_gpu_counts_as_one():
    with abstract_gpu("NVIDIA H200"):
        assert targets_gpu()
        assert resolve(None, None) == ("triton", False)


@pytest.mark.parametrize("kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
def test_hopper_gets_the_mosaic_kernel_of_what_has_one(kind):
    with abstract_gpu(kind):
        assert resolve(None, None, mosaic_refusal=None) == ("mosaic", False)
        assert resolve(None, True, mosaic_refusal=None) == ("triton", True)
        assert resolve(None, None, mosaic_refusal="too small") == ("triton", False)
        with pytest.raises(ValueError, match="too small"):
            resolve("mosaic", None, mosaic_refusal="too small")
        with pytest.raises(ValueError, match="this operation has none"):
            resolve("mosaic", None)


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-40GB", "NVIDIA B200"])
def test_other_gpus_get_triton(kind):
    with abstract_gpu(kind):
        assert resolve(None, None, mosaic_refusal=None) == ("triton", False)
        with pytest.raises(RuntimeError, match="needs a Hopper GPU"):
            resolve("mosaic", None, mosaic_refusal=None)


@on_cpu
def test_the_mosaic_kernel_needs_a_gpu_and_is_not_interpreted():
    with pytest.raises(RuntimeError, match="needs a GPU"):
        resolve("mosaic", None, mosaic_refusal=None)
    with pytest.raises(ValueError, match="not interpreted"):
        resolve("mosaic", True, mosaic_refusal=None)


@pytest.mark.gpu
def test_defaults_to_the_kernel_on_a_gpu():
    assert resolve(None, None) == ("triton", False)
