"""Serving a trace with a tiny random model: what is counted adds up, and the command line writes what it measured."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
from tiny_config import RAW

from sparsejax import LLM
from sparsejax.bench import throughput, traces
from sparsejax.bench.compare import compare
from sparsejax.bench.compilations import watch_compilations
from sparsejax.bench.traces import Trace, TraceRequest
from sparsejax.cli import main
from sparsejax.errors import InvalidArgumentError
from sparsejax.models import ModelConfig, init_params

PLOTS = importlib.util.find_spec("matplotlib") is not None
TRACE = Trace(
    "six",
    tuple(TraceRequest(0.03 * i, 5 + 3 * i, answer, seed=i) for i, answer in enumerate((8, 1, 6, 12, 3, 9))),
)


@pytest.fixture(scope="module")
def llm():
    config = ModelConfig.from_hf(RAW)
    return LLM.from_params(
        config,
        init_params(config, jax.random.key(0), jnp.float32),
        max_num_seqs=4,
        max_num_batched_tokens=32,
        page_size=4,
        num_pages=4 * 13,  # 12 columns of 4 tokens: less than four requests need, so that some are preempted
        max_model_len=40,
        warmup="greedy",
    )


@pytest.fixture(scope="module")
def served(llm):
    return throughput.serve(llm, TRACE, use_tqdm=False)


def test_everything_is_served_and_adds_up(llm, served):
    assert served.requests == 6
    assert [record.output_tokens for record in served.records] == [8, 1, 6, 12, 3, 9]
    assert [record.input_tokens for record in served.records] == [5, 8, 11, 14, 17, 20]
    assert served.output_tokens == 39
    assert served.output_rate * served.wall_seconds == pytest.approx(39)
    assert served.total_rate * served.wall_seconds == pytest.approx(39 + 75)
    assert len(served.itls) == 39 - 6
    assert all(gap >= 0 for gap in served.itls)
    assert served.wall_seconds == pytest.approx(max(record.arrival + record.e2e for record in served.records))
    for record in served.records:
        assert 0 < record.ttft <= record.e2e
        between = 0.0 if record.tpot is None else record.tpot * (record.output_tokens - 1)
        assert record.ttft + between == pytest.approx(record.e2e)
    assert sum(served.itls) == pytest.approx(sum(record.e2e - record.ttft for record in served.records))
    assert served.records[1].tpot is None
    assert 0 < served.host_seconds < served.wall_seconds
    assert llm.engine.scheduler.available_entries == llm.engine.scheduler.config.num_free_entries
    assert not llm.engine.has_unfinished


def test_times_between_tokens_are_told_apart_by_whether_a_prefill_was_waited_for(served):
    inside = throughput._in_prefill([0.5, 1.0, 1.5, 2.0, 2.5], [(1.0, 2.0), (1.2, 1.8), (9.0, 9.5)])
    assert inside.tolist() == [False, False, True, True, False]
    whole, *parts = served.itl, served.itl_prefill, served.itl_decode
    assert min(part.mean for part in parts if part) <= whole.mean <= max(part.mean for part in parts if part)


def test_latencies_count_from_arrival(served):
    for record, request in zip(served.records, TRACE.requests, strict=True):
        assert record.arrival == request.arrival
    assert served.wall_seconds > TRACE.requests[-1].arrival


def test_the_timeline_stays_within_limits(served):
    timeline = served.timeline
    assert served.steps == len(timeline.seconds) == len(timeline.pages) == len(timeline.running)
    assert timeline.seconds == sorted(timeline.seconds)
    assert served.max_running == max(timeline.running) <= 4
    assert 0 < served.max_pages <= served.pool_pages == 4 * 12


def test_nothing_is_compiled_while_serving(served):
    assert served.compilations == {}
    assert served.programs_compiled == 0


def test_preemptions_are_counted(llm):
    greedy = traces.uniform(4, 10, 20)
    result = throughput.serve(llm, greedy, use_tqdm=False)
    assert result.preemptions == sum(record.preemptions for record in result.records) > 0
    assert result.output_tokens == greedy.output_tokens


def test_shared_prompts_are_computed_once_and_their_hits_timed_apart(llm):
    shared = [TraceRequest(0.0, 12, 2, seed=i, shared_tokens=8) for i in range(3)]
    result = throughput.serve(llm, Trace("shared", tuple(shared)), use_tqdm=False)
    assert result.cached_tokens >= 2 * 8
    assert [record.cached_tokens >= 8 for record in result.records] == [False, True, True]
    assert result.ttft_hit is not None
    assert "prefix cache" in throughput.format_report(result)


def test_a_request_that_cannot_be_served_is_refused(llm):
    with pytest.raises(InvalidArgumentError, match=r"request 0 .*allow 40 together"):
        throughput.serve(llm, traces.uniform(1, 30, 11), use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match=r"request 0 .*max_model_len"):
        throughput.serve(llm, traces.uniform(1, 41, 1), use_tqdm=False)


def test_what_had_ended_at_an_interrupt_is_told(llm):
    def interrupt_near_the_end(submissions):
        if any(submission.finished for submission in seen) and submissions:
            raise KeyboardInterrupt
        seen.extend(submissions)

    seen: list = []
    result = throughput.serve(llm, TRACE, observe=interrupt_near_the_end, use_tqdm=False)
    assert result.interrupted
    assert 0 < result.requests == len(result.records) < 6
    assert result.output_tokens == sum(record.output_tokens for record in result.records)
    assert "interrupted" in throughput.format_report(result)
    assert not llm.engine.has_unfinished
    assert llm.engine.scheduler.available_entries == llm.engine.scheduler.config.num_free_entries
    with pytest.raises(KeyboardInterrupt):  # there is nothing to tell of
        throughput.serve(llm, TRACE, observe=_interrupt, use_tqdm=False)
    assert not throughput.serve(llm, TRACE, use_tqdm=False).interrupted


def test_a_request_whose_last_token_nobody_looked_at_has_not_ended(llm, monkeypatch):
    step, running, ended = llm.engine.step, [], []

    def interrupted_at_its_end():
        step()
        # An answer of several tokens ends, and another has ended before.
        if ended and any(each.finished and each.num_generated_tokens > 1 for each in running):
            running.clear()
            raise KeyboardInterrupt

    def look(submissions):
        ended.extend(each for each in running if each.finished)
        running[:] = submissions

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", interrupted_at_its_end)
        result = throughput.serve(llm, TRACE, observe=look, use_tqdm=False)
    assert result.interrupted
    asked = {request.input_tokens: request.output_tokens for request in TRACE.requests}
    assert all(record.output_tokens == asked[record.input_tokens] for record in result.records)


def _interrupt(submissions):
    raise KeyboardInterrupt


def test_compiled_programs_are_counted():
    def triple(x):
        return x * 3 + 1

    with watch_compilations() as compiled:
        jax.jit(triple)(jnp.ones(7))
        seen = len(compiled.programs)
    assert sum("triple" in name for name, _ in compiled.programs) == 1
    count, seconds = next(value for name, value in compiled.by_name().items() if "triple" in name)
    assert count == 1
    assert 0 < seconds <= compiled.seconds
    jax.jit(lambda x: x * 5 + 1)(jnp.ones(7))
    assert len(compiled.programs) == seen


def test_distribution():
    value = throughput.Distribution.of([1.0, 2.0, 9.0])
    assert value is not None
    assert (value.mean, value.median) == (4.0, 2.0)
    assert 2.0 < value.p99 <= 9.0
    assert throughput.Distribution.of([]) is None


def test_command_line(tmp_path, capsys):
    config, trace, report, figure = (tmp_path / name for name in ("config.json", "t.jsonl", "a.json", "a.png"))
    config.write_text(json.dumps(RAW))
    options = ["--requests", "6", "--input-len", "9", "--output-len", "4", "--seed", "5"]
    assert main(["bench", "throughput", "--trace", "random", *options, "--write-trace", str(trace)]) == 0
    engine = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16", "--num-pages", "400", "--no-warmup"]
    outputs = ["--json", str(report), *(["--plot", str(figure)] if PLOTS else [])]
    command = ["bench", "throughput", "--trace", str(trace), "--random-weights", str(config), *engine, *outputs]
    assert main([*command[: -len(outputs)], "--json", str(trace)]) == 1
    assert "are the same file" in capsys.readouterr().err
    assert main([*command, "--max-model-len", "8"]) == 1  # before anything is compiled or served
    assert "request 0 of trace" in capsys.readouterr().err
    assert not report.exists()
    assert main(command) == 0
    assert figure.exists() == PLOTS
    data = json.loads(report.read_text())
    drawn = traces.generate("random", requests=6, input_len=9, output_len=4, seed=5)
    assert data["kind"] == "throughput"
    assert data["output_tokens"] == drawn.output_tokens
    assert data["input_tokens"] == drawn.input_tokens
    assert len(data["records"]) == 6
    assert data["compilations"]["decode"] >= 1  # there was no warm-up
    assert f"{drawn.output_tokens} out" in capsys.readouterr().out
    assert all(each.a == each.b for each in compare(report, report).found)
    assert main(["bench", "compare", str(report), str(report)]) == 0
    assert "output_rate" in capsys.readouterr().out


def test_command_line_errors(tmp_path, capsys):
    assert main(["bench", "throughput", "--trace", "mix60"]) == 1
    assert "mix600" in capsys.readouterr().err
    assert main(["bench", "throughput", "--json", str(tmp_path / "missing" / "a.json")]) == 1
    assert "no folder" in capsys.readouterr().err
