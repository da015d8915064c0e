"""Lowering programs for an H200 on a machine without one, which runs Pallas' rules for Triton for real."""

import re

import jax
from jax._src.pallas.triton import lowering as triton_lowering
from jaxlib.mlir import ir


def lower_for_h200(function, *arguments, **jit_options) -> str:
    """The lowered text of `jit(function, **jit_options)` for CUDA; `arguments` may be ShapeDtypeStructs of any size.

    The IR of every Triton kernel in it is verified: Pallas emits, for one, loops whose bounds differ in type, which
    only the compiler on the GPU machine would notice.
    """
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function, **jit_options).trace(*arguments).lower(lowering_platforms=("cuda",))
    for kernel in _triton_kernels(lowered.compiler_ir("stablehlo").operation):
        with triton_lowering._new_ir_context():
            ir.Module.parse(kernel["ir"].value_bytes)  # verifies
    return lowered.as_text()


def _triton_kernels(operation) -> list:
    """The attributes of every Triton kernel below an operation."""
    found = []
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                attributes = inner.operation.attributes
                target = str(attributes["call_target_name"]) if "call_target_name" in attributes else ""
                if "gpu.triton" in target:
                    name = "mhlo.backend_config" if "mhlo.backend_config" in attributes else "backend_config"
                    found.append(attributes[name])
                found += _triton_kernels(inner.operation)
    return found


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
