"""`sparsejax methods`: what can be done to the KV cache, from which paper, with which options."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap

SAVES = {
    "full": "nothing",
    "evict": "memory: dropped tokens free their pages at once; and reading what was dropped",
    "select": "reading: every token stays in memory, few are read",
    "store": "memory: every token stays in less room; and reading, for few are read",
}
NEEDS = {
    "attention": "attention probabilities of the prompt's queries",
    "decode": "attention probabilities of decoded tokens, where it goes on while decoding",
    "blocks": "attention within blocks of 128 tokens",
    "moments": "means and covariances of the queries",
    "reconstruction": "passes that repeat the context, about two prefills of it",
}
OBSERVED = "attention probabilities of decoded tokens at the full layers that choose"
STORED = f"a compressor that was trained for the model; {OBSERVED}"
BOUNDS = "smallest and largest keys of each page: 1 / page size on top of the cache's memory"


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "methods",
        help="list the sparse methods and their options",
        description="Lists every method that --method and CompressionParams(method=...) take: what it keeps, what it "
        "needs, where it comes from, its options and their defaults. With names: those methods, explained.",
        epilog="example: sparsejax methods snapkv",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="explain these (default: list all)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from sparsejax import methods

    names = args.names or methods.available()
    facts = {name: _facts(name) for name in names}
    if args.json:
        print(json.dumps([{"name": name, **each} for name, each in facts.items()], indent=2))
        return 0
    for name, each in facts.items():
        print(f"{name} - {each['summary']}")
        _line("family", f"{each['family']}; saves {each['saves']}")
        for label in ("needs", "sees", "source", "default"):
            if each[label]:
                _line(label, each[label])
        if each["options"]:
            _line("options", ", ".join(f"{option}={value!r}" for option, value in each["options"].items()))
        if args.names:
            print(f"\n{textwrap.indent(inspect.cleandoc(methods.get(name).__doc__ or ''), '  ')}")
        print()
    if not args.names:
        rules = ", ".join(methods.available_rules())
        print(f"Methods that evict take --budget-rule {rules}, where their heads may differ.")
        print("`sparsejax methods NAME` explains a method; docs/methods.md explains and measures all of them.")
    return 0


def _line(label: str, text: str) -> None:
    print(textwrap.fill(text, 110, initial_indent=f"  {label:<9}", subsequent_indent=" " * 11))


def _facts(name: str) -> dict:
    """What there is to say about a method."""
    from sparsejax import methods

    described, method = methods.describe(name), methods.get(name)
    evicts, selects = method.family == "evict", method.family == "select"
    needs = [NEEDS[record] for record in sorted(method.records)]
    if selects:
        needs = [BOUNDS if method.needs_page_bounds else OBSERVED]
    elif method.family == "store":
        needs = [STORED]
    sees = "the end of what it compresses, so ask first" if described.query_aware else "no question"
    times = ["between prefill chunks"] * method.between_chunks + ["at every decode step"] * method.evicts_per_step
    also = f"; may compress {' and '.join(times)}" if times else ""
    defaults = [f"rule {described.budget_rule}"] if evicts else []
    if method.default_sink_tokens:
        defaults.append(f"{method.default_sink_tokens} sink tokens")
    if method.default_window_tokens:
        defaults.append(f"a window of {method.default_window_tokens} queries")
    if selects:
        defaults.append(f"{method().default_recent_tokens(0, 0)} recent tokens")
    return {
        "summary": described.summary,
        "family": described.family,
        "saves": SAVES[described.family],
        "needs": "; ".join(needs) or ("keys and positions" * evicts),
        "sees": (sees + also) * evicts,
        "source": described.source,
        "default": ", ".join(defaults),
        "options": dict(described.options),
    }
