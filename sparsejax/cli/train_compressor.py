"""`sparsejax train-compressor`: train a DeltaKV compressor for a frozen model, or measure how fast that goes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsejax.cli.bench_options import RANDOM_MODEL
from sparsejax.cli.options import add_defaulted, refuse_given
from sparsejax.errors import InvalidArgumentError

EPILOG = """examples:
  sparsejax pack-data corpus.jsonl packed --model Qwen/Qwen2.5-7B-Instruct --length 8192
  sparsejax train-compressor --model Qwen/Qwen2.5-7B-Instruct --data packed --out run \\
      --kv-compressed-size 256 --down-type mlp_swiglu --down-intermediate-size 3072 --max-steps 20000
  sparsejax train-compressor --out run --resume ...        go on where it stopped, with the same options
  sparsejax train-compressor --benchmark 5 --random-weights llama-3.1-8b --length 8192
"""


def add_parser(subparsers) -> None:
    from train.compressor.options import DTYPES, MODEL_TYPES, REMATERIALISATION, TRAIN_ON, TrainOptions

    parser = subparsers.add_parser(
        "train-compressor",
        help="train a DeltaKV compressor for a frozen model",
        description="Trains, for every layer, a pair of projections that store keys and values as small residuals "
        "against nearby reference tokens. The model stays frozen: a first pass tells what its layers would store, "
        "a second reads reconstructions instead; the loss is next-token cross-entropy plus the squared error of all "
        "layers. OUT gets metrics.jsonl, loss.png, checkpoints that --resume goes on from bit for bit, and the "
        "compressor.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser.add_argument_group("model, data and output")
    group.add_argument("--model", metavar="NAME", help="folder or Hugging Face id (default: the embedded tiny model)")
    group.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="from `sparsejax pack-data`, or saved by Hugging Face datasets (input_ids)",
    )
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    group.add_argument(
        "--init",
        metavar="NAME",
        help="compressor to start from, folder or id; pca: principal components of the data, for linear projections "
        "(default: random)",
    )
    group.add_argument(
        "--stop-after", type=int, metavar="N", help="stop after step N, with a checkpoint, to resume later"
    )
    group.add_argument("--no-progress", action="store_true", help="no progress bars")

    group = parser.add_argument_group("compressor")
    group.add_argument(
        "--kv-compressed-size", type=int, default=512, metavar="D", help="numbers of a latent (default: %(default)s)"
    )
    kinds = ("linear", "mlp_gelu", "mlp_swiglu")
    group.add_argument("--down-type", choices=kinds, default="mlp_swiglu", help="encoder (default: %(default)s)")
    group.add_argument("--up-type", choices=kinds, default="linear", help="decoder (default: %(default)s)")
    for direction in ("down", "up"):
        group.add_argument(
            f"--{direction}-intermediate-size",
            type=int,
            default=0,
            metavar="M",
            help=f"width inside the {direction} MLP (default: half of its input plus output)",
        )
    group.add_argument("--bias", action="store_true", help="projections with biases")
    group.add_argument(
        "--neighbors", type=int, default=4, metavar="K", help="references of a token (default: %(default)s)"
    )
    group.add_argument(
        "--cluster-ratio",
        type=float,
        default=0.1,
        metavar="R",
        help="share of tokens kept as centers (default: %(default)s)",
    )
    group.add_argument(
        "--cluster-metric", choices=("l2", "dot", "cosine"), default="l2", help="nearness (default: %(default)s)"
    )
    group.add_argument(
        "--cluster-on-keys", action="store_true", help="search with keys only rather than keys and values"
    )
    group.add_argument(
        "--cluster-soft-assignment",
        action="store_true",
        help="weigh references by nearness, in training only: the engine reads plain means back",
    )
    group.add_argument(
        "--cluster-temp", type=float, default=10.0, metavar="T", help="of the weights (default: %(default)s)"
    )
    group.add_argument(
        "--sink-tokens", type=int, default=16, metavar="N", help="first tokens, never compressed (default: %(default)s)"
    )
    group.add_argument(
        "--chunk-size",
        type=int,
        default=1,
        metavar="C",
        help="e2e: tokens that share a reference; 1: none do (default: 1)",
    )
    group.add_argument(
        "--ref-mode",
        choices=("avg", "first"),
        default="avg",
        help="e2e: mean of the last C tokens, or a chunk's first (default: %(default)s)",
    )
    group.add_argument("--split-kv", action="store_true", help="e2e: compress keys and values apart")

    group = parser.add_argument_group("training")
    add_defaulted(
        group,
        TrainOptions(),
        {
            "model_type": ("references by position, nearest centers, or these with layers rematerialised", MODEL_TYPES),
            "train_on": ("which losses give gradients", TRAIN_ON),
            "rematerialisation": ("what the backward pass computes again (default: by model type)", REMATERIALISATION),
            "learning_rate": ("peak of the learning rate", None),
            "warmup_ratio": ("fraction of the run that is warm-up", None),
            "beta1": ("of AdamW", None),
            "beta2": ("of AdamW", None),
            "epsilon": ("of AdamW", None),
            "weight_decay": ("of AdamW", None),
            "clip": ("largest norm of a gradient", None),
            "batch_size": ("sequences a device takes at once", None),
            "accumulation": ("batches that make one step", None),
            "max_steps": ("steps of the run; 0: none, for --init pca (default: --epochs passes over the data)", None),
            "epochs": ("passes over the data", None),
            "length": ("tokens of a sequence to use (default: all; 8192 with --benchmark)", None),
            "document_masks": ("keep attention and loss within a document", None),
            "dtype": ("of the computation; what is trained is float32", DTYPES),
            "seed": ("of initial weights and data order", None),
            "log_every": ("steps between lines of metrics", None),
            "save_every": ("steps between checkpoints; below 1, a fraction of the run", None),
            "keep": ("checkpoints kept", None),
        },
    )
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--mesh",
        metavar="SPEC",
        help="data=D,model=N: D x N devices, the frozen weights spread over N (default: all devices as data)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of a run on several hosts; the same on each")
    group.add_argument("--num-processes", type=int, metavar="N", help="hosts of the run")
    group.add_argument("--process-id", type=int, metavar="I", help="number of this host, from 0")
    group = parser.add_argument_group("measuring")
    group.add_argument(
        "--benchmark",
        type=int,
        metavar="STEPS",
        help="time that many steps on random weights and tokens, and print the FLOP rate as a fraction of the card's",
    )
    group.add_argument(
        "--random-weights", metavar="CONFIG", default=RANDOM_MODEL, help="model of --benchmark (default: %(default)s)"
    )
    parser.set_defaults(run=functools.partial(run, default_of=parser.get_default))


def run(args: argparse.Namespace, *, default_of: Callable[[str], Any]) -> int:
    """Trains, or measures. default_of: what an option is when it is not given."""
    from train.compressor.options import TrainOptions

    options = TrainOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainOptions)})
    _check_used(args, default_of)
    _distribute(args)
    if args.benchmark is not None:
        return _benchmark(args, options)
    missing = [f"--{name}" for name in ("data", "out") if getattr(args, name) is None]
    if missing:
        raise InvalidArgumentError(f"{' and '.join(missing)} must be given (or --benchmark).")
    if args.stop_after is not None and args.stop_after < 1:
        raise InvalidArgumentError(f"--stop-after must be at least 1, got {args.stop_after}.")
    _reserve()
    from sparsejax.assets import tiny_model_path
    from train.compressor.run import Run, train

    folder = train(
        Run(
            model=args.model or str(tiny_model_path()),
            data=args.data,
            out=args.out,
            compressor=_compressor(args),
            options=options,
            mesh=args.mesh,
            init=args.init,
            resume=args.resume,
            stop_after=args.stop_after,
            progress=not args.no_progress,
        )
    )
    print(f"wrote {folder}")
    return 0


def _check_used(args: argparse.Namespace, default_of: Callable[[str], Any]) -> None:
    """Refuses what is given and has no meaning beside the rest. Given is what is not the default."""
    clusters = ("neighbors", "cluster_ratio", "cluster_metric", "cluster_on_keys")
    of_runs = ("data", "out", "model", "init", "stop_after", "resume")
    of_runs += ("max_steps", "epochs", "seed", "log_every", "save_every", "keep")
    meaningless = [
        ("e2e", args.model_type == "e2e", (*clusters, "cluster_soft_assignment", "cluster_temp")),
        (args.model_type, args.model_type != "e2e", ("chunk_size", "ref_mode", "split_kv")),
        ("hard assignment", not args.cluster_soft_assignment, ("cluster_temp",)),
        ("a linear encoder", args.down_type == "linear", ("down_intermediate_size",)),
        ("a linear decoder", args.up_type == "linear", ("up_intermediate_size",)),
        ("--benchmark", args.benchmark is not None, of_runs),
        ("a run", args.benchmark is None, ("random_weights",)),
    ]
    for what, holds, names in meaningless:
        if holds:
            refuse_given(args, default_of, names, what)


def _compressor(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the compressor, by the names of `CompressorConfig`."""
    names = (
        "kv_compressed_size",
        "down_type",
        "up_type",
        "down_intermediate_size",
        "up_intermediate_size",
        "bias",
        "neighbors",
        "cluster_ratio",
        "cluster_metric",
        "cluster_soft_assignment",
        "cluster_temp",
        "sink_tokens",
        "chunk_size",
        "ref_mode",
        "split_kv",
    )
    return {"cluster_on_kv": not args.cluster_on_keys, **{name: getattr(args, name) for name in names}}


def _distribute(args: argparse.Namespace) -> None:
    given = [name for name in ("coordinator", "num_processes", "process_id") if getattr(args, name) is not None]
    if given and len(given) < 3:
        raise InvalidArgumentError(
            "--coordinator, --num-processes and --process-id belong together: give all three or none."
        )
    if given:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise InvalidArgumentError(f"--coordinator must be HOST:PORT, got {args.coordinator!r}.")
        if args.num_processes < 1:
            raise InvalidArgumentError(f"--num-processes must be at least 1, got {args.num_processes}.")
        if not 0 <= args.process_id < args.num_processes:
            raise InvalidArgumentError(
                f"--process-id must be from 0 to {args.num_processes - 1}, got {args.process_id}."
            )
        import jax

        # Before anything asks for a device.
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)


def _reserve() -> None:
    from sparsejax.engine.execution.memory import reserve_device_memory

    reserve_device_memory(0.92)


def _benchmark(args: argparse.Namespace, options: Any) -> int:
    if args.benchmark < 1:
        raise InvalidArgumentError(f"--benchmark must be at least 1, got {args.benchmark}.")
    _reserve()
    from sparsejax.bench.presets import model_config
    from train.compressor.run import compressor_config
    from train.compressor.speed import measure

    model = model_config(args.random_weights)
    compressor = compressor_config(model, options, _compressor(args))
    speed = measure(model, compressor, options, length=options.length or 8192, steps=args.benchmark, mesh=args.mesh)
    print(f"{args.random_weights}, {options.model_type}, rematerialisation {options.recompute}\n{speed}")
    return 0
