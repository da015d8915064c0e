"""Calibration through the engine: what the embedded model loses when less is kept, and what the fit makes of it."""

import json

import numpy as np
import pytest
from embedded import ENGINE, OPTIONS

from sparsejax import LLM, CompressionParams, SamplingParams
from sparsejax.cli import main
from sparsejax.evaluation.calibration import measure_points, params_for, token_nlls
from sparsejax.evaluation.calibration_texts import task_texts
from sparsejax.methods.calibrated_ratio import CalibratedRatio

METHOD, LENGTH, TARGET = "keydiff", 384, 0.9
TASKS = ["multi_key"]
FRACTIONS = (0.05, 0.35, 0.6)


@pytest.fixture(scope="module")
def llm():
    return LLM(methods=("full", METHOD), **ENGINE)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """What the command prints and writes."""
    folder = tmp_path_factory.mktemp("calibration")
    command = ["eval", "calibrate", "--method", METHOD, "--lengths", f"256,{LENGTH}", "--tasks", ",".join(TASKS)]
    command += ["--samples", "3", "--fractions", ",".join(map(str, FRACTIONS)), "--target", str(TARGET)]
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *text, **_: printed.extend(text))
        assert main([*command, "--json", str(folder / "fit.json"), "--plot", str(folder / "fit.png"), *OPTIONS]) == 0
    return folder, "\n".join(printed).splitlines()


def test_tokens_behind_the_context_are_predicted_from_what_was_kept(llm):
    (text,) = task_texts(llm.get_tokenizer(), tasks=TASKS, lengths=[LENGTH], samples=1, seed=3)

    def nlls(tokens, **kept):
        params = CompressionParams(method=METHOD, context_tokens=text.context_tokens, **kept)
        return np.array(token_nlls(llm, [tokens], params)[0])

    dense = np.array(token_nlls(llm, [text.tokens], CompressionParams())[0])
    # The context's own tokens, and the first behind it, do not know that it is compressed.
    seen = text.context_tokens
    np.testing.assert_allclose(nlls(text.tokens, keep_fraction=1.0), dense, atol=1e-4)
    little = nlls(text.tokens, keep_fraction=0.05)
    np.testing.assert_allclose(little[:seen], dense[:seen], atol=1e-4)
    assert np.abs(little[seen:] - dense[seen:]).max() > 0.01
    # They are what decoding finds for its own answer.
    prompt = text.tokens[: -text.answer_tokens]
    compression = CompressionParams(method=METHOD, context_tokens=seen, keep_fraction=0.05)
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=0, ignore_eos=True)
    (output,) = llm.generate(prompt, params, compression, use_tqdm=False)
    (answer,) = output.outputs
    decoded = [-entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
    again = nlls([*prompt, *answer.token_ids], keep_fraction=0.05)
    np.testing.assert_allclose(again[-len(decoded) :], decoded, atol=1e-3)


def test_the_command_measures_and_fits(calibration):
    folder, (head, titles, *rows, summary) = calibration
    assert head.startswith(f"{METHOD}: 6 contexts of ")
    assert titles.split() == ["kept", "quality", "lowest", "predicted"]
    assert [float(row.split()[0].rstrip("%")) / 100 for row in rows] == pytest.approx(FRACTIONS)
    measured = [float(row.split()[1]) for row in rows]
    predicted = [float(row.split()[3]) for row in rows]
    # Keeping more is better: little loses many answers, three fifths none.
    assert measured == sorted(measured)
    assert measured[0] < 0.7
    assert measured[-1] > 0.9
    assert predicted == sorted(predicted)
    ratio = CalibratedRatio.load(folder / "fit.json")
    assert (ratio.method, ratio.least_fraction) == (METHOD, FRACTIONS[0])
    wanted = [ratio.keep_fraction(nll, TARGET) for nll in ratio.nll_range]
    assert f"for a quality of {TARGET} it keeps" in summary
    assert f"({min(wanted):.1%} to {max(wanted):.1%})" in summary
    assert (folder / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_contexts_meet_the_target(llm, calibration):
    ratio = CalibratedRatio.load(calibration[0] / "fit.json")
    texts = task_texts(llm.get_tokenizer(), tasks=TASKS, lengths=[LENGTH], samples=3, seed=77)
    chosen = params_for(llm, ratio, [text.context for text in texts], target=TARGET)
    assert [each.context_tokens for each in chosen] == [text.context_tokens for text in texts]
    assert all(FRACTIONS[0] < each.keep_fraction < 0.9 for each in chosen)
    qualities = [
        measure_points(llm, params, [text], keep_fractions=[params.keep_fraction])[0].quality
        for params, text in zip(chosen, texts, strict=True)
    ]
    assert np.mean(qualities) >= TARGET - 0.05
    # The least that was measured does not meet it.
    worst = measure_points(llm, chosen[0], texts, keep_fractions=[FRACTIONS[0]])
    assert np.mean([point.quality for point in worst]) < TARGET - 0.2


def test_harder_targets_hold_more_memory(calibration, capsys):
    prompt = "The old king met the young queen near the quiet river. " * 16
    kept = []
    for target in ("0.6", "0.95"):
        command = ["generate", prompt, "--calibration", str(calibration[0] / "fit.json"), "--max-tokens", "2", "--json"]
        assert main([*command, "--quality-target", target, *OPTIONS]) == 0
        metrics = json.loads(capsys.readouterr().out)["metrics"]
        assert metrics["num_compressions"] == 1
        kept.append(np.mean(metrics["kept_tokens"]))
    easy, hard = kept
    assert easy < 0.9 * hard
    assert hard < metrics["num_prompt_tokens"]


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["eval", "calibrate", "--help"])
    assert leaving.value.code == 0
    assert "--calibration FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["eval", "calibrate", "--method", "full"], "keeps everything"),
        (["eval", "calibrate", "--method", "nope"], "method must be one of"),
        (["eval", "calibrate", "--target", "95"], "--target"),
        (["eval", "calibrate", "--fractions", "0.5,x"], "--fractions must be in"),
        (["eval", "calibrate", "--tasks", "nope"], "--tasks has no task 'nope'"),
        (["eval", "calibrate", "--tasks", "single", "--file", "x.txt"], "--tasks has no meaning"),
        (["eval", "calibrate", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["generate", "x", "--quality-target", "0.9"], "needs --calibration"),
        (["generate", "x", "--calibration", "/no/such/file"], "cannot be read"),
        (["generate", "x", "--calibration", "fit.json", "--method", "snapkv"], "no meaning with --calibration"),
        (["generate", "x", "--calibration", "fit.json", "--keep-fraction", "0.5"], "no meaning with --calibration"),
    ],
)
def test_command_lines_that_make_no_sense(capsys, command, message):
    assert main(command) == 1
    assert message in capsys.readouterr().err
