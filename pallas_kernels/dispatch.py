"""Which implementation of an operation runs: the Pallas-Triton kernel or the XLA program.

Every public operation takes `implementation` and `interpret` and passes them through `resolve`. There is no silent
fallback: asking for the kernel where it cannot run is an error.
"""

from typing import Literal

import jax

Implementation = Literal["triton", "xla"]
_IMPLEMENTATIONS = ("triton", "xla")


def targets_gpu() -> bool:
    """Whether the program being traced is meant for a GPU.

    That is the default backend, unless an abstract device is set (`jax.sharding.use_abstract_mesh`), which is how a
    machine without a GPU lowers for one.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    platform = getattr(device, "platform", None) or jax.default_backend()
    return platform in ("gpu", "cuda", "rocm")


def resolve(implementation: Implementation | None, interpret: bool | None) -> tuple[Implementation, bool]:
    """Settles the two choices of an operation.

    Args:
      implementation: "triton", "xla", or None for the kernel on a GPU (and when it is to be interpreted) and XLA
        elsewhere.
      interpret: run the kernel in Pallas' interpreter, which works on any backend and is slow. None means no.

    Returns:
      (implementation, interpret), both definite. `interpret` is always False for "xla", which has nothing to interpret.

    Raises:
      ValueError: `implementation` is unknown.
      RuntimeError: the kernel is asked for natively on a backend that has no Triton.
    """
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {_IMPLEMENTATIONS} or None, got {implementation!r}")
    on_gpu = targets_gpu()
    if implementation is None:
        implementation = "triton" if on_gpu or interpret else "xla"
    if implementation == "xla":
        return "xla", False
    if not on_gpu and not interpret:
        raise RuntimeError(
            f"implementation='triton' needs a GPU, but the backend is {jax.default_backend()!r}; "
            "pass interpret=True to interpret the kernel, or implementation='xla'"
        )
    return "triton", bool(interpret)
