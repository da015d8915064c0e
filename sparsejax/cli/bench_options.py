"""Options that several benchmarks share, and what is made of them: model, engine, outputs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from sparsejax.cli.options import IMPLEMENTATION, add_store_options, check_store_options, store_options
from sparsejax.config import GRANULARITIES
from sparsejax.errors import InvalidArgumentError

RANDOM_MODELS = ("llama-3.1-8b", "llama-3.2-1b", "qwen2.5-7b", "qwen3-8b")  # of `bench.presets`
RANDOM_MODEL = RANDOM_MODELS[0]
PAGE_SIZE = 32
COMPRESSOR_SIZES = ("kv_compressed_size", "neighbors", "cluster_ratio")


def add_random_weights(parser: Any) -> None:
    parser.add_argument(
        "--random-weights",
        metavar="CONFIG",
        help=f"{', '.join(RANDOM_MODELS)} or a config.json, with weights drawn at random (default: {RANDOM_MODEL})",
    )


def add_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw them (needs matplotlib)")


def add_model(
    parser: argparse.ArgumentParser,
    *,
    max_model_len: str = "what is needed",
    max_num_seqs: str = "up to 256",
    num_pages: str = "what fits",
    page_size: int = PAGE_SIZE,
) -> None:
    """The model and the engine's options; read them back with `load` and `engine_options`.

    Args:
      max_model_len, max_num_seqs, num_pages, page_size: what the command takes by default, for the help.
    """
    group = parser.add_argument_group("model and engine")
    add_random_weights(group)
    group.add_argument("--model", metavar="NAME", help="a checkpoint instead: folder or Hugging Face id")
    group.add_argument("--max-model-len", type=int, metavar="N", help=f"tokens of a request (default: {max_model_len})")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help=f"most requests at once (default: {max_num_seqs})")
    group.add_argument(
        "--max-num-batched-tokens", "--chunk", type=int, metavar="N", help="most prompt tokens in one step"
    )
    group.add_argument(
        "--max-mixed-tokens", type=int, metavar="N", help="likewise, if requests decode in it (default: no less)"
    )
    group.add_argument("--granularity", choices=GRANULARITIES, help="of slot tables (default: the engine's)")
    group.add_argument(
        "--page-size", type=int, metavar="N", help=f"tokens in a page of the KV cache (default: {page_size})"
    )
    group.add_argument("--num-pages", type=int, metavar="N", help=f"physical pages in the pool (default: {num_pages})")
    group.add_argument("--pool-gib", type=float, metavar="F", help="the same as GiB of K and V: a smaller card's share")
    group.add_argument("--implementation", choices=("triton", "xla"), help=IMPLEMENTATION)
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="F", help="to reserve (default: %(default)s)"
    )


def given(value: Any, default: Any) -> Any:
    """What the user gave, 0 included, or else the default."""
    return default if value is None else value


def engine_options(args: argparse.Namespace, config: Any, params: Any, *, page_size: int = PAGE_SIZE) -> dict[str, Any]:
    """Keyword options of an LLM, those left out that were not given.

    Args:
      config, params: of the model.
      page_size: unless the user gave one.
    """
    num_pages = args.num_pages
    if args.page_size is not None and args.page_size < 1:
        raise InvalidArgumentError(f"--page-size must be at least 1, got {args.page_size}.")
    if args.pool_gib is not None:
        if num_pages is not None:
            raise InvalidArgumentError("--pool-gib has no meaning with --num-pages; give one of them.")
        if not 0 < args.pool_gib < math.inf:
            raise InvalidArgumentError(f"--pool-gib must be a positive number, got {args.pool_gib}.")
        page_bytes = 2 * given(args.page_size, page_size) * config.head_dim * params["embed"].dtype.itemsize
        num_pages = int(args.pool_gib * 2**30) // page_bytes
        if not num_pages:
            raise InvalidArgumentError(f"--pool-gib {args.pool_gib} holds no page of {page_bytes} bytes.")
    chosen = {
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "max_mixed_tokens": args.max_mixed_tokens,
        "table_granularity": args.granularity,
        "page_size": given(args.page_size, page_size),
        "num_pages": num_pages,
        "implementation": args.implementation,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        # Timed prompts are run more than once; a cached prefix would leave nothing to time.
        "enable_prefix_caching": False,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def add_delta_options(parser: argparse.ArgumentParser) -> None:
    """How method deltakv stores tokens; read it back with `delta_engine_options`."""
    group = parser.add_argument_group("method deltakv", "Without --compressor, one with random weights is made.")
    add_store_options(group)
    group.add_argument("--kv-compressed-size", type=int, metavar="N", help="numbers of a latent (default: 512)")
    group.add_argument("--neighbors", type=int, metavar="N", help="references of a latent (default: 4)")
    group.add_argument("--cluster-ratio", type=float, metavar="F", help="share of centers (default: 0.1)")


def check_delta_options(args: argparse.Namespace) -> None:
    """Refuses options of `add_delta_options` that have no meaning: sizes of a compressor that is given, or of none."""
    check_store_options(args, args.method, *COMPRESSOR_SIZES)
    sizes = [name for name in COMPRESSOR_SIZES if getattr(args, name) is not None]
    if args.compressor is not None and sizes:
        raise InvalidArgumentError(
            f"--{sizes[0].replace('_', '-')} has no meaning with --compressor, which has its own."
        )


def delta_engine_options(args: argparse.Namespace, config: Any, params: Any) -> dict[str, Any]:
    """Keyword options of an LLM whose requests are stored compressed; none if --method is another."""
    if args.method != "deltakv":
        return {}
    sizes = {name: getattr(args, name) for name in COMPRESSOR_SIZES if getattr(args, name) is not None}
    compressor = args.compressor or _random_compressor(sizes, config, params)
    return store_options(args) | {"compressor": compressor}


def _random_compressor(sizes: dict[str, Any], config: Any, params: Any) -> tuple[Any, Any]:
    """A linear compressor of these sizes, as training starts from."""
    import jax

    from sparsejax.compressor import CompressorConfig, init_params
    from sparsejax.compressor.config import kv_dim_of

    compressor = CompressorConfig(
        num_layers=config.num_layers, kv_dim=kv_dim_of(config), **dict[str, Any]({"kv_compressed_size": 512} | sizes)
    )
    weights = init_params(compressor, jax.random.key(1))
    return compressor, jax.tree.map(lambda x: x.astype(params["embed"].dtype), weights)


def check_model(args: argparse.Namespace) -> None:
    """Refuses, before anything is measured, a model that `load` would not find."""
    from sparsejax.bench import presets
    from sparsejax.checkpoint import resolve

    if args.model is None:
        presets.model_config(args.random_weights or RANDOM_MODEL)
    elif args.random_weights is not None:
        raise InvalidArgumentError("--random-weights has no meaning with --model; give one of them.")
    else:
        resolve(args.model)


def load(args: argparse.Namespace) -> tuple[str, Any, Any]:
    """(name, model configuration, parameters on the device) of --model or --random-weights."""
    import jax
    import jax.numpy as jnp

    from sparsejax.bench import presets
    from sparsejax.checkpoint import load_model
    from sparsejax.models import init_params

    on_gpu = jax.default_backend() == "gpu"
    if args.model is not None:
        return args.model, *load_model(args.model, dtype=None if on_gpu else "float32")
    name = args.random_weights or RANDOM_MODEL
    config = presets.model_config(name)
    return name, config, init_params(config, jax.random.key(0), jnp.bfloat16 if on_gpu else jnp.float32)


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report) + "\n", encoding="utf-8")


def shapes(text: str) -> list[tuple[int, int]]:
    """ "1x1024,8x32768" -> [(1, 1024), (8, 32768)]."""
    pairs = [part.split("x") for part in text.split(",")]
    if not all(len(pair) == 2 and all(side.isdecimal() and int(side) for side in pair) for pair in pairs):
        raise InvalidArgumentError(f"--shapes must look like 1x1024,8x32768 (batch x context), got {text!r}.")
    return [(int(batch), int(context)) for batch, context in pairs]


def reaching(config: Any, length: int) -> Any:
    """The model's configuration, its positions stretched if random weights are to be run beyond them."""
    return dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, length))


def compiling(variants: Any) -> Any:
    """Shows a warm-up's progress."""
    from tqdm import tqdm

    return tqdm(variants, desc="compiling", unit="step")
