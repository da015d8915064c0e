"""`sparsejax bench fragmentation`: empty slots of requests that evict at every step, by memory strategy."""

from __future__ import annotations

import argparse
from typing import Any

from sparsejax.cli.bench_options import (
    add_model,
    add_outputs,
    check_model,
    engine_options,
    given,
    load,
    reaching,
    write_json,
)
from sparsejax.cli.evaluate import numbers
from sparsejax.cli.outputs import check_outputs
from sparsejax.errors import InvalidArgumentError

PAGE_SIZE = 16  # SpvLLM's


def add_parser(suites: Any) -> None:
    fragmentation = suites.add_parser(
        "fragmentation",
        help="empty slots in the pages of requests that evict at every step, by memory strategy",
        description="Serves conversations of mixed lengths, dense and evicting under four memory strategies: "
        "internal fragmentation, throughput, latencies, preemptions, and bytes copied.",
        epilog="example: sparsejax bench fragmentation --budgets 256,512,1024 --json f.json --plot f.png",
    )
    fragmentation.add_argument(
        "--method",
        default="h2o",
        metavar="NAME",
        help="what evicts at every step: h2o, random or streaming_llm (default: %(default)s)",
    )
    fragmentation.add_argument(
        "--budgets", default="256,512,1024", metavar="N,...", help="tokens to keep (default: %(default)s)"
    )
    fragmentation.add_argument(
        "--strategies",
        default="reuse,free_block,sparse_copy,no_op",
        metavar="NAME,...",
        help="what becomes of evicted tokens' memory (default: %(default)s)",
    )
    fragmentation.add_argument(
        "--requests", type=int, default=1000, metavar="N", help="conversations (default: %(default)s)"
    )
    fragmentation.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of lengths and tokens (default: %(default)s)"
    )
    fragmentation.add_argument(
        "--steady-rows",
        type=int,
        default=16,
        metavar="N",
        help="requests of the one-in-one-out run; 0: none (default: %(default)s)",
    )
    fragmentation.add_argument(
        "--steady-steps", type=int, default=128, metavar="N", help="tokens each of them decodes (default: %(default)s)"
    )
    fragmentation.add_argument(
        "--no-warmup", action="store_true", help="compile while serving rather than before: times are then too long"
    )
    fragmentation.add_argument(
        "--quick",
        action="store_true",
        help="to try it: a sixteenth of all lengths and of --budgets, 12 requests and few steps, whatever is given",
    )
    add_outputs(fragmentation)
    add_model(fragmentation, page_size=PAGE_SIZE)
    fragmentation.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    check_outputs(args)
    check_model(args)
    budgets = numbers("--budgets", args.budgets)
    for name, least in (("requests", 1), ("seed", 0), ("steady_rows", 0), ("steady_steps", 1)):
        if getattr(args, name) < least:
            raise InvalidArgumentError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}."
            )
    from sparsejax.engine.execution.memory import reserve_device_memory

    reserve_device_memory(args.gpu_memory_utilization)
    from sparsejax import LLM
    from sparsejax.bench import fragmentation, plots

    workload, requests, seqs = fragmentation.Workload(), args.requests, min(256, args.requests)
    rows, steps = args.steady_rows, args.steady_steps
    if args.quick:
        workload = fragmentation.Workload(mean_input=14, mean_output=13, longest_input=64, longest=128)
        requests, seqs, rows, steps = 12, 4, min(rows, 2), min(steps, 12)
        budgets = [max(budget // 16, 4) for budget in budgets]
    strategies = args.strategies.split(",")
    for budget in budgets:
        for strategy in strategies:
            fragmentation.params_for(args.method, strategy, budget)  # refuses what is wrong with them
    trace = workload.trace(requests, args.seed)
    name, config, params = load(args)
    needed = max(trace.longest, max(budgets) + steps)
    llm = LLM.from_params(
        config if args.model else reaching(config, needed),
        params,
        max_num_seqs=given(args.max_num_seqs, seqs),
        max_model_len=given(args.max_model_len, needed),
        methods=(args.method,),
        **engine_options(args, config, params, page_size=PAGE_SIZE),
    )
    page_size = llm.engine.runner.layout.page_size

    def keep(rows, steady_rows):
        setting = {"model": name, "method": args.method, "page_size": page_size}
        write_json(args.json, fragmentation.as_dict(rows, steady_rows, **setting))

    results = fragmentation.measure(
        llm,
        trace,
        budgets=budgets,
        strategies=strategies,
        method=args.method,
        steady_rows=rows,
        steady_steps=steps,
        warm=not args.no_warmup,
        report=lambda line: print(line, flush=True),
        keep=keep,
    )
    if args.plot is not None:
        plots.plot_fragmentation(results[0], args.plot)
    return 0
