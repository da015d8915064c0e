"""Lowering programs for an H200 on a machine without one, which runs Pallas' rules for Triton for real."""

import re

import jax


def lower_for_h200(function, *arguments, **jit_options) -> str:
    """The lowered text of `jit(function, **jit_options)` for CUDA; `arguments` may be ShapeDtypeStructs of any size."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function, **jit_options).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def triton_calls(text: str) -> int:
    """How many Triton kernels a lowered program launches."""
    return len(re.findall(r"custom_call @__gpu\$xla\.gpu\.triton", text))


def mosaic_calls(text: str) -> int:
    """How many Mosaic GPU kernels a lowered program launches."""
    return len(re.findall(r"custom_call @mosaic_gpu", text))


def kernel_aliases(text: str) -> int:
    """How many outputs of kernels share a buffer with an input."""
    return text.count("output_operand_alias<")


def donated_arguments(text: str) -> int:
    """How many arguments of the program share a buffer with a result."""
    return text.count("tf.aliasing_output")
