"""What a compressor's options cost and give: references of a token (K), numbers of a latent, share of centers.

    python -m train.tiny_corpus corpus.jsonl --documents 400 --length 2048 --seed 1
    sparsejax pack-data corpus.jsonl packed --length 2048 --no-wrap
    python examples/compressor_ablation.py packed ablation --lengths 2048 --samples 8

makes a compressor of the embedded model for each value of each option, the others being those of --base: principal
components of the data, trained for --steps more (0: not at all). Each serves method deltakv on the retrieval tasks.
OUT gets ablation.json, ablation.csv and ablation.png. Options may be measured apart (--only), on as many GPUs, and be
put together with `python examples/compressor_ablation.py --join A/ablation.json,B/ablation.json OUT`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsejax import LLM, SparsejaxError
from sparsejax.assets import tiny_model_path
from sparsejax.evaluation.method_sweep import MethodRow, compare_methods, make_settings, over_tasks
from train.compressor.log import read_metrics
from train.compressor.options import TrainOptions
from train.compressor.run import Run, train

OPTIONS = ("neighbors", "size", "ratio")
TITLES = {"neighbors": "references of a token", "size": "numbers of a latent", "ratio": "share of centers"}


@dataclass(frozen=True)
class Sizes:
    """A compressor: K references, numbers of a latent, share of tokens that are centers."""

    neighbors: int
    size: int
    ratio: float

    def __str__(self) -> str:
        return f"K={self.neighbors} size={self.size} ratio={self.ratio:g}"


def variants(base: Sizes, values: dict[str, Sequence[Any]]) -> list[Sizes]:
    """The base, then all that differ from it in one option."""
    others = [dataclasses.replace(base, **{name: value}) for name, found in values.items() for value in found]
    return list(dict.fromkeys([base, *others]))


def make_compressor(sizes: Sizes, data: Path, out: Path, *, steps: int, batch_size: int) -> Path:
    """Trains it as `sparsejax train-compressor --init pca` does, unless an earlier run of this script did."""
    made = out / "compressor"
    return made if made.is_dir() else _train(sizes, data, out, steps=steps, batch_size=batch_size, init="pca")


def squared_error(sizes: Sizes, data: Path, compressor: Path, out: Path, *, batch_size: int) -> float:
    """Mean squared error of keys and values, summed over the layers, as a step of training sees it in a first batch."""
    metrics = out / "metrics.jsonl"
    if not metrics.is_file():
        _train(sizes, data, out, steps=1, batch_size=batch_size, init=str(compressor))
    return read_metrics(metrics)[0]["mse"]


def _train(sizes: Sizes, data: Path, out: Path, *, steps: int, batch_size: int, init: str) -> Path:
    options = TrainOptions(
        max_steps=steps,
        batch_size=batch_size,
        document_masks=True,
        dtype="float32",
        rematerialisation="none",
        learning_rate=1e-3,
        warmup_ratio=0.1,
    )
    compressor = {
        "kv_compressed_size": sizes.size,
        "neighbors": sizes.neighbors,
        "cluster_ratio": sizes.ratio,
        "down_type": "linear",
        "up_type": "linear",
        "bias": False,
    }
    return train(
        Run(model=str(tiny_model_path()), data=data, out=out, compressor=compressor, options=options, init=init)
    )


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each compressor, type of latents, length and budget; the first ones are dense."""
    wanted = {"neighbors": args.neighbors, "size": args.sizes, "ratio": args.ratios}
    base = Sizes(int(args.base[0]), int(args.base[1]), args.base[2])
    samples = {"lengths": args.lengths, "samples": args.samples, "tasks": args.tasks, "seed": args.seed}
    dense: list[MethodRow] = []
    lines: list[dict[str, Any]] = []
    for sizes in variants(base, {name: found for name, found in wanted.items() if name in (args.only or OPTIONS)}):
        out = args.out / f"{sizes} steps={args.steps}".replace(" ", "_")
        folder = make_compressor(sizes, args.data, out, steps=args.steps, batch_size=args.batch_size)
        error = squared_error(sizes, args.data, folder, out / "error", batch_size=args.batch_size)
        for latent in args.latent_dtypes:
            llm = LLM(
                methods=("full", "deltakv"),
                compressor=str(folder),
                latent_dtype=latent,
                full_attention_layers=tuple(args.full_attention_layers),
                recent_tokens=args.recent_tokens,
                max_model_len=max(args.lengths),
                max_num_seqs=args.max_num_seqs,
                max_num_batched_tokens=args.max_num_batched_tokens,
                dense_cache_fraction=0.0 if dense else 0.5,
            )
            settings = make_settings(["deltakv"], args.budgets, variant=latent)
            rows = compare_methods(llm, settings[1:] if dense else settings, **samples, dense=dense)
            llm.engine.close()
            del llm
            dense = dense or [row for row in rows if row.mode == "dense"]
            own = {**dataclasses.asdict(sizes), "error": error}
            found = [_line(row, own if row.mode == "storing" else {}) for row in over_tasks(rows)]
            print("\n".join(map(_told, found)), flush=True)
            lines += found
            write(lines, args.out)  # what was measured so far is kept, whatever becomes of the rest
    return lines


def _line(row: MethodRow, sizes: dict[str, Any]) -> dict[str, Any]:
    told = row.as_dict()
    names = ("mode", "length", "budget", "score", "low", "high", "kept", "read", "kv_bytes")
    empty = dict.fromkeys((*OPTIONS, "error"))
    return {**empty, **sizes, "latent": row.variant, **{name: told[name] for name in names}, "samples": len(row.hits)}


def _told(line: dict[str, Any]) -> str:
    named = "dense" if line["mode"] == "dense" else f"K={line['neighbors']} size={line['size']} ratio={line['ratio']:g}"
    return (
        f"{named:26} {line['latent']:9} {line['length']:6} tokens  budget {line['budget'] or '-':>6}  kept "
        f"{line['kept']:6.1%}  read {line['read']:6.1%}  exact {line['score']:6.1%} "
        f"[{line['low']:.1%}, {line['high']:.1%}]" + ("" if line["error"] is None else f"  error {line['error']:.4f}")
    )


def write(lines: list[dict[str, Any]], out: Path) -> None:
    """ablation.json and ablation.csv."""
    (out / "ablation.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
    with (out / "ablation.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(lines[0]))
        table.writeheader()
        table.writerows(lines)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Exact answers over each option's values, and under them bytes kept and squared error, at the longest length."""
    from matplotlib.figure import Figure

    longest = max(line["length"] for line in lines)
    stored = [line for line in lines if line["mode"] == "storing" and line["length"] == longest]
    (dense, *_) = (line for line in lines if line["mode"] == "dense" and line["length"] == longest)
    base = {name: max([line[name] for line in stored], key=[line[name] for line in stored].count) for name in OPTIONS}
    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(3, len(OPTIONS), sharey="row", squeeze=False)
    for column, name in enumerate(OPTIONS):
        others = [other for other in OPTIONS if other != name]
        chosen = [line for line in stored if all(line[other] == base[other] for other in others)]
        values = sorted({line[name] for line in chosen})
        for latent in dict.fromkeys(line["latent"] for line in chosen):
            for budget in dict.fromkeys(line["budget"] for line in chosen):
                found = {line[name]: line for line in chosen if (line["latent"], line["budget"]) == (latent, budget)}
                places = [i for i, value in enumerate(values) if value in found]
                there = [found[values[i]] for i in places]
                label = f"{latent}, {100 * budget:g} % read" if budget <= 1 else f"{latent}, {budget} read"
                axes[0, column].plot(places, [100 * line["score"] for line in there], "o-", label=label)
            kept = {line[name]: 100 * line["kept"] for line in chosen if line["latent"] == latent}
            places = [i for i, value in enumerate(values) if value in kept]
            axes[1, column].plot(places, [kept[values[i]] for i in places], "s-", label=latent)
        errors = {line[name]: line["error"] for line in chosen}
        axes[2, column].plot(range(len(values)), [errors[value] for value in values], "^-", color="black")
        axes[0, column].axhline(100 * dense["score"], color="black", linestyle=":", label="dense")
        axes[2, column].set_xlabel(TITLES[name])
        for axis in axes[:, column]:
            axis.set_xticks(range(len(values)), [f"{value:g}" for value in values])
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(f"exact answers, %, {longest} tokens")
    axes[1, 0].set_ylabel("KV bytes, % of dense")
    axes[1, 0].set_ylim(bottom=0)
    axes[2, 0].set_ylabel("squared error, all layers")
    axes[2, 0].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize="small")
    axes[1, 0].legend(fontsize="small")
    figure.savefig(path, dpi=80)


def join(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The lines of several files, each once: files share the base and the dense lines."""
    lines = [line for path in paths for line in json.loads(path.read_text(encoding="utf-8"))]
    keys = ("mode", *OPTIONS, "latent", "length", "budget")
    found: dict[tuple, dict[str, Any]] = {}
    for line in lines:
        found.setdefault(tuple(line[key] for key in keys), line)
    return list(found.values())


def _parser() -> argparse.ArgumentParser:
    def listed(kind: Any) -> Any:
        return lambda text: [kind(part) for part in text.split(",")]

    def budget(text: str) -> float:
        return int(text) if text.isdecimal() else float(text)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", metavar="PACKED", help="folder of packed rows")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--join", type=listed(Path), metavar="A,B", help="put results together; measure nothing")
    parser.add_argument("--only", type=listed(str), metavar="A,B", help=f"vary these of {', '.join(OPTIONS)} only")
    for name, kind, default, text in (
        ("neighbors", int, "1,2,4,8", "references of a token"),
        ("sizes", int, "32,64,128", "numbers of a latent"),
        ("ratios", float, "0.05,0.1,0.2", "share of centers"),
        ("base", float, "4,64,0.1", "what the others are while one varies"),
        ("budgets", budget, "0.125,1.0", "compressed tokens to read, as in eval ruler"),
        ("latent-dtypes", str, "bfloat16,int4", "types of latents"),
        ("lengths", int, "2048", "prompt tokens"),
        ("full-attention-layers", int, "0", "layers that keep everything"),
        ("tasks", str, None, "retrieval tasks; None: all"),
    ):
        parser.add_argument(
            f"--{name}", type=listed(kind), default=default, metavar="N,N", help=f"{text} (default: %(default)s)"
        )
    for name, default, text in (
        ("steps", 0, "of training behind principal components"),
        ("batch-size", 8, "of training"),
        ("samples", 8, "per task and length"),
        ("seed", 0, "of the tasks"),
        ("recent-tokens", 32, "of the engine"),
        ("max-num-seqs", 32, "of the engine"),
        ("max-num-batched-tokens", 1024, "of the engine"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.join is None and args.data is None:
        parser.error("PACKED is needed to measure anything")
    unknown = set(args.only or ()) - set(OPTIONS)
    if unknown:
        parser.error(f"--only knows {', '.join(OPTIONS)}; got {', '.join(sorted(unknown))}")
    args.out.mkdir(parents=True, exist_ok=True)
    lines = measure(args) if args.join is None else join(args.join)
    write(lines, args.out)
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "no figure: matplotlib is not installed (pip install 'sparsejax[eval]'); --join draws it from the results"
        )
    else:
        plot(lines, args.out / "ablation.png")


if __name__ == "__main__":
    try:
        main()
    except (SparsejaxError, OSError) as error:
        sys.exit(f"compressor_ablation: {error}")
