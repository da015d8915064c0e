"""`sparsejax demo`: the embedded model answers questions about long texts, through the path any model takes."""

from __future__ import annotations

import argparse
import textwrap

from sparsejax.cli import options
from sparsejax.errors import InvalidArgumentError

SHOWN = 200  # characters of a long context that are printed


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="answer long prompts with the embedded model and show the timings",
        description="Makes one long prompt per retrieval task, answers them in one continuous batch and prints the "
        "answers and a table of timings.",
    )
    parser.add_argument(
        "--length", type=int, default=4096, metavar="N", help="tokens of a prompt (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default: %(default)s)")
    options.add_model_options(parser, dense=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import jax

    from sparsejax import SamplingParams
    from sparsejax.assets import tiny_model_path
    from sparsejax.checkpoint import load_config, load_tokenizer, resolve
    from sparsejax.evaluation import ANSWER_TOKENS, TASKS, build_samples, encode_sample, exact_match

    # Asked for first, for a length that does not do should not be noticed after minutes of compiling.
    source = resolve(args.model or tiny_model_path())
    longest = load_config(source).max_position_embeddings if args.max_model_len is None else args.max_model_len
    if args.length > longest - ANSWER_TOKENS:
        raise InvalidArgumentError(
            f"--length must be at most {longest - ANSWER_TOKENS}, so that {longest} tokens have room for an answer; "
            f"got {args.length}."
        )
    tokenizer = load_tokenizer(args.tokenizer or source.folder)
    samples = build_samples(tokenizer, lengths=[args.length], samples=1, seed=args.seed)
    prompts = [encode_sample(tokenizer, sample).tokens for sample in samples]
    # Compiled before the requests arrive, so that the table shows the engine's times and not the compiler's.
    if args.max_num_seqs is None:
        args.max_num_seqs = len(TASKS)
    llm = options.make_llm(args, warmup="greedy")
    device = jax.devices()[0]
    print(f"{args.model or 'embedded tiny model'} on {options.device_name(device)}")
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS))
    for sample, output in zip(samples, outputs, strict=True):
        answer = output.outputs[0].text
        right = exact_match(answer, sample.answers, ordered=sample.ordered)
        print(f"\n[{sample.task}]")
        print(textwrap.indent(textwrap.fill(f"{sample.context[:SHOWN]} ...", 100), "  "))
        print(f"  {sample.question}")
        print(f"  Answer: {answer.strip()}   ({'right' if right else 'wrong, expected ' + ' '.join(sample.answers)})")
    print("\n" + timing_table([sample.task for sample in samples], outputs))
    return 0


def timing_table(names: list[str], outputs: list) -> str:
    """A line per request; times count from when all were submitted together."""
    header = ("request", "prompt tokens", "generated", "first token s", "tokens/s", "KV MiB")
    rows: list[tuple[str, ...]] = [header]
    for name, output in zip(names, outputs, strict=True):
        metrics = output.metrics
        speed = metrics.tokens_per_second
        rows.append(
            (
                name,
                str(metrics.num_prompt_tokens),
                str(metrics.num_generated_tokens),
                f"{metrics.ttft:.2f}",
                "-" if speed is None else f"{speed:.1f}",
                f"{metrics.kv_bytes / 2**20:.1f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
