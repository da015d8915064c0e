"""`sparsejax doctor`: what is installed, which devices there are, whether every kernel runs, and what to do if not."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sparsejax.cli import options

PACKAGES = (
    "sparsejax",
    "jax",
    "jaxlib",
    "flax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
)
CUDA_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
TOLERANCE = 2e-2  # the kernels run in bfloat16 on a GPU


@dataclass(frozen=True)
class Check:
    """One line of the report. ok: None for plain information. advice: what to do when not ok."""

    name: str
    found: str
    ok: bool | None = None
    advice: str = ""


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="report versions, devices and whether the kernels run, with advice",
        description="Checks this installation. Exit code 1 if something that should work does not.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    del args
    failed = []
    for check in (*_packages(), *_devices(), *_kernels()):
        mark = {None: "  ", True: "ok", False: "!!"}[check.ok]
        print(f"{mark} {check.name:<28} {check.found}")
        if check.ok is False:
            failed.append(check)
    for check in failed:
        print(f"\n{check.name}: {check.advice}")
    print("\nEverything that can run here runs." if not failed else f"\n{len(failed)} problem(s) found.")
    return 1 if failed else 0


def _packages() -> Iterator[Check]:
    yield Check("python", platform.python_version())
    for package in (*PACKAGES, *CUDA_PLUGINS):
        try:
            yield Check(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            if package not in CUDA_PLUGINS:
                yield Check(package, "not installed", False, "Install sparsejax again: pip install -e .")


def _devices() -> Iterator[Check]:
    import jax

    gpu = _nvidia_driver()
    for device in jax.devices():
        stats = device.memory_stats() or {}
        memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB for JAX" if "bytes_limit" in stats else ""
        yield Check(f"device {device.id}", f"{options.device_name(device)}{memory}")
    backend = jax.default_backend()
    if gpu and backend != "gpu":
        extra = "cuda13" if int(gpu.split(".")[0]) >= 580 else "cuda12"
        yield Check(
            "NVIDIA driver",
            f"{gpu}, but JAX runs on the {backend}",
            False,
            f"A GPU is there and JAX cannot use it: pip install -e '.[{extra}]'",
        )
    elif gpu:
        yield Check("NVIDIA driver", gpu, True)
    kernels = "Pallas kernels" if backend == "gpu" else "plain XLA (kernels: interpreted in tests only)"
    yield Check("attention and cache run as", kernels)


def _nvidia_driver() -> str:
    """Driver version of the first NVIDIA GPU, empty if there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else ""


def _kernels() -> Iterator[Check]:
    """Runs every operation on small random data the way the engine would here, against its plain reference."""
    from sparsejax.cli import kernel_checks, kernel_checks_sparse

    for name, error in (kernel_checks.CHECKS | kernel_checks_sparse.CHECKS).items():
        yield _kernel(name, error)


def _kernel(name: str, error_of: Callable[[], float]) -> Check:
    try:
        error = error_of()
    except Exception as problem:  # any failure of a kernel is a finding, whatever its type
        first_line = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        return Check(
            name,
            f"failed: {first_line[:80]}",
            False,
            "The kernel does not run on this device. GPUs from compute capability 8.0 on are supported, with the jax "
            "versions of pyproject.toml; LLM(implementation='xla') runs without the kernels, slower.",
        )
    good = error <= TOLERANCE
    return Check(
        name, f"largest error {error:.1e}", good, "The kernel gives wrong results here: please report this output."
    )
