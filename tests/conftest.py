"""Keeps the suite's compilations cheap, and what has been compiled within what a process may hold."""

import gc
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import pytest

ON_CPU = shutil.which("nvidia-smi") is None

# Before JAX starts: the suite compiles thousands of tiny programs, and optimising them costs more than it saves. The
# older emitters of fusions compile in half the time.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if metadata.version("jaxlib").startswith("0.10."):  # XLA refuses to start with flags that it does not know
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
if ON_CPU and "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(FLAGS)

# What one process of the suite has compiled, the others load, and so does it itself once it had to forget it. The
# first process names the folder, the workers that it starts find the name in their environment.
CACHE = "JAX_COMPILATION_CACHE_DIR"
OWN_CACHE = tempfile.mkdtemp(prefix="sparsejax-tests-") if ON_CPU and CACHE not in os.environ else None
if OWN_CACHE is not None:
    os.environ |= {CACHE: OWN_CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

MAPS = Path("/proc/self/maps")
# Every program that XLA compiles for a CPU takes some memory mappings, of which Linux allows a process 65,530 by
# default; one too many is a segmentation fault in the compiler.
MOST_MAPPINGS = 30_000


def pytest_unconfigure() -> None:
    if OWN_CACHE is not None:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def bounded_mappings():
    """Forgets what was compiled, between two files, before there is too much of it."""
    yield
    if MAPS.exists() and sum(1 for _ in MAPS.open()) > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()
