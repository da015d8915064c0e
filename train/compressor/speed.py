"""Speed of training steps, as a fraction of what the card's matrix units do; on random weights and tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.bench import ceilings
from sparsejax.bench.timing import Timing, summary
from sparsejax.compressor import CompressorConfig, init_params
from sparsejax.models import ModelConfig
from train.compressor.flops import StepFlops, step_flops
from train.compressor.forward import TwoPass
from train.compressor.frozen import random_frozen, stack_compressor
from train.compressor.options import TrainOptions
from train.compressor.placement import Placement
from train.compressor.step import init_state, make_train_step


@dataclass(frozen=True)
class Speed:
    """What was measured.

    Attributes:
      device: its name; devices: how many.
      length, batch: tokens of a sequence, sequences of a step over all devices.
      flops: of one sequence.
      matmul: FLOP per second of a large bf16 product on one device, measured before.
      seconds: of a step.
      compile_seconds: until the first step could start.
      scratch_bytes: of the compiled step on one device; arguments_bytes: weights, state and batch.
      peak_bytes: largest use of the device that its allocator saw; None where it does not say.
    """

    device: str
    devices: int
    length: int
    batch: int
    flops: StepFlops
    matmul: float
    seconds: Timing
    compile_seconds: float
    scratch_bytes: int
    arguments_bytes: int
    peak_bytes: int | None

    @property
    def fraction(self) -> float:
        """Model FLOP per second over the measured matmul rate of all devices."""
        return self.flops.total * self.batch / self.seconds.median / (self.matmul * self.devices)

    def __str__(self) -> str:
        rate = self.flops.total * self.batch / self.seconds.median
        tokens = self.batch * self.length / self.seconds.median
        peak = "not told" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.1f} GiB"
        parts = ", ".join(
            f"{name} {getattr(self.flops, name) / 1e12:.4g}"
            for name in ("teacher", "student", "backward", "compressor", "search")
        )
        return (
            f"{self.devices} x {self.device}, {self.batch} x {self.length} tokens a step\n"
            f"step            {self.seconds.median:.4f} s (middle half {self.seconds.low:.4f} to "
            f"{self.seconds.high:.4f}), {tokens:,.0f} tokens/s; compiled in {self.compile_seconds:.0f} s\n"
            f"model FLOP      {self.flops.total / 1e12:.4g} T a sequence ({parts})\n"
            f"rate            {rate / 1e12:.4g} TFLOP/s of {self.matmul * self.devices / 1e12:.4g} measured: "
            f"{self.fraction:.1%}\n"
            f"memory          peak {peak}; arguments {self.arguments_bytes / 2**30:.2f} GiB, scratch of the step "
            f"{self.scratch_bytes / 2**30:.2f} GiB"
        )


def measure(
    model: ModelConfig,
    compressor: CompressorConfig,
    options: TrainOptions,
    *,
    length: int,
    steps: int,
    mesh: str | None = None,
) -> Speed:
    """Times `steps` training steps (after two that are not timed) of random weights on random tokens.

    The card's matmul rate is measured first, with the memory still free.
    """
    matmul = ceilings.measure(num_bytes=64 << 20).matmul
    placement = Placement.make(mesh)
    dtype = jnp.dtype(options.dtype)
    frozen = random_frozen(model, placement, dtype)

    def whole(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: placement.put(leaf, placement.whole), tree)

    state = whole(init_state(whole(stack_compressor(init_params(compressor, jax.random.key(0)))), options, steps + 2))
    batch = options.batch_size * jax.device_count()
    shape = (options.accumulation, batch, length)
    tokens = jax.device_put(
        jax.random.randint(jax.random.key(1), shape, 0, model.vocab_size, jnp.int32), placement.micro_batches
    )
    documents = None
    if options.document_masks:
        # Four documents a row.
        numbers = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) * 4 // length, shape)
        documents = jax.device_put(numbers, placement.micro_batches)
    passes = TwoPass(model, compressor, placement, dtype, options.train_on, options.recompute)
    start = time.perf_counter()
    step = make_train_step(passes, options, steps + 2).lower(state, frozen, tokens, documents).compile()
    compile_seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    seconds = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, metrics = step(state, frozen, tokens, documents)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    return Speed(
        device=device.device_kind,
        devices=jax.device_count(),
        length=length,
        batch=batch * options.accumulation,
        flops=step_flops(model, compressor, length),
        matmul=matmul,
        seconds=summary(seconds[2:]),
        compile_seconds=compile_seconds,
        scratch_bytes=memory.temp_size_in_bytes,
        arguments_bytes=memory.argument_size_in_bytes,
        peak_bytes=stats.get("peak_bytes_in_use"),
    )
