"""Which implementation of an operation runs: a Pallas kernel (Triton, or Mosaic GPU on Hopper) or the XLA program.

Public operations take `implementation` and, but for linear layers, `interpret`, and pass them through `resolve`. There
is no silent fallback: asking for a kernel where it cannot run is an error.
"""

import re
from typing import Any, Literal

import jax

Implementation = Literal["triton", "mosaic", "xla"]
_IMPLEMENTATIONS = ("triton", "mosaic", "xla")

NO_MOSAIC_KERNEL = "this operation has none"


def targets_gpu() -> bool:
    """Whether the program being traced is meant for a GPU.

    That is the default backend, unless an abstract device is set (`jax.sharding.use_abstract_mesh`), which is how a
    machine without a GPU lowers for one.
    """
    platform = getattr(_abstract_device(), "platform", None) or jax.default_backend()
    return platform in ("gpu", "cuda", "rocm")


def _abstract_device() -> Any:
    """The abstract device that is set, if there is one."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def targets_hopper() -> bool:
    """Whether the program being traced is meant for a Hopper GPU."""
    if not targets_gpu():
        return False
    abstract = _abstract_device()
    if abstract is not None:
        return re.match(r"NVIDIA (G?H[12]00|H20|H800)\b", abstract.device_kind) is not None
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def multiprocessors() -> int:
    """Of the GPU that the program being traced is meant for."""
    abstract = _abstract_device()
    return jax.devices()[0].core_count if abstract is None else abstract.num_cores


def hopper_refusal() -> str | None:
    """Why the program being traced cannot hold Mosaic kernels for Hopper; None if it can."""
    if not targets_gpu():
        return f"it needs a GPU, but the backend is {jax.default_backend()!r}"
    abstract = _abstract_device()
    device = jax.devices()[0] if abstract is None else abstract
    if not targets_hopper():
        return f"it needs a Hopper GPU, not {device.device_kind!r}"
    if abstract is not None:
        return None
    # The assembler of these versions miscompiles causal masks (jax refuses them in its own attention, too).
    cuda = re.search(r"cuda (\d+)", device.client.platform_version)
    if cuda and 12080 <= int(cuda[1]) <= 12090:
        return f"CUDA {int(cuda[1]) // 1000}.{int(cuda[1]) % 1000 // 10} miscompiles its masks"
    return None


def resolve(
    implementation: Implementation | None, interpret: bool | None, *, mosaic_refusal: str | None = NO_MOSAIC_KERNEL
) -> tuple[Implementation, bool]:
    """Settles the two choices of an operation.

    Args:
      implementation: "triton", "mosaic", "xla", or None: on a GPU the Mosaic kernel where there is one that can serve
        the call, else the Triton kernel (also when it is to be interpreted), and XLA elsewhere.
      interpret: run the Triton kernel in Pallas' interpreter, which works on any backend and is slow. None means no.
      mosaic_refusal: why the operation's Mosaic kernel cannot serve this call; None if it can, given a Hopper GPU.

    Returns:
      (implementation, interpret), both definite. `interpret` is True for "triton" only.

    Raises:
      ValueError: `implementation` is unknown, or is "mosaic" and the operation or the call is none for it.
      RuntimeError: a kernel is asked for on a backend that cannot run it.
    """
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {_IMPLEMENTATIONS} or None, got {implementation!r}")
    if implementation is None:
        implementation = "triton" if targets_gpu() or interpret else "xla"
        if implementation == "triton" and not interpret and mosaic_refusal is None and hopper_refusal() is None:
            implementation = "mosaic"
    if implementation == "xla":
        return "xla", False
    if implementation == "mosaic":
        if mosaic_refusal is not None or interpret:
            reason = mosaic_refusal or "it is not interpreted"
            raise ValueError(f"implementation='mosaic' cannot serve this call: {reason}; choose another one, or None")
        if (reason := hopper_refusal()) is not None:
            raise RuntimeError(f"implementation='mosaic' cannot run: {reason}; choose another one, or None")
        return "mosaic", False
    if not targets_gpu() and not interpret:
        raise RuntimeError(
            f"implementation='triton' needs a GPU, but the backend is {jax.default_backend()!r}; "
            "pass interpret=True to interpret the kernel, or implementation='xla'"
        )
    return "triton", bool(interpret)
