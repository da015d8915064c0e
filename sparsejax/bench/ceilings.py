"""What the card itself can do, measured in the same run as everything that is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from sparsejax.bench.timing import time_calls


@dataclass(frozen=True)
class Ceilings:
    """Rates of this device.

    Attributes:
      device: its name.
      copy: bytes per second read plus written by a device copy.
      read: bytes per second of a read-only reduction.
      matmul: FLOP per second of a large bf16 matrix product on random data.
    """

    device: str
    copy: float
    read: float
    matmul: float

    def __str__(self) -> str:
        return (
            f"{self.device}: copy {self.copy / 1e12:.2f} TB/s, read {self.read / 1e12:.2f} TB/s, "
            f"bf16 matmul {self.matmul / 1e12:.0f} TFLOP/s"
        )


def measure(*, num_bytes: int | None = None, matmul_size: int | None = None) -> Ceilings:
    """Measures the default device.

    Args:
      num_bytes: size of the copied and of the reduced array; default 4 GiB on a GPU, 64 MiB on a CPU.
      matmul_size: n of the n x n product; default 8192 on a GPU, 512 on a CPU.
    """
    on_gpu = jax.default_backend() == "gpu"
    num_bytes = num_bytes or ((4 << 30) if on_gpu else (64 << 20))
    n = matmul_size or (8192 if on_gpu else 512)
    calls = 64 if on_gpu else 4  # enough to hide the wait for the last one
    copy, read = _measure_memory(num_bytes, calls)
    return Ceilings(jax.devices()[0].device_kind, copy, read, _measure_matmul(n, calls))


def _measure_memory(num_bytes: int, calls: int) -> tuple[float, float]:
    """(copy, read) in bytes per second. The number of the call changes the result, so that nothing can be kept."""
    data = jax.jit(lambda key: jax.random.bits(key, (num_bytes // 4,), jnp.uint32))(jax.random.key(0))
    salts = [jnp.uint32(i) for i in range(8)]  # made beforehand: each is a transfer to the device
    copy = jax.jit(lambda x, i: x ^ i)
    read = jax.jit(lambda x, i: jnp.max(x ^ i))
    copied = time_calls(lambda i: copy(data, salts[i % 8]), calls=calls)
    reduced = time_calls(lambda i: read(data, salts[i % 8]), calls=calls)
    return 2 * num_bytes / copied.median, num_bytes / reduced.median


def _measure_matmul(n: int, calls: int) -> float:
    """FLOP per second of an n x n bf16 product of random matrices."""
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in (1, 2))
    product = jax.jit(lambda a, b: a @ b)
    return 2 * n**3 / time_calls(lambda i: product(a, b), calls=calls).median
