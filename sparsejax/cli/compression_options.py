"""What is kept of the KV cache, as options of the command line: one for each argument of `CompressionParams`."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsejax.cli.options import BUDGET_RULES
from sparsejax.errors import InvalidArgumentError

if TYPE_CHECKING:  # brings JAX, which the command line's parser does not need
    from sparsejax.engine.requests.compression_params import CompressionParams

ARGUMENTS = (
    "budget_tokens",
    "keep_fraction",
    "sink_tokens",
    "recent_tokens",
    "window_tokens",
    "compress_once",
    "context_tokens",
    "interval_tokens",
    "strategy",
    "num_per_evict",
    "budget_rule",
    "budget_floor",
)

# Options of methods that have an option of the command line all the same.
SELECTION_ARGUMENTS = ("top_tokens", "full_attention_layers")

# Those that mean the same for all methods, whatever the budget.
COMMON_ARGUMENTS = ("sink_tokens", "recent_tokens", "window_tokens", "budget_rule", "budget_floor")


def add_compression_options(parser: argparse.ArgumentParser) -> None:
    """--method and what goes with it; read them back with `compression_from`."""
    group = parser.add_argument_group("KV cache", "A sparse method keeps a part of it: `sparsejax methods` lists them.")

    def whole(name: str, text: str) -> None:
        group.add_argument(name, type=int, metavar="N", help=text)

    group.add_argument(
        "--method", default="full", metavar="NAME", help="what is kept or read of the KV cache (default: full)"
    )
    whole("--budget-tokens", "tokens to keep per layer and KV head, on average")
    group.add_argument("--keep-fraction", type=float, metavar="F", help="or the fraction of the text to keep")
    add_common_arguments(group)
    whole("--context-tokens", "compress after so many prompt tokens, before the rest is seen")
    whole("--interval-tokens", "compress again whenever so many tokens have been generated")
    group.add_argument(
        "--compress-once",
        action=argparse.BooleanOptionalAction,
        help="compress the prompt only, or go on while decoding (default: the method's)",
    )
    add_selection_options(group)
    group.add_argument(
        "--strategy",
        metavar="NAME",
        help="memory of what is evicted at every step: reuse (default), free_block, sparse_copy or no_op",
    )
    whole("--num-per-evict", "tokens evicted at once by a method that evicts at every step (default: 1)")
    group.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method or the budget rule's own, e.g. pooling=avg (repeatable)",
    )


def add_selection_options(group: Any) -> None:
    """What methods that select are asked for; read it back with `selection_options`."""
    group.add_argument(
        "--top-tokens", metavar="N", help="methods that select: tokens to choose, or a fraction in (0, 1) of the text"
    )
    group.add_argument(
        "--full-attention-layers",
        metavar="N,N",
        help="layers that read everything (default: those known for the model)",
    )


def selection_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `add_selection_options`, as options of a method."""
    given = {name: getattr(args, name, None) for name in SELECTION_ARGUMENTS}
    own = {name: value for name, value in given.items() if value is not None}
    if "top_tokens" in own:
        own["top_tokens"] = _own_option(f"top_tokens={own['top_tokens']}")[1]
    return own


def add_common_arguments(group: Any) -> None:
    """The options of `COMMON_ARGUMENTS`, for a parser or a group of one; read them back with `common_arguments`."""
    for name, text in (
        ("--sink-tokens", "first tokens that are always kept and read"),
        ("--recent-tokens", "last tokens that are always kept and read"),
        ("--window-tokens", "last queries that the method looks at"),
    ):
        group.add_argument(name, type=int, metavar="N", help=f"{text} (default: the method's)")
    group.add_argument(
        "--budget-rule",
        metavar="NAME",
        help=f"how layers and heads share the budget, of {BUDGET_RULES} (default: the method's)",
    )
    group.add_argument("--budget-floor", type=float, metavar="F", help="share of the mean budget every head gets")


def common_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options of `add_common_arguments`."""
    return {name: getattr(args, name) for name in COMMON_ARGUMENTS if getattr(args, name) is not None}


def compression_from(args: argparse.Namespace, **overrides: Any) -> CompressionParams:
    """CompressionParams from the options of `add_compression_options`, or from those of them that a command has.

    Args:
      overrides: arguments of `CompressionParams` that replace the command line's.

    Raises:
      InvalidArgumentError: a value that is not allowed, or an --option without a name.
    """
    from sparsejax import methods
    from sparsejax.engine.requests.compression_params import CompressionParams

    given: dict[str, Any] = (
        {"method": args.method} | {name: getattr(args, name, None) for name in ARGUMENTS} | overrides
    )
    own: dict[str, Any] = {}
    for text in args.option:
        name, value = _own_option(text)
        if name in (*given, *SELECTION_ARGUMENTS):
            raise InvalidArgumentError(
                f"--option {name} is no option of a method's own: use --{name.replace('_', '-')}."
            )
        if name in own:
            raise InvalidArgumentError(f"--option gives {name} twice, {own[name]!r} and {value!r}.")
        own[name] = value
    selection = selection_options(args)
    taken = methods.get(given["method"]).option_names()
    if "full_attention_layers" in selection and "full_attention_layers" not in taken:
        raise InvalidArgumentError(
            f"--full-attention-layers has no meaning for method {given['method']!r}. Options of its own: "
            f"{', '.join(f'--option {name}=' for name in taken if name not in SELECTION_ARGUMENTS) or 'none'}."
        )
    return CompressionParams(**given, options=own | selection)


def method_options(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """["snapkv.pooling=avg"] -> {"snapkv": {"pooling": "avg"}}.

    Raises:
      InvalidArgumentError: a text of another form.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        method, dot, own = text.partition(".")
        if not dot or not method.isidentifier():
            raise InvalidArgumentError(f"--option must look like METHOD.NAME=VALUE, got {text!r}.")
        name, value = _own_option(own)
        if name in options.setdefault(method, {}):
            raise InvalidArgumentError(f"--option gives {method}.{name} twice.")
        options[method][name] = value
    return options


def _own_option(text: str) -> tuple[str, Any]:
    """ "kernel=7" -> ("kernel", 7); what is no Python value stays text."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise InvalidArgumentError(f"--option must look like NAME=VALUE, got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return name, {"true": True, "false": False}.get(value.lower(), value)
