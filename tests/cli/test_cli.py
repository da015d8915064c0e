"""The command line: every command explains itself, does its work, and fails with a paragraph."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from checkpoint_stubs import write_config
from embedded import OPTIONS

import pallas_kernels
from sparsejax import methods
from sparsejax.assets import tiny_model_path
from sparsejax.bench import kernels
from sparsejax.bench.presets import PRESETS
from sparsejax.checkpoint import load_model
from sparsejax.cli import COMMANDS, bench, bench_options, doctor, kernel_checks, kernel_checks_sparse, main, options
from sparsejax.cli.outputs import check_outputs
from sparsejax.errors import InvalidArgumentError
from sparsejax.evaluation import TASKS
from sparsejax.methods import available_rules

HELPS = [
    ([], "sparsejax demo"),
    (["generate"], "--max-tokens"),
    (["chat"], "/clear"),
    (["convert"], "--to-hf"),
    (["pack-data"], "--no-wrap"),
    (["train-compressor"], "--kv-compressed-size"),
    (["methods"], "--json"),
    (["calibrate"], "--top-tokens"),
    (["eval"], "ruler"),
    (["eval", "ruler"], "before the question is seen"),
    (["bench"], "latency"),
    (["bench", "latency"], "--shapes"),
    (["bench", "latency"], "--budget-tokens"),
    (["bench", "fragmentation"], "--strategies"),
    (["bench", "checkpoint"], "--folder"),
    (["demo"], "--length"),
    (["doctor"], "Exit code 1"),
]


@pytest.mark.parametrize(("command", "teaches"), HELPS, ids=[" ".join(["sparsejax", *command]) for command, _ in HELPS])
def test_help_explains(capsys, command, teaches):
    with pytest.raises(SystemExit) as leaving:
        main([*command, "--help"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    assert teaches in text
    assert "usage: sparsejax" in text


def test_every_command_has_a_help(capsys):
    assert len(COMMANDS) == len({command[0] for command, _ in HELPS if command})
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out.startswith("sparsejax ")


def test_help_does_not_wait_for_jax():
    code = "import sys, sparsejax.cli as cli; cli.build_parser(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_generate_prints_text(capsys):
    assert main(["generate", "The secret word of", "--max-tokens", "6", *OPTIONS]) == 0
    alone = capsys.readouterr().out
    assert alone.strip()
    assert main(["generate", "The secret word of", "--max-tokens", "6", "--json", *OPTIONS]) == 0
    output = json.loads(capsys.readouterr().out)
    assert output["prompt"] == "The secret word of"
    assert output["outputs"][0]["text"] == alone[:-1]
    assert output["metrics"]["num_generated_tokens"] == len(output["outputs"][0]["token_ids"])


def test_generate_reads_files_and_standard_input(capsys, monkeypatch, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("An otter\n\nA fox\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("A cat"))
    assert main(["generate", "-", "--file", str(prompts), "--max-tokens", "2", *OPTIONS]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("---")]
    assert headings == ["--- 'A cat'", "--- 'An otter'", "--- 'A fox'"]


def test_generate_prints_in_order_and_keeps_what_it_has_when_interrupted(capsys, monkeypatch):
    def output(name):
        completion = SimpleNamespace(index=0, text=f"about {name}")
        metrics = SimpleNamespace(kv_bytes_before_compression=0)
        return SimpleNamespace(prompt=name, outputs=[completion], metrics=metrics)

    class Interrupted:
        def generate(self, prompts, *args, use_tqdm, on_output):
            for index in (1, 0, 3):
                on_output(index, output(prompts[index]))
                printed.append(capsys.readouterr().out)
            raise KeyboardInterrupt

    printed: list[str] = []
    monkeypatch.setattr("sparsejax.cli.options.make_llm", lambda *args, **options: Interrupted())
    assert main(["generate", "A cat", "An otter", "A fox", "An owl"]) == 130
    assert printed == ["", "--- 'A cat'\nabout A cat\n--- 'An otter'\nabout An otter\n", ""]
    captured = capsys.readouterr()
    assert captured.out == "--- 'An owl'\nabout An owl\n"
    assert captured.err.endswith("interrupted\n")


def test_chat_talks_until_the_input_ends(capsys, monkeypatch):
    turns = [
        "The secret word of otter is topaz. Which is it? Question: What is the secret word of otter?",
        "/help",
        "otter " * 1200,
        "/clear",
        "The secret word of otter is onyx.  Which is it? Question: What is the secret word of otter?",
        "/exit",
        "never read",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(turns) + "\n"))
    assert main(["chat", "--max-tokens", "8", *OPTIONS]) == 1, "a turn was not answered, and nobody watches"
    printed = capsys.readouterr()
    answers = printed.out.splitlines()
    assert answers[0].split() == ["topaz"]
    assert answers[1].startswith("/clear")
    assert answers[2].split() == ["onyx"]
    assert len(answers) == 3
    assert printed.err.count("error:") == 1, "a turn that is too long is reported, and the conversation goes on"
    assert "max_model_len=1024" in printed.err


@pytest.mark.parametrize("interactive", [True, False])
def test_an_interrupt_stops_the_answer_and_not_the_conversation(capsys, monkeypatch, interactive):
    asked = []

    class Talker:
        def stream(self, messages, *params):
            asked.append([message["content"] for message in messages])
            yield SimpleNamespace(outputs=[SimpleNamespace(text="well, ")])
            if len(asked) == 1:
                raise KeyboardInterrupt
            yield SimpleNamespace(outputs=[SimpleNamespace(text="yes")])

    monkeypatch.setattr("sparsejax.cli.options.make_llm", lambda *args, **options: Talker())
    stdin = io.StringIO("Why?\nReally?\n")
    monkeypatch.setattr(stdin, "isatty", lambda: interactive)
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["chat"]) == (0 if interactive else 130)
    printed = capsys.readouterr()
    if interactive:
        assert asked == [["Why?"], ["Why?", "well, ", "Really?"]]
        assert printed.out.endswith("well, yes\n> ")
    else:
        assert asked == [["Why?"]]
        assert printed.err.endswith("interrupted\n")


def test_convert_there_and_back(capsys, tmp_path):
    there, back = tmp_path / "orbax", tmp_path / "huggingface"
    assert main(["convert", str(tiny_model_path()), str(there), "--no-progress"]) == 0
    assert main(["convert", "--to-hf", str(there), str(back), "--no-progress"]) == 0
    assert f"wrote {there}" in capsys.readouterr().out
    original = (tiny_model_path() / "model.safetensors").read_bytes()
    assert (back / "model.safetensors").stat().st_size == pytest.approx(len(original), rel=1e-3)
    assert load_model(there)[0] == load_model(back)[0] == load_model(tiny_model_path())[0]
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (back / file).read_bytes() == (tiny_model_path() / file).read_bytes()
    assert main(["convert", str(tiny_model_path()), str(there), "--no-progress"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_eval_scores_the_embedded_model(capsys, tmp_path):
    scores = tmp_path / "scores.json"
    command = ["eval", "ruler", "--lengths", "256", "--tasks", "single,multi_key", "--samples", "2"]
    assert main([*command, "--json", str(scores), *OPTIONS]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["task", "single", "multi_key", "mean"]
    rows = json.loads(scores.read_text())
    assert [(row["task"], row["length"], row["samples"]) for row in rows] == [("single", 256, 2), ("multi_key", 256, 2)]
    assert all(row["score"] == 1.0 for row in rows)


def test_an_interrupted_eval_keeps_the_scores_it_has(capsys, monkeypatch, tmp_path):
    scores, calls = tmp_path / "scores.json", []

    def answering(llm, compression):
        def answer(prompts):
            calls.append(len(prompts))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return [[] for _ in prompts]

        return answer

    monkeypatch.setattr("sparsejax.cli.evaluate.answering", answering)
    command = ["eval", "ruler", "--lengths", "256", "--tasks", "single,multi_key", "--samples", "16"]
    assert main([*command, "--json", str(scores), *OPTIONS]) == 130
    assert calls == [16, 16], "a task each"
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["task", "256"], ["single", "0.0"], ["mean", "0.0"],
    ]  # fmt: skip
    rows = json.loads(scores.read_text())
    assert [(row["task"], row["samples"], row["score"]) for row in rows] == [("single", 16, 0.0)]


def test_generate_tells_what_compression_freed(capsys):
    prompt = "The secret word of otter is topaz. " * 20
    command = ["generate", prompt, "--max-tokens", "2", "--method", "keydiff", *OPTIONS]
    assert main([*command, "--budget-tokens", "32", "--recent-tokens", "4", "--compress-once"]) == 0
    found = re.search(r"compressed: (.*) MiB -> (.*) MiB \((.*) % kept\)", capsys.readouterr().err)
    assert found is not None
    before, after, kept = map(float, found.groups())
    assert 0 < after < before / 3
    assert kept == pytest.approx(100 * after / before, rel=0.05)


def test_methods_are_listed_and_explained(capsys):
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines() if " - " in line] == list(methods.available())
    assert "arXiv:2404.14469" in listed
    assert main(["methods", "snapkv"]) == 0
    explained = capsys.readouterr().out
    assert "pooling='max', kernel_size=None" in explained
    assert "kernel_size: odd, tokens that are pooled over" in explained
    assert main(["methods", "--json"]) == 0
    facts = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert facts["h2o"]["options"] == {"scope": "head", "recent_ratio": 0.5, "prefill_window": None}
    assert all(facts[name]["saves"] and facts[name]["summary"] for name in methods.available())


def test_eval_compares_methods_with_dense(capsys, tmp_path):
    scores, plot = tmp_path / "scores.json", tmp_path / "plot.png"
    command = ["eval", "ruler", "--lengths", "256", "--tasks", "single", "--samples", "2", *OPTIONS]
    command += ["--methods", "keydiff", "--budgets", "1.0,32", "--mode", "agnostic", "--recent-tokens", "4"]
    assert main([*command, "--option", "keydiff.sink_tokens=2", "--json", str(scores), "--plot", str(plot)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("query-agnostic")
    assert [line.split()[:2] for line in table[2:]] == [["full", "-"], ["keydiff", "100%"], ["keydiff", "32"]]
    dense, whole, some = json.loads(scores.read_text())
    assert dense["score"] == whole["score"] == 1.0
    assert whole["kept"] == 1.0
    # One page of each head.
    assert some["kv_bytes"] == dense["kv_bytes"] / 8
    assert plot.stat().st_size > 1000


def test_help_lists_the_names_there_are():
    assert options.TASKS.split(", ") == list(TASKS)
    assert sorted(options.BUDGET_RULES.split(", ")) == sorted(available_rules())
    assert tuple(PRESETS) == bench_options.RANDOM_MODELS
    assert all(kernel in bench.TUNE for kernel in kernels._CANDIDATES)


def test_the_doctors_linear_layers_are_right_in_the_dtype_of_a_gpu(monkeypatch):
    """Of XLA, too, which a GPU that is no Hopper takes: results are small enough for the tolerance."""
    monkeypatch.setattr(kernel_checks, "_dtype", lambda: jnp.dtype(jnp.bfloat16))
    for name in ("gated product", "product and residual"):
        assert 0 < kernel_checks.CHECKS[name]() < doctor.TOLERANCE / 2


def test_doctor_finds_every_kernel_in_order(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    checks = kernel_checks.CHECKS | kernel_checks_sparse.CHECKS
    assert [line[3:31].strip() for line in lines if "largest error" in line] == list(checks)
    # Every operation that has a reference is among them.
    sources = [inspect.getsource(module) for module in (kernel_checks, kernel_checks_sparse)]
    for name in pallas_kernels.__all__:
        assert not name.endswith("_reference") or any(f"kernels.{name}(" in source for source in sources)
    assert not any(line.startswith("!!") for line in lines)
    assert any("device 0" in line for line in lines)


def test_demo_answers_and_tells_its_times(capsys):
    assert main(["demo", "--length", "256", *OPTIONS]) == 0
    printed = capsys.readouterr()
    assert "compiling: 100%" in printed.err
    assert "generating: 100%" in printed.err
    assert printed.out.count("Answer:") == len(TASKS)
    assert printed.out.count("(right)") >= len(TASKS) - 1
    table = printed.out.splitlines()[-len(TASKS) - 2 :]
    assert [cell.strip() for cell in table[0].split("  ") if cell] == [
        "request",
        "prompt tokens",
        "generated",
        "first token s",
        "tokens/s",
        "KV MiB",
    ]
    assert [line.split()[0] for line in table[2:]] == list(TASKS)
    assert all(200 < int(line.split()[1]) <= 256 and float(line.split()[3]) > 0 for line in table[2:])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["generate"], "no prompt was given"),
        (["generate", "", *OPTIONS], "prompt 0 is empty"),
        (["generate", "x", "--model", "/no/such/folder"], "no checkpoint folder /no/such/folder"),
        (["generate", "x", "--file", "/no/such/file"], "cannot be read"),
        (
            ["generate", "x", "--file", str(tiny_model_path() / "model.safetensors")],
            "must be UTF-8 text; line 1 is not",
        ),
        (["generate", "x", "--top-p", "2", *OPTIONS], "top_p must be"),
        (["generate", "x", "--page-size", "3"], "page_size must be a power of two"),
        (["generate", "x", "--max-model-len", "99999"], "max_model_len must be at most 8192"),
        (["generate", "x", "--num-pages", "5"], "KV cache would have 5 pages"),
        (["convert", "/no/such/folder", "out"], "no checkpoint folder"),
        (["eval", "ruler", "--tasks", "sing"], "no task 'sing'; there are single"),
        (["eval", "ruler", "--lengths", "1k"], "whole numbers"),
        (
            ["eval", "ruler", "--lengths", "256,2048", "--max-model-len", "1024"],
            "--lengths has 2048, more than --max-m",
        ),
        (["eval", "ruler", "--lengths", "256,9000"], "at most 8192, what this model's positions reach; got 9000"),
        (["eval", "ruler", "--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["eval", "ruler", "--json", "."], "cannot be written: it is a folder"),
        (
            ["eval", "ruler", "--methods", "snapkv", "--plot", "x.foo"],
            r"must end in a kind of figure: one of .*\.png",
        ),
        (["eval", "calibrate", "--json", "."], "cannot be written: it is a folder"),
        (["calibrate", "--plot", "x"], "must end in a kind of figure"),
        (["calibrate", "--count", "99"], "--count must be a whole number from 1 to"),
        (["calibrate", "--sink-tokens", "-1"], "--sink-tokens must be a whole number of at least 0"),
        (["bench", "throughput", "--trace", "random", "--spread", "nan"], "spread must be at least 0"),
        (["bench", "throughput", "--trace", "random", "--seed", "-1"], "seed must be a whole number of at least 0"),
        (["bench", "kernels", "--json", "/"], "cannot be written: it is a folder"),
        (["demo", "--length", "99999"], "--length must be at most [0-9]+, so that 8192 tokens"),
        (["generate", "x", "--method", "snapkv", "--option", "keep_fraction=0.2"], "use --keep-fraction"),
        (
            ["generate", "x", "--method", "snapkv", "--option", "pooling=avg", "--option", "pooling=max"],
            "pooling twice",
        ),
        (["bench", "throughput", "--trace", "4x16x4", "--requests", "7"], "--requests is for the traces"),
        (["bench", "throughput", "--trace", "4x16x4,4x16x4", "--json", "x.json"], "'4x16x4' twice"),
        (["bench", "latency", "--shapes", "4x64", "--max-num-seqs", "1"], "--max-num-seqs must be at least the batch"),
        (
            [
                "bench",
                "latency",
                "--shapes",
                "1x64",
                "--method",
                "snapkv",
                "--budget-tokens",
                "32",
                "--compare-dense",
                "-4",
            ],
            "--compare-dense must be at least 1 token",
        ),
        (["bench", "fragmentation", "--requests", "0"], "--requests must be at least 1"),
        (["eval", "ruler", "--methods", "snapkv", "--budgets", ""], "--budgets must be fractions"),
        (
            ["eval", "ruler", "--methods", "snapkv", "--option", "snapkv.keep_fraction=0.3"],
            "cannot be given keep_fraction: the sweep sets it",
        ),
        (["eval", "ruler", "--lengths", "16", *OPTIONS], "length is too short, by [0-9]+ tokens"),
        (["eval", "ruler", "--methods", "snap"], "--methods has no method 'snap'; there are full"),
        (["eval", "ruler", "--methods", "snapkv", "--budgets", "2.5"], "--budgets must be fractions"),
        (["eval", "ruler", "--methods", "snapkv", "--budgets", "16"], "'snapkv' at budget 16: window_tokens"),
        (
            ["eval", "ruler", "--methods", "snapkv", "--option", "pooling=avg"],
            "must look like METHOD.NAME=VALUE",
        ),
        (["eval", "ruler", "--methods", "full", "--plot", "x.png"], "--plot needs a method beside full"),
        (["eval", "ruler", "--plot", "x.png"], "--plot needs --methods"),
        (["generate", "x", "--method", "snapkv"], "needs exactly one of budget_tokens"),
        (["generate", "x", "--method", "snapvk", "--keep-fraction", "0.5"], "Did you mean 'snapkv'"),
        (["generate", "x", "--keep-fraction", "0.5"], "'full' keeps everything; it takes no keep_fraction"),
        (["generate", "x", "--compressor", "/nope"], "--compressor is for --method deltakv; the method is full"),
        (["chat", "--latent-dtype", "int4"], "--latent-dtype is for --method deltakv"),
        (["generate", "x", "--option", "pooling"], "--option must look like NAME=VALUE"),
        (["methods", "snap"], "method must be one of 'full'"),
        (["demo", "--length", "16", *OPTIONS], "length is too short"),
        (["demo", "--length", "2000", *OPTIONS], "--length must be at most 1008"),
        (["bench", "latency", "--shapes", "1024"], "--shapes"),
        (["bench", "latency", "--shapes", "1x"], "1x1024,8x32768 .*got '1x'"),
        (["bench", "latency", "--random-weights", "llama-3.1-8b", "--model", "m"], "no meaning with --model"),
        (["bench", "startup", "--random-weights", "llama-9"], "neither a file nor a known model"),
        (["bench", "compare", "/no/such/file", "x"], "/no/such/file cannot be read"),
        (["eval", "ruler", "--methods", "snapkv", "--json", "x.png", "--plot", "x.png"], "are the same file, x.png"),
        (["eval", "ruler", "--json", "/proc/x.json"], "--json /proc/x.json cannot be written"),
        (["eval", "ruler", "--budgets", "0.25"], "--budgets needs --methods"),
        (["eval", "ruler", "--compressor", "x"], "--compressor needs --methods"),
        (
            ["eval", "ruler", "--methods", "keydiff", "--latent-dtype", "int4"],
            "--latent-dtype needs a method that stores",
        ),
        (["eval", "ruler", "--methods", "omnikv", "--full-attention-layers", "0"], "needs a method that stores"),
        (["eval", "ruler", "--methods", "quest", "--window-tokens", "8"], "--window-tokens needs a method that evicts"),
        (["eval", "ruler", "--methods", "full", "--sink-tokens", "8"], "needs a method that evicts or selects"),
        (["eval", "ruler", "--methods", "full", "--budgets", "0.25"], "--budgets needs a method beside full"),
        (["eval", "ruler", "--methods", "omnikv", "--mode", "aware"], "--mode needs a method that evicts"),
        (["bench", "latency", "--prefills", "3"], "--prefills is for"),
        (["bench", "latency", "--method", "snapkv", "--keep-fraction", "0.5", "--prefills", "0"], "at least 1"),
        (["bench", "kernels", "--tune", "decode_work", "--json", "x.json"], "no meaning with --tune"),
        (["bench", "throughput", "--trace", "mix600,random"], "stands alone"),
        (["eval", "calibrate", "--fractions", "1.0"], "--fractions must have one below 1"),
        (["eval", "calibrate", "--answer-tokens", "0"], "--answer-tokens must be a whole number of at least 1"),
        (["eval", "calibrate", "--answer-tokens", "8"], "no meaning with tasks"),
        (["eval", "calibrate", "--file", "x.txt", "--seed", "1"], "--seed has no meaning with --file"),
        (["eval", "calibrate", "--file", "x.jsonl", "--samples", "2"], "--samples has no meaning with a .jsonl"),
        (["calibrate", "--data", "x.jsonl", "--lengths", "64"], "--lengths has no meaning with a .jsonl"),
        (["calibrate", "--data", "x.txt", "--seed", "1"], "--seed has no meaning with --data"),
    ],
)
def test_errors_are_one_paragraph(capsys, command, words):
    assert main(command) == 1
    printed = capsys.readouterr()
    paragraph = printed.err.strip().splitlines()[-1]
    assert paragraph.startswith(f"sparsejax {command[0]}: ")
    assert "Traceback" not in printed.err
    assert re.search(words, paragraph), paragraph


def test_checking_outputs_leaves_them_alone(tmp_path):
    kept, new = tmp_path / "kept.json", tmp_path / "new.png"
    kept.write_text("old")
    check_outputs(argparse.Namespace(json=kept, plot=new, data=tmp_path / "other.json"))
    assert kept.read_text() == "old"
    assert not new.exists()
    with pytest.raises(InvalidArgumentError, match="--json and --data are the same file"):
        check_outputs(argparse.Namespace(json=kept, plot=None, data=tmp_path / "x" / ".." / "kept.json"))
    with pytest.raises(InvalidArgumentError, match="--write-trace and --random-weights are the same file"):
        check_outputs(argparse.Namespace(write_trace=kept, random_weights=str(kept)))
    with pytest.raises(InvalidArgumentError, match="--json and --trace are the same file"):
        check_outputs(argparse.Namespace(json=kept, trace=f"mix600,{kept}"))
    check_outputs(argparse.Namespace(json=kept, method=str(kept)))  # which is no file's name
    assert kept.read_text() == "old"


@pytest.mark.parametrize("text", ['{"a":1', "[1, 2]", b"\xff"])
def test_a_broken_config_is_one_paragraph(capsys, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["bench", "latency", "--random-weights", str(path)]) == 1
    assert re.search(r"^sparsejax bench: .*config\.json (cannot be read as JSON|must hold)", capsys.readouterr().err)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels run on a GPU")
def test_kernels_without_a_gpu_are_refused_at_once(capsys):
    assert main(["generate", "x", "--implementation", "triton", *OPTIONS]) == 1
    assert 'implementation="triton" needs an NVIDIA GPU' in capsys.readouterr().err


def test_an_unsupported_model_is_one_paragraph(capsys, tmp_path):
    folder = write_config(tmp_path / "model", model_type="mamba")
    for command in (["generate", "x", "--model"], ["convert"]):
        assert main([*command, str(folder), *([str(tmp_path / "out")] if command == ["convert"] else [])]) == 1
        assert "'mamba' is not supported. Supported: llama" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
