"""Options that several subcommands share: the model and engine, sampling, fields of a dataclass."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from sparsejax.config import DTYPES, LATENT_DTYPES
from sparsejax.errors import InvalidArgumentError

if TYPE_CHECKING:  # brings JAX, which the parser does not need
    from sparsejax import SamplingParams


# Names that help texts list; those that commands go by are in modules that bring JAX, which the parser does not need.
TASKS = "single, multi_key, multi_value, multi_query, variable_tracking, common_word"
BUDGET_RULES = "uniform, pyramid, adaptive, layer, global, global_pages"

IMPLEMENTATION = (
    "what runs attention and the cache (default: Pallas kernels on a GPU, on Hopper Mosaic for prompts and linear "
    "layers, else Triton; xla on a CPU)"
)


def refuse_given(args: argparse.Namespace, default_of: Callable[[str], Any], names: Iterable[str], what: str) -> None:
    """Refuses options that have no meaning with `what` else is asked for. Given is what is not the default.

    Args:
      default_of: what an option is when it is not given: `parser.get_default`.
    """
    for name in names:
        if getattr(args, name) != default_of(name):
            raise InvalidArgumentError(f"--{name.replace('_', '-')} has no meaning with {what}.")


def add_model_options(parser: argparse.ArgumentParser, *, dense: bool = False) -> None:
    """--model and the engine's options; read them back with `make_llm`. `dense`: for a command that knows no method."""
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="Hugging Face folder or id, or a folder written by `sparsejax convert` (default: the embedded tiny model)",
    )
    group.add_argument("--tokenizer", metavar="NAME", help="folder or id of the tokenizer (default: the model's)")
    group.add_argument("--dtype", choices=DTYPES, help="compute and cache dtype (default: auto)")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="longest prompt plus answer, in tokens (default: the model's)"
    )
    group.add_argument(
        "--max-num-seqs", type=int, metavar="N", help="most requests running at once (default: 256, 16 on a CPU)"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="most prompt tokens in one step (default: 2048, 1024 on a CPU)",
    )
    group.add_argument(
        "--gpu-memory-utilization", type=float, metavar="F", help="fraction of the GPU to reserve (default: 0.9)"
    )
    group.add_argument("--page-size", type=int, metavar="N", help="tokens in a page of the KV cache (default: 32)")
    group.add_argument("--num-pages", type=int, metavar="N", help="physical pages in the pool (default: what fits)")
    group.add_argument("--implementation", choices=("triton", "xla"), help=IMPLEMENTATION)
    if not dense:
        add_store_options(group)
    group.add_argument("--engine-seed", type=int, metavar="N", help="seeds requests that bring no seed (default: 0)")


ENGINE_OPTIONS = (
    "tokenizer",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
    "page_size",
    "num_pages",
    "implementation",
)


STORE_OPTIONS = ("compressor", "latent_dtype", "engine_recent_tokens")


def add_store_options(group: Any) -> None:
    """How method deltakv stores what it compresses; read it back with `store_options`."""
    group.add_argument(
        "--compressor", metavar="NAME", help="for method deltakv: folder or id of its trained compressor"
    )
    group.add_argument(
        "--latent-dtype",
        choices=LATENT_DTYPES,
        help="of compressed tokens (default: float32 if the model is, else bfloat16)",
    )
    group.add_argument(
        "--engine-recent-tokens",
        type=int,
        metavar="N",
        help="for method deltakv: tokens compressed at once, and last ones that are not (default: 128)",
    )


def check_store_options(args: argparse.Namespace, method: str, *more: str) -> None:
    """Refuses options of `add_store_options`, or `more` by name, beside a method that stores nothing compressed."""
    names = (*more, *STORE_OPTIONS)
    given = [name for name in names if getattr(args, name) is not None]
    if method != "deltakv" and given:
        raise InvalidArgumentError(f"--{given[0].replace('_', '-')} is for --method deltakv; the method is {method}.")


def store_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword options of an LLM from those of `add_store_options`, and from --full-attention-layers if there is one."""
    names = (*STORE_OPTIONS, "full_attention_layers")  # not every command has them
    given = {name.removeprefix("engine_"): getattr(args, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def make_llm(args: argparse.Namespace, **overrides: Any):
    """The LLM that the options of `add_model_options` describe."""
    from sparsejax import LLM

    kwargs = {name: getattr(args, name) for name in ENGINE_OPTIONS if getattr(args, name) is not None}
    if args.engine_seed is not None:
        kwargs["seed"] = args.engine_seed
    return LLM(args.model, **(kwargs | store_options(args) | overrides))


def device_name(device: Any) -> str:
    """What a JAX device is, in words."""
    return "CPU" if device.platform == "cpu" else f"{device.device_kind} ({device.platform})"


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    """Sampling options; read them back with `sampling_params`."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="longest answer (default: %(default)s)"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default)"
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest; 0: all")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample among the likeliest of mass P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="drop tokens below P of the likeliest")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeat less")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same tokens")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer here (repeatable)")
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens")


def sampling_params(args: argparse.Namespace, **overrides: Any) -> SamplingParams:
    """SamplingParams from the options of `add_sampling_options`."""
    from sparsejax import SamplingParams

    names = (
        "max_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "seed",
        "stop",
        "ignore_eos",
    )
    return SamplingParams(**({name: getattr(args, name) for name in names} | overrides))


def add_defaulted(group: Any, defaults: Any, options: dict[str, tuple[str, tuple[str, ...] | None]]) -> None:
    """Options for fields of a dataclass: `--field-name`, typed and defaulted as the field.

    Args:
      group: of an argparse parser.
      defaults: an instance whose values are the defaults; a boolean False becomes a switch.
      options: by field name, what it is, and the choices of a field that has some.
    """
    hints = get_type_hints(type(defaults))
    for name, (text, choices) in options.items():
        flag, default = f"--{name.replace('_', '-')}", getattr(defaults, name)
        if default is False:
            group.add_argument(flag, action="store_true", help=text)
            continue
        # `int | None` is an int that may be left out.
        kind = next((part for part in get_args(hints[name]) if part is not type(None)), hints[name])
        told = text if default is None else f"{text} (default: %(default)s)"
        given: dict[str, Any] = {"choices": choices} if choices else {"type": kind, "metavar": kind.__name__[0].upper()}
        group.add_argument(flag, default=default, help=told, **given)
