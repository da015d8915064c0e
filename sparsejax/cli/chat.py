"""`sparsejax chat`: talk to a model in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys

from sparsejax.cli import options
from sparsejax.cli.compression_options import add_compression_options, compression_from
from sparsejax.errors import SparsejaxError

HELP = (
    "/clear forgets the conversation, /exit (or end of input) leaves, /help shows this. Ctrl-C stops an answer, and "
    "leaves where none is under way."
)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk to a model",
        description=f"Chats through the model's own chat template, streaming the answer. {HELP}",
        epilog='example: echo "Hello" | sparsejax chat --method keydiff --budget-tokens 512',
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message to start with")
    options.add_sampling_options(parser, max_tokens=512)
    add_compression_options(parser)
    options.add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    params, compression = options.sampling_params(args), compression_from(args)
    options.check_store_options(args, compression.method)
    llm = options.make_llm(args, methods=tuple(dict.fromkeys(["full", compression.method])))
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
    interactive, failed = sys.stdin.isatty(), False
    if interactive:
        print(HELP)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            break
        if line.strip() == "/exit":
            break
        if line.strip() == "/clear":
            messages = list(start)
        elif line.strip() == "/help":
            print(HELP)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            try:
                answer = _answer(llm, messages, params, compression, may_stop=interactive)
                messages.append({"role": "assistant", "content": answer})
            except SparsejaxError as error:  # a turn that cannot be served must not lose the conversation
                messages.pop()
                failed = True
                print(f"error: {error}", file=sys.stderr)
    return int(failed and not interactive)  # a script that pipes its turns in reads no messages


def _answer(llm, messages: list[dict], params, compression, *, may_stop: bool) -> str:
    """Prints the answer as it comes. may_stop: Ctrl-C ends the answer where it is, and not the program."""
    text = ""
    with contextlib.closing(llm.stream(messages, params, compression)) as increments:
        try:
            for increment in increments:
                fresh = increment.outputs[0].text
                print(fresh, end="", flush=True)
                text += fresh
        except KeyboardInterrupt:
            if not may_stop:
                raise
    print()
    return text
