"""`sparsejax bench`: how fast this card is, and how near the engine comes to it."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from sparsejax.cli.evaluate import numbers


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("bench", help="measure speed as a fraction of what the card can do")
    suites = parser.add_subparsers(dest="suite", metavar="SUITE", required=True)

    latency = suites.add_parser(
        "latency",
        help="prefill and decode times of fixed batches, random weights",
        description="Measures the card's ceilings, then for every batch and context: prefill tokens/s, milliseconds a "
        "decode step, host time a step, and the fraction of the physical limit (weights + KV bytes over bandwidth).",
        epilog="example: sparsejax bench latency --config llama-3.1-8b --shapes 1x1024,32x2048,8x32768",
    )
    _add_config(latency)
    latency.add_argument(
        "--shapes", default="1x1024,8x1024,32x2048", metavar="BxC,...", help="batches x context (default: %(default)s)"
    )
    latency.add_argument("--steps", type=int, default=50, metavar="N", help="timed decode steps (default: %(default)s)")
    latency.add_argument("--chunk", type=int, metavar="N", help="max_num_batched_tokens (default: the engine's)")
    latency.add_argument("--granularity", metavar="G", help="slot tables: shared, per_layer or per_head")
    latency.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    latency.set_defaults(run=run_latency)

    checkpoint = suites.add_parser(
        "checkpoint",
        help="convert, load and generate from a random checkpoint of full size",
        description="Writes a random Hugging Face checkpoint, converts it, loads both layouts, compares answers.",
        epilog="example: sparsejax bench checkpoint --config llama-3.1-8b",
    )
    _add_config(checkpoint)
    checkpoint.add_argument("--folder", type=Path, metavar="DIR", help="where to work (default: a temporary folder)")
    checkpoint.set_defaults(run=run_checkpoint)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", default="llama-3.1-8b", metavar="NAME", help="a known model or a config.json (default: %(default)s)"
    )


def shapes(text: str) -> list[tuple[int, int]]:
    """ "1x1024,8x32768" -> [(1, 1024), (8, 32768)]."""
    pairs = [numbers("--shapes", part.replace("x", ",")) for part in text.split(",")]
    for pair in pairs:
        if len(pair) != 2:
            from sparsejax.errors import InvalidArgumentError

            raise InvalidArgumentError(f"--shapes must look like 1x1024,8x32768 (batch x context), got {text!r}.")
    return [(pair[0], pair[1]) for pair in pairs]


def run_latency(args: argparse.Namespace) -> int:
    from sparsejax.engine.memory import reserve_device_memory

    reserve_device_memory(0.9)
    import jax
    import jax.numpy as jnp

    from sparsejax import LLM
    from sparsejax.bench import ceilings, latency, presets
    from sparsejax.models import init_params

    wanted = shapes(args.shapes)
    config = presets.model_config(args.config)
    ceiling = ceilings.measure()
    print(ceiling)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    params = init_params(config, jax.random.key(0), dtype)
    rows = []
    for batch, context in wanted:
        # One engine a shape, with tables and batch as large as needed: as somebody serving that shape would set them.
        llm = LLM.from_params(
            config,
            params,
            max_num_seqs=batch,
            max_model_len=min(2 * context + 512, config.max_position_embeddings),
            max_num_batched_tokens=args.chunk,
            table_granularity=args.granularity,
        )
        rows.append(latency.measure(llm, ceiling, batch=batch, context=context, steps=args.steps))
        print(latency.format_table(rows[-1:]), flush=True)
        del llm
    print(f"\n{args.config}, jax {jax.__version__}\n{latency.format_table(rows)}")
    if args.json is not None:
        args.json.write_text(json.dumps(latency.as_dicts(rows), indent=2) + "\n", encoding="utf-8")
    return 0


def run_checkpoint(args: argparse.Namespace) -> int:
    from sparsejax.bench import checkpoint, presets

    raw = presets.config_dict(args.config)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        report = checkpoint.run(raw, Path(folder))
    print(json.dumps(report, indent=2))
    return 0 if report["layouts_agree"] else 1
