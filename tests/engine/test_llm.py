"""The public face on the embedded model: text in, text out."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from checkpoint_stubs import write_config
from embedded import ENGINE, embedded_llm

from sparsejax import LLM, CompressionParams, SamplingParams, SparsejaxError
from sparsejax.assets import tiny_model_path
from sparsejax.checkpoint import CheckpointError, CheckpointNotFoundError
from sparsejax.errors import (
    EmptyPromptError,
    InvalidArgumentError,
    OutOfMemoryError,
    PromptTooLongError,
    UnknownArgumentError,
)
from sparsejax.models import ModelConfig
from sparsejax.models.config import UnsupportedModelError

CONTEXT = "Let fox equal lemon. Let owl equal fox. The secret word of otter is topaz."
QUESTION = f"{CONTEXT}\nQuestion: What is the secret word of otter?"
CONVERSATION = [{"role": "user", "content": QUESTION}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
WILD = SamplingParams(temperature=1.5, seed=3, max_tokens=48, ignore_eos=True)  # parts of characters, odd spaces


@pytest.fixture(scope="module")
def llm():
    return embedded_llm()


@pytest.fixture(scope="module")
def tokenizer(llm):
    return llm.get_tokenizer()


@pytest.fixture(scope="module")
def wild(llm):
    """A random answer to a random prompt, long enough for stop strings and odd characters."""
    return llm.generate("The quiet otter saw ", WILD, use_tqdm=False)[0].outputs[0]


def texts(outputs) -> list[str]:
    return [output.outputs[0].text for output in outputs]


def test_the_default_model_is_the_embedded_one(llm):
    raw = json.loads((tiny_model_path() / "config.json").read_text())
    assert llm.model_config == ModelConfig.from_hf(raw)
    assert llm.engine.runner.eos_token_ids == (raw["eos_token_id"],)


def test_prompts_in_every_form_give_one_answer(llm, tokenizer):
    prompts = ["The secret word of", "Otters live by the river"]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [output.prompt_token_ids for output in outputs] == ids
    assert [tokenizer.decode(o.outputs[0].token_ids, skip_special_tokens=True) for o in outputs] == texts(outputs)
    assert texts(llm.generate(prompts[0], GREEDY, use_tqdm=False)) == texts(outputs)[:1]
    assert texts(llm.generate(ids, GREEDY, use_tqdm=False)) == texts(outputs)
    from_array = llm.generate(np.asarray(ids[1], np.int32), GREEDY, use_tqdm=False)
    assert texts(from_array) == texts(outputs)[1:]
    assert from_array[0].prompt is None
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_chat_answers_through_the_template(llm, tokenizer):
    output = llm.chat(CONVERSATION, GREEDY, use_tqdm=False)[0]
    assert output.outputs[0].text.split() == ["topaz"]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    assert output.outputs[0].token_ids[-1] == tokenizer.eos_token_id
    assert output.prompt == tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert output.prompt_token_ids.count(tokenizer.bos_token_id) == 1, "the template writes it, the tokenizer must not"


def test_several_conversations_and_another_template(llm):
    other = [{"role": "user", "content": QUESTION.replace("topaz", "onyx")}]
    both = llm.chat([CONVERSATION, other], GREEDY, use_tqdm=False)
    assert [text.strip() for text in texts(both)] == ["topaz", "onyx"]
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (plain,) = llm.chat(CONVERSATION, GREEDY, use_tqdm=False, chat_template=template)
    assert plain.prompt == QUESTION


def test_special_tokens_are_shown_on_demand(llm):
    shown = SamplingParams(temperature=0.0, max_tokens=12, skip_special_tokens=False, include_stop_str_in_output=True)
    assert texts(llm.chat(CONVERSATION, shown, use_tqdm=False))[0].split() == ["topaz<|end|>"]


def test_increments_concatenate_to_the_text(llm, wild):
    parts = list(llm.stream("The quiet otter saw ", WILD))
    assert "".join(part.outputs[0].text for part in parts) == wild.text
    assert [token for part in parts for token in part.outputs[0].token_ids] == wild.token_ids
    assert len(parts) > 20
    chat = "".join(part.outputs[0].text for part in llm.stream(CONVERSATION, GREEDY))
    assert chat.strip() == "topaz"


def test_characters_of_several_tokens_come_out_whole(llm, tokenizer):
    wanted = tokenizer("日本 🙂 é", add_special_tokens=False)["input_ids"]
    assert len(wanted) > len("日本 🙂 é")
    increments = dictated(llm, wanted)
    assert "".join(increments) == "日本 🙂 é"
    assert not any("\ufffd" in text for text in increments)
    assert "".join(dictated(llm, wanted[:-1])).endswith("\ufffd"), "what never became a character comes out at the end"


def dictated(llm, tokens) -> list[str]:
    """Streams an answer whose tokens are dictated: what the device samples is replaced before the engine takes it."""
    take, rest = llm.engine._take_token, list(tokens)

    def dictate(request, lane, sample):
        if not request.finished:  # a token in flight of a request before this one is surplus
            sample = replace(sample, token=np.full_like(sample.token, rest.pop(0)))
        take(request, lane, sample)

    llm.engine._take_token = dictate
    try:
        params = SamplingParams(temperature=0.0, max_tokens=len(tokens), ignore_eos=True)
        return [part.outputs[0].text for part in llm.stream("x", params)]
    finally:
        del llm.engine._take_token


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings_cut_the_text(llm, tokenizer, wild, include):
    """A stop string made of the end of one token and the beginning of the next."""
    pieces = [tokenizer.decode([token]) for token in wild.token_ids]
    at = next(i for i in range(5, 40) if all(len(p) > 1 and p.isascii() for p in pieces[i : i + 2]))
    stop = pieces[at][-1] + pieces[at + 1][:1]
    params = SamplingParams(
        temperature=1.5,
        seed=3,
        max_tokens=48,
        ignore_eos=True,
        stop=["never found", stop],
        include_stop_str_in_output=include,
    )
    first = wild.text.index(stop)
    output = llm.generate("The quiet otter saw ", params, use_tqdm=False)[0].outputs[0]
    assert output.text == wild.text[: first + (len(stop) if include else 0)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert output.token_ids == wild.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) < len(wild.token_ids)
    parts = [part.outputs[0].text for part in llm.stream("The quiet otter saw ", params)]
    assert "".join(parts) == output.text, "text that may begin a stop string is held back"


def test_n_answers_and_log_probabilities_carry_text(llm, tokenizer):
    params = SamplingParams(temperature=1.0, seed=11, n=2, max_tokens=6, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    output = llm.generate("The secret word of otter", params, use_tqdm=False)[0]
    assert [answer.index for answer in output.outputs] == [0, 1]
    assert output.outputs[0].text != output.outputs[1].text
    for answer in output.outputs:
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        for token, entry in zip(answer.token_ids, answer.logprobs, strict=True):
            assert {rival: logprob.decoded_token for rival, logprob in entry.items()} == {
                rival: tokenizer.decode([rival]) for rival in entry
            }
            assert 2 <= len(entry) <= 3
            assert entry[token].logprob <= 0
        assert answer.cumulative_logprob == pytest.approx(
            sum(entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs, strict=True))
        )
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert token in entry


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ("", EmptyPromptError, "prompt 0 is empty"),
        (["fine", []], EmptyPromptError, "prompt 1 is empty"),
        (["fine", [2048]], InvalidArgumentError, "prompt 1 has token id 2048.*0 to 2047"),
        (["fine", "otter " * 1200], PromptTooLongError, "^prompt 1 has .*max_model_len=1024"),
        ({"prompt": "x"}, InvalidArgumentError, "text or token ids"),
        (5, InvalidArgumentError, "text or token ids"),
    ],
)
def test_a_bad_batch_harms_no_other_request(llm, wild, prompts, error, words):
    """A stream is under way; a batch with one bad prompt is refused as a whole, and the stream goes on."""
    stream = llm.stream("The quiet otter saw ", WILD)
    parts = [next(stream), next(stream)]
    with pytest.raises(error, match=words):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    parts += stream
    assert "".join(part.outputs[0].text for part in parts) == wild.text
    assert not llm.engine.scheduler.has_unfinished


def test_outputs_are_handed_over_as_they_end(llm):
    lengths, got = [24, 3, 9], []
    params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.generate(
        ["The quiet otter"] * 3, params, use_tqdm=False, on_output=lambda index, output: got.append((index, output))
    )
    assert [index for index, _ in got] == [1, 2, 0]
    assert [outputs[index].outputs for index, _ in got] == [output.outputs for _, output in got]
    assert all(output.finished for _, output in got)

    def interrupt(index, output):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        llm.generate(["The quiet otter"] * 3, params, use_tqdm=False, on_output=interrupt)
    assert not llm.engine.scheduler.has_unfinished
    assert texts(llm.generate("The quiet otter", params[0], use_tqdm=False)) == texts(outputs)[:1]


def test_answers_that_end_together_are_all_handed_over_if_one_is_interrupted(llm):
    got = []

    def interrupt_first(index, output):
        got.append(index)
        if len(got) == 1:
            raise KeyboardInterrupt

    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["The quiet otter"] * 2, params, use_tqdm=False, on_output=interrupt_first)
    assert sorted(got) == [0, 1]
    with pytest.raises(InvalidArgumentError, match="on_output must be a function"):
        llm.generate("The quiet otter", params, on_output=5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OutOfMemoryError("no room")], ids=["interrupt", "memory"])
def test_a_cache_that_cannot_be_rebuilt_leaves_the_one_there_was(llm, monkeypatch, error):
    other = LLM(**ENGINE)
    (expected,) = texts(other.generate("The quiet otter", GREEDY, use_tqdm=False))
    snapkv = CompressionParams(method="snapkv", budget_tokens=64)

    def fail(*args, **options):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(other, "_build", fail)
        for _ in range(2):
            with pytest.raises(error if isinstance(error, type) else type(error)):
                other.generate("The quiet otter", GREEDY, snapkv, use_tqdm=False)
            assert texts(other.generate("The quiet otter", GREEDY, use_tqdm=False)) == [expected]
    assert texts(other.generate("The quiet otter", GREEDY, snapkv, use_tqdm=False)) == [expected]  # it is short


def test_methods_are_named_in_a_list(llm):
    for names in ("snapkv", None, 5):
        with pytest.raises(InvalidArgumentError, match="names must be a list of methods"):
            llm.enable_methods(names)


def test_a_stream_is_checked_before_it_begins(llm):
    with pytest.raises(EmptyPromptError):
        llm.stream("")
    with pytest.raises(InvalidArgumentError, match="one conversation, got 2"):
        llm.stream([CONVERSATION, CONVERSATION])
    with pytest.raises(PromptTooLongError):
        llm.stream([5] * 100_000)
    assert not llm.engine.num_unfinished
    assert (
        "".join(part.outputs[0].text for part in llm.stream([CONVERSATION], GREEDY))
        == texts(llm.chat(CONVERSATION, GREEDY, use_tqdm=False))[0]
    )


def test_a_refused_batch_draws_no_seeds_and_no_choices(llm):
    other = LLM(**ENGINE, methods=("full", "omnikv"))
    choices = [CompressionParams(method="omnikv", full_attention_layers=(0, *more)) for more in _seventeen()]
    before = other.engine.num_added
    with pytest.raises(InvalidArgumentError, match="at most 16 different choices"):
        other.generate(["The quiet otter"] * 17, GREEDY, choices, use_tqdm=False)
    assert other.engine.num_added == before
    other.engine.runner.check(choices[16])


def _seventeen():
    layers = range(1, 6)
    return list(itertools.chain.from_iterable(itertools.combinations(layers, n) for n in (1, 2, 3)))[:17]


def test_a_refused_request_leaves_the_engine_as_it_is(llm):
    engine = llm.engine
    bad = CompressionParams(method="omnikv", full_attention_layers=(0, 99))
    with pytest.raises(InvalidArgumentError, match="full_attention_layers"):
        llm.generate("The quiet otter", GREEDY, bad, use_tqdm=False)
    with pytest.raises(PromptTooLongError):
        llm.generate([[5] * 100_000], GREEDY, CompressionParams(method="snapkv", keep_fraction=0.5), use_tqdm=False)
    bad = CompressionParams(method="pyramidkv", budget_tokens=4096, layer_ratios=(3, 2, 1))  # and nothing to evict
    with pytest.raises(InvalidArgumentError, match=rf"each of the model's {llm.model_config.num_layers} layers, got 3"):
        llm.generate("The quiet otter", GREEDY, bad, use_tqdm=False)
    assert llm.engine is engine


def test_an_answer_that_ends_in_an_interrupted_step_is_handed_over(llm, monkeypatch):
    finish, calls, got = llm.engine.scheduler.finish, [], []

    def interrupted(*work):
        calls.append(work)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finish(*work)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(
                ["The quiet otter", "An owl"], SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True),
                use_tqdm=False, on_output=lambda index, output: got.append((index, output.finished)),
            )  # fmt: skip
    assert got == [(0, True)]
    assert not llm.engine.scheduler.has_unfinished


def test_a_batch_during_a_stream_changes_neither(llm, wild):
    expected = texts(llm.generate("The secret word of", GREEDY, use_tqdm=False))
    stream = llm.stream("The quiet otter saw ", WILD)
    parts = [next(stream)]
    assert texts(llm.generate("The secret word of", GREEDY, use_tqdm=False)) == expected
    parts += stream
    assert "".join(part.outputs[0].text for part in parts) == wild.text


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([[]], "conversation 0 is empty"),
        ([{"role": "user"}], '"role" and "content"'),
        ([CONVERSATION, [{"role": "wizard", "content": "x"}]], "conversation 1.*role must be system"),
    ],
)
def test_bad_conversations_are_named(llm, messages, words):
    with pytest.raises(InvalidArgumentError, match=words):
        llm.chat(messages, GREEDY, use_tqdm=False)


def test_token_ids_need_no_tokenizer(llm, tokenizer):
    silent = LLM(**ENGINE, skip_tokenizer_init=True)
    assert silent.get_tokenizer() is None
    ids = tokenizer("The secret word of")["input_ids"]
    answer = silent.generate(ids, GREEDY, use_tqdm=False)[0].outputs[0]
    assert answer.text == ""
    assert answer.token_ids == llm.generate(ids, GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    with pytest.raises(InvalidArgumentError, match="skip_tokenizer_init"):
        silent.generate("text", GREEDY)
    with pytest.raises(InvalidArgumentError, match="skip_tokenizer_init"):
        silent.chat(CONVERSATION, GREEDY)


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint folder"):
        LLM(tmp_path / "nowhere")
    for nothing in ("", 5):
        with pytest.raises(CheckpointNotFoundError, match="named by a folder or a Hugging Face id"):
            LLM(nothing)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        LLM(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not supported.*llama"):
        LLM(write_config(tmp_path / "mamba", model_type="mamba", architectures=["MambaForCausalLM"]))
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        LLM(write_config(tmp_path / "window", sliding_window=64))
    with pytest.raises(CheckpointError, match="no weights"):
        LLM(write_config(tmp_path / "weightless"), skip_tokenizer_init=True)
    with pytest.raises(UnknownArgumentError, match="Did you mean 'max_model_len'"):
        LLM(max_model_length=3)
    assert issubclass(UnsupportedModelError, SparsejaxError)
    assert issubclass(CheckpointError, SparsejaxError)
