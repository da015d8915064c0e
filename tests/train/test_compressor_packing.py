"""Packing of texts, and the batches made of packed rows."""

import copy
import json

import datasets
import numpy as np
import pytest
from compressor_cases import LENGTH, tokens, write_packed

from sparsejax.assets import tiny_model_path
from sparsejax.checkpoint import OutputExistsError, load_tokenizer
from sparsejax.cli import main
from sparsejax.errors import InvalidArgumentError
from train.compressor.data import Batches, Rows
from train.compressor.packing import open_packed, pack
from train.tiny_corpus import main as write_corpus


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_model_path())


def test_documents_lie_end_to_end_with_their_marks(tmp_path, tokenizer):
    texts = ["The otter sleeps.", "A fox.", "", "Rain falls on the roof of the old mill."]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts[:3]) + "\n")
    (tmp_path / "b.txt").write_text(texts[3])
    packed = pack([tmp_path / "a.jsonl", tmp_path / "b.txt"], tmp_path / "out", tokenizer, length=5, progress=False)
    documents = [[tokenizer.bos_token_id, *tokenizer.encode(text), tokenizer.eos_token_id] for text in texts if text]
    stream = [token for document in documents for token in document]
    rows = len(stream) // 5
    np.testing.assert_array_equal(packed.tokens, np.reshape(stream[: rows * 5], (rows, 5)))
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    np.testing.assert_array_equal(packed.starts, starts[starts < rows * 5])
    numbers = np.concatenate([np.full(len(document), index) for index, document in enumerate(documents)])
    for row in range(rows):
        part = numbers[row * 5 : row * 5 + 5]
        np.testing.assert_array_equal(packed.documents(row, 5), part - part[0])
    with pytest.raises(OutputExistsError):
        pack([tmp_path / "b.txt"], tmp_path / "out", tokenizer, length=5, progress=False)


def test_all_sources_are_looked_for_before_the_first_is_read(tmp_path):
    (tmp_path / "a.txt").write_text("The otter sleeps.")
    with pytest.raises(InvalidArgumentError, match=r"typo\.jsonl is no file"):
        pack([tmp_path / "a.txt", tmp_path / "typo.jsonl"], tmp_path / "out", [], length=5, progress=False)


def test_chats_go_through_the_template_and_limits_hold(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "Who sleeps?"}, {"role": "assistant", "content": "The otter."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    packed = pack([tmp_path / "a.jsonl"] * 9, tmp_path / "out", tokenizer, length=4, limit=3, progress=False)
    expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert packed.tokens.shape == (3, 4)
    assert packed.tokens.ravel().tolist()[: len(expected)] == expected[:12]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "a.jsonl:1 is no JSON"),
        ("[" * 100_000, "a.jsonl:1 is no JSON"),
        ('{"messages": [{"role": "user"}]}', "a content (or tool_calls)"),
        ('{"txt": "x"}', "a.jsonl:1 must be an object with a text under 'text'"),
        ("3", "a.jsonl:1"),
        ('{"messages": []}', "a.jsonl:1 must be an object with"),
        ('{"messages": ["hello"]}', "a.jsonl:1 must be an object with"),
        ('{"messages": [{"content": "hello"}]}', "a.jsonl:1 has messages that the chat template refuses"),
        ('{"text": "\\ud800"}', "a.jsonl:1 holds half of a surrogate pair"),
    ],
)
def test_bad_lines_are_named(tmp_path, tokenizer, line, words):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(InvalidArgumentError) as error:
        pack([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, length=4, progress=False)
    assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_text_is_named(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    for name, words in (("a.txt", "a.txt must be UTF-8 text; line 2"), ("a.jsonl", "a.jsonl:2 must be UTF-8 text")):
        with pytest.raises(InvalidArgumentError, match=words):
            pack([tmp_path / name], tmp_path / "out", tokenizer, length=4, progress=False)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = None
    (tmp_path / "b.jsonl").write_text('{"messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(InvalidArgumentError, match=r"b\.jsonl:1 has messages, but the tokenizer has no chat template"):
        pack([tmp_path / "b.jsonl"], tmp_path / "out", tokenizer, length=4, progress=False)
    for limit in (0, -1):
        with pytest.raises(InvalidArgumentError, match=f"limit must be at least 1, got {limit}"):
            pack([tmp_path / "a.txt"], tmp_path / "out", tokenizer, length=4, limit=limit, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"rows": None}, {"dtype": "text"}, {"rows": 10**6}])
def test_a_damaged_folder_is_named(tmp_path, change):
    folder = write_packed(tmp_path / "packed")
    manifest = {**json.loads((folder / "packed.json").read_text()), **change}
    (folder / "packed.json").write_text(json.dumps({name: x for name, x in manifest.items() if x is not None}))
    with pytest.raises(InvalidArgumentError, match=r"packed\.json is no manifest|tokens\.bin does not hold"):
        open_packed(folder)


def test_the_command_packs_the_corpus_of_the_embedded_model(tmp_path, capsys):
    write_corpus([str(tmp_path / "c.jsonl"), "--documents", "3", "--length", "200"])
    assert main(["pack-data", str(tmp_path / "c.jsonl"), str(tmp_path / "out"), "--length", "64", "--no-wrap"]) == 0
    packed = open_packed(tmp_path / "out")
    assert f"{packed.tokens.shape[0]} rows of 64 tokens, 3 documents" in capsys.readouterr().out
    assert packed.tokens[0, 0] == packed.tokens.ravel()[packed.starts[1]] == 1
    assert main(["pack-data", str(tmp_path / "none.jsonl"), str(tmp_path / "two")]) == 1
    assert "none.jsonl is no file" in capsys.readouterr().err


def stream(rows, steps, *, state=None, **options):
    batches = Batches(rows, **{"micro_batches": 1, "batch": 4, "seed": 0, **options})
    if state is not None:
        batches.restore(state)
    found = [next(batches) for _ in range(steps)]
    return found, batches.state()


def test_batches_are_the_same_every_time_and_go_on_where_they_were(tmp_path):
    rows = Rows(write_packed(tmp_path / "packed", rows=10), documents=True)
    whole, _ = stream(rows, 8)
    first, state = stream(rows, 3)
    state = json.loads(json.dumps(state))
    rest, _ = stream(rows, 5, state=state)
    for expected, found in zip(whole, first + rest, strict=True):
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.documents, expected.documents)
    assert whole[0].tokens.shape == (1, 4, LENGTH)
    assert whole[0].tokens.dtype == np.int32
    other, _ = stream(rows, 1, seed=1)
    assert not np.array_equal(other[0].tokens, whole[0].tokens)


def test_a_pass_takes_every_row_once_and_the_next_another_order(tmp_path):
    data = tokens(12, seed=1)
    rows = Rows(write_packed(tmp_path / "packed", rows=12))
    batches, _ = stream(rows, 6, micro_batches=2, batch=2)
    seen = np.concatenate([batch.tokens.reshape(4, -1) for batch in batches])
    for part in (seen[:12], seen[12:]):
        np.testing.assert_array_equal(part[np.lexsort(part.T)], data[np.lexsort(data.T)])
    assert not np.array_equal(seen[:12], seen[12:])


def test_processes_share_the_rows(tmp_path):
    rows = Rows(write_packed(tmp_path / "packed", rows=9))
    shares = [stream(rows, 1, process=process, processes=2)[0][0].tokens.reshape(4, -1) for process in range(2)]
    assert len(np.unique(np.concatenate(shares), axis=0)) == 8
    with pytest.raises(InvalidArgumentError, match=r"A step takes 5 rows of each of 2 processes .* has 4 for each"):
        Batches(rows, micro_batches=1, batch=5, seed=0, process=0, processes=2)


def test_saved_datasets_are_read(tmp_path):
    data = tokens(6)
    saved = datasets.Dataset.from_dict({"input_ids": data.tolist(), "id": list(range(6))})
    saved.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    for name in ("plain", "splits"):
        rows = Rows(tmp_path / name, length=10)
        np.testing.assert_array_equal([rows[index]["tokens"] for index in range(len(rows))], data[:, :10])
    with pytest.raises(InvalidArgumentError, match="does not tell documents apart"):
        Rows(tmp_path / "plain", documents=True)
    with pytest.raises(InvalidArgumentError, match="length must be at most 24"):
        Rows(tmp_path / "plain", length=25)
    ragged = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [1, 2]]})
    ragged.save_to_disk(tmp_path / "ragged")
    with pytest.raises(InvalidArgumentError, match=r"row 1 of .* has 2 tokens, row 0 has 3"):
        Rows(tmp_path / "ragged")[1]
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(tmp_path / "texts")
    with pytest.raises(InvalidArgumentError, match="must have a column input_ids; it has text"):
        Rows(tmp_path / "texts")
    with pytest.raises(InvalidArgumentError, match="There is no data folder"):
        Rows(tmp_path / "nothing")
