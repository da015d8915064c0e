"""Text increments of real tokenizers whose tokens cut through characters, and stop strings cut by tokens."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparsejax.engine.requests.detokenizer import UNFINISHED, Detokenizer, decode_function

CORPUS = ["the quick brown fox jumps over the lazy dog", "stop here and go on there", "naïve café 日本語 日本"] * 5
TEXTS = [
    "👩‍👩‍👧‍👦 family",
    "日本語のテキスト、混ぜて",
    "e\u0301a\u0308 combining \u1100\u1161\u11a8",
    "plain text",
    "🙂🙃 ok",
    "a\ufffdb",
]
SPECIAL = "<|end|>"


@functools.cache
def byte_level() -> Tokenizer:
    """A byte-level BPE: characters outside its small corpus take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """Llama-2's kind: words begin with a mark, the first space is dropped, unknown characters become byte tokens."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def decoder(tokenizer: Tokenizer | None = None, *, skip: bool = True):
    return decode_function(tokenizer or byte_level(), skip_special_tokens=skip)


def feed(ids, *, take=None, **options) -> tuple[list[str], Detokenizer]:
    """Increments of feeding ids one by one, asking for text where `take` says so (default: always), and the end's."""
    detokenizer = Detokenizer(options.pop("decode", decoder()), options.pop("prompt", ()), **options)
    increments = []
    for i, token in enumerate(ids):
        stopped = detokenizer.add(token)
        if take is None or take[i % len(take)]:
            increments.append(detokenizer.take())
        if stopped is not None:
            break
    detokenizer.finish()
    increments.append(detokenizer.take())
    assert "".join(increments) == detokenizer.text
    return increments, detokenizer


TEXT = st.one_of(st.sampled_from(TEXTS), st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
TAKE = st.lists(st.booleans(), min_size=1, max_size=5)
MAKE = st.sampled_from([byte_level, byte_fallback])


@settings(max_examples=150, deadline=None)
@given(TEXT, TAKE)
def test_increments_join_to_the_text(text, take):
    ids = byte_level().encode(text).ids
    increments, _ = feed(ids, take=take)
    assert "".join(increments) == decoder()(ids) == text
    if UNFINISHED not in text:
        assert all(UNFINISHED not in increment for increment in increments), "half a character never comes out"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 329), max_size=25), TAKE)
def test_any_tokens_join_to_the_full_decode(ids, take):
    increments, _ = feed(ids, take=take)
    assert "".join(increments) == decoder()(ids), "bytes that never become a character included"


def test_characters_really_are_cut_by_tokens():
    ids = byte_level().encode("🙂").ids
    assert len(ids) > 1
    increments, _ = feed(ids)
    assert increments == [""] * (len(ids) - 1) + ["🙂", ""]


def test_half_a_character_at_the_end_comes_out_as_a_replacement():
    ids = byte_level().encode("ok🙂").ids[:-1]
    increments, _ = feed(ids)
    assert "".join(increments) == "ok" + UNFINISHED
    assert "".join(increments[:-1]) == "ok"


@settings(max_examples=200, deadline=None)
@given(
    st.text("abc é日🙂 ", min_size=1, max_size=25),
    st.integers(0, 25),
    st.sampled_from([byte_level, byte_fallback]),
    TAKE,
)
def test_the_answer_continues_the_prompt(text, cut, make, take):
    tokenizer = make()
    decode = decoder(tokenizer)
    text = text.strip(" ") or "a"
    ids = tokenizer.encode(text).ids
    prompt, answer = ids[:cut], ids[cut:]
    known = decode(prompt)
    if known.endswith(UNFINISHED):  # cut inside a character: the answer stands on its own
        assert feed(answer, prompt=prompt, decode=decode, take=take)[1].text == feed(answer, decode=decode)[1].text
    else:
        assert known + feed(answer, prompt=prompt, decode=decode, take=take)[1].text == decode(ids)


BYTES = st.lists(st.sampled_from([*"🙂é日a ".encode(), 0xF0, 0x99]) | st.integers(0, 255), max_size=20)


@settings(max_examples=300, deadline=None)
@given(BYTES, st.booleans(), TAKE, TAKE)
def test_text_does_not_depend_on_when_it_is_asked_for(values, words_between, one, other):
    """Byte fallback: a byte that is none of a character makes a whole run unreadable."""
    tokenizer = byte_fallback()
    word = tokenizer.token_to_id("a")
    ids = [i for n, value in enumerate(values) for i in (1 + value, *([word] if words_between and n % 5 == 4 else []))]
    decode = decoder(tokenizer)
    prompt = tokenizer.encode("ab🙂").ids
    texts = {
        feed(ids, take=take, prompt=prompt, decode=decode, stop=stop)[1].text
        for take in (None, one, other, [False])
        for stop in ((), ("never there",))
    }
    assert len(texts) == 1
    (text,) = texts
    if UNFINISHED not in decode(ids):
        assert decode(prompt) + text == decode([*prompt, *ids])


def test_characters_that_are_out_are_not_made_up_again():
    tokenizer = byte_fallback()
    decode = decoder(tokenizer)
    smiley, word = [1 + value for value in "🙂".encode()], tokenizer.encode("b").ids
    assert decode([*smiley, *smiley[:1]]) == UNFINISHED * 5
    for take in (None, [False]):
        assert feed([*smiley, *smiley[:1], *word], take=take, decode=decode)[1].text == f"🙂{UNFINISHED} b"
        assert feed([*smiley[:1], *word], take=take, prompt=smiley, decode=decode)[1].text == f"{UNFINISHED} b"
        assert feed(smiley[:1] * 5 + smiley, take=take, decode=decode)[1].text == UNFINISHED * 5 + "🙂"


def test_a_context_that_begins_inside_a_character_is_widened():
    tokenizer = byte_fallback()
    ids = tokenizer.encode("ab🙂🙂 c").ids
    cut = len(ids) - 2
    assert decoder(tokenizer)(ids[cut - 6 : cut]).endswith(UNFINISHED)
    assert feed(ids[cut:], prompt=ids[:cut], decode=decoder(tokenizer))[1].text == " c"


def test_a_space_before_the_answer_is_kept():
    tokenizer = byte_fallback()
    ids = tokenizer.encode("ab cd").ids
    _, detokenizer = feed(ids[3:], prompt=ids[:3], decode=decoder(tokenizer))
    assert detokenizer.text == " cd"
    assert decoder(tokenizer)(ids[3:]) == "cd", "decoded on its own it would be lost"


def test_special_tokens_are_skipped_or_kept():
    end = byte_level().token_to_id(SPECIAL)
    ids = [*byte_level().encode("go").ids, end, *byte_level().encode(" on").ids, end]
    assert feed(ids)[1].text == "go on"
    assert feed(ids, decode=decoder(skip=False))[1].text == f"go{SPECIAL} on{SPECIAL}"
    marks = byte_fallback()
    marks.add_special_tokens([SPECIAL])
    ids = [*marks.encode("ab").ids, marks.token_to_id(SPECIAL), *marks.encode("cd").ids]
    assert feed(ids, decode=decoder(marks))[1].text == decoder(marks)(ids) == "ab cd", "a silent token eats no space"


def test_transformers_tokenizers_decode_alike():
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token=SPECIAL)
    ids = wrapped("wait , what ' s that ?").input_ids
    decode = decode_function(wrapped, skip_special_tokens=True)
    assert decode(ids) == decoder()(ids) == "wait , what ' s that ?", "no clean-up of spaces"
    assert decode([*ids, wrapped.eos_token_id]) == decode(ids)


def first_stop(text: str, stops) -> tuple[int, int, str] | None:
    """(end, start, string) of the stop string that is complete first, reading character by character."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return min(found, default=None)


STOPS = st.lists(st.text("ab 日🙂", min_size=1, max_size=4), min_size=1, max_size=3, unique=True)


@settings(max_examples=300, deadline=None)
@given(st.text("ab 日🙂", max_size=30), STOPS, st.booleans(), TAKE)
def test_stop_strings_cut_the_text_whatever_the_tokens(text, stops, include, take):
    ids = byte_level().encode(text).ids
    increments, detokenizer = feed(ids, stop=stops, include_stop=include, take=take)
    expected = first_stop(text, stops)
    assert detokenizer.stop_string == (expected and expected[2])
    cut = text if expected is None else text[: expected[0] if include else expected[1]]
    assert "".join(increments) == cut, "and what came out was never taken back"


def test_a_stop_string_over_several_tokens_is_found_at_its_last():
    text = "quick brown"
    ids = byte_level().encode(text).ids
    detokenizer = Detokenizer(decoder(), stop=["k br"])
    found, shown = [], ""
    for token in ids:
        found.append(detokenizer.add(token))
        shown += detokenizer.take()
        if found[-1]:
            break
    assert found[:-1] == [None] * (len(found) - 1)
    assert found[-1] == "k br"
    assert len(found) > 1
    assert shown == detokenizer.text == "quic"


def test_only_what_may_begin_a_stop_string_is_held_back():
    detokenizer = Detokenizer(decoder(), stop=["##end"])
    shown = []
    for piece in ["a#", "b", "##", "#", "e", "x"]:
        for token in byte_level().encode(piece).ids:
            detokenizer.add(token)
        shown.append(detokenizer.take())
    assert shown == ["a", "#b", "", "#", "", "##ex"]


def test_min_tokens_hold_off_stop_strings():
    ids = byte_level().encode("xyxyxy").ids
    text = [decoder()([token]) for token in ids]
    for minimum in range(len(ids)):
        _, detokenizer = feed(ids, stop=["y"], min_tokens=minimum)
        before = len("".join(text[:minimum]))
        assert detokenizer.text == "xyxyxy"[: "xyxyxy".index("y", before)]


def test_without_stop_strings_nothing_is_decoded_until_asked():
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return decoder()(ids)

    detokenizer = Detokenizer(decode, [5, 6])
    calls.clear()
    for token in byte_level().encode("the quick brown fox").ids:
        detokenizer.add(token)
    assert calls == []
    assert detokenizer.text == "the quick brown fox"


def test_the_window_stays_short():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decoder()(ids)

    ids = byte_level().encode("the quick 🙂 fox 日本語 " * 20).ids
    feed(ids, decode=decode)
    assert longest < 20
