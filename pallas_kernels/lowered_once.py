"""Kernels whose lowering takes long, lowered once for all programs that hold them.

JAX lowers a kernel anew for every program. For a large Mosaic GPU kernel that is most of the time that tracing and
lowering a step takes, and steps that differ in everything else hold the same kernel. `jax.export` keeps what a function
was lowered to, and calling that copies it into the program. It is then the same to the byte in all of them, where else
it tells from where it was called; so the compiler behind it, which looks for kernels that it has compiled, finds it.

Where JAX has a persistent compilation cache, what was lowered is kept there too, in a folder of its own: to lower the
six of prefill attention took a third of the time in which an 8B engine starts from that cache. A kernel is 0.2 MB; as
in JAX's cache nothing is ever removed, and every change of this package's source makes new ones.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Hashable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax import export

logger = logging.getLogger(__name__)

MOST_KERNELS = 64
FOLDER = "lowered_kernels"  # in JAX's compilation cache
_DIGEST_BYTES = hashlib.sha256().digest_size


def lowered_once(function: Callable, *arrays: jax.Array, **static: Hashable) -> Any:
    """What `function(*arrays, **static)` is in a program for CUDA; neither to be differentiated nor mapped over.

    To be called inside a jitted function, which has its layers share one copy.

    Args:
      function: of this package, by its name: what is kept on disk is found by that, the package's source and versions.
      static: whose representation says all about them, as those of numbers and named tuples do.
    """
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays)
    kernel = _lowered(function, shapes, tuple(sorted(static.items())), jax.sharding.get_abstract_mesh())
    return kernel.call(*arrays)


@functools.lru_cache(maxsize=MOST_KERNELS)
def _lowered(function: Callable, shapes: tuple, static: tuple, device: Any) -> export.Exported:
    """device: the mesh that may say for which GPU is lowered; it is in force already."""
    path = _path(function, shapes, static, device)
    kept = None if path is None else _read(path)
    if kept is not None:
        return kept
    exported = export.export(jax.jit(functools.partial(function, **dict(static))), platforms=("cuda",))(*shapes)
    if path is not None:
        try:
            _write(path, exported.serialize())
        except OSError as error:  # the cache is full, or not ours to write to: the kernel is here all the same
            logger.warning("%s is not kept in the compilation cache (%r)", path.name, error)
    return exported


def _path(function: Callable, shapes: tuple, static: tuple, device: Any) -> Path | None:
    """The file in which the kernel is kept, named by all that it depends on; None without a persistent cache."""
    folder = _folder()
    if folder is None:
        return None
    abstract = getattr(device, "abstract_device", None)
    kind = jax.devices()[0].device_kind if abstract is None else abstract.device_kind
    named = (function.__module__, function.__qualname__, shapes, static, kind, jax.__version__, version("jaxlib"))
    name = hashlib.sha256(f"{_source()} {named}".encode()).hexdigest()
    return folder / f"{function.__qualname__}-{name}"


def _folder() -> Path | None:
    """Where lowered kernels are kept, if anywhere: JAX's cache may also be a bucket, which it alone can write to."""
    cache = getattr(jax.config, "jax_compilation_cache_dir", None)
    return Path(cache) / FOLDER if cache and "://" not in cache else None


@functools.cache
def _source() -> str:
    """A digest of this package's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read(path: Path) -> export.Exported | None:
    """The kernel in the file, or None if there is none that can be read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s is lowered again: its file in the compilation cache cannot be read (%r)", path.name, error)
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(data).digest() != digest:
        logger.warning("%s is lowered again: its file in the compilation cache is damaged", path.name)
        return None
    return export.deserialize(bytearray(data))


def _write(path: Path, data: bytes | bytearray) -> None:
    """Writes the file, with a digest in front, at once: others may start with the same cache meanwhile.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(hashlib.sha256(data).digest() + data)
        os.chmod(unfinished, 0o644)  # of a temporary file only its owner may read it
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
