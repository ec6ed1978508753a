"""Files to windows: packing, chats, the order of steps, and what is refused."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from tiny import tiny_folder

from edgekit.errors import UserError
from edgekit.heal.data import Document, Encoder, load, pack, rows_of_step, split
from edgekit.model.sources import open_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return open_path(tiny_folder(tmp_path_factory.mktemp("data") / "m"))


def test_nothing_is_lost_and_documents_are_separated():
    documents = [Document(np.arange(n, dtype=np.int32) + 10, np.ones(n, np.bool_)) for n in (5, 9, 4)]
    corpus = pack(documents, 7, separator=0)
    assert corpus.ids.reshape(-1).tolist() == [*range(10, 15), 0, *range(10, 19), 0, *range(10, 14), 0]
    assert corpus.tokens == 3 * 6


def test_only_the_assistant_is_scored(model):
    encoder = Encoder(model)
    messages = [
        {"role": "user", "content": "Measure the memory"},
        {"role": "assistant", "content": "The quick dog"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "sleeping"},
    ]
    document = encoder._chat(messages, "here")
    scored = encoder.tokenizer.decode(document.ids[document.scored].tolist(), skip_special_tokens=False)
    assert scored == "The quick dog<|im_end|>sleeping<|im_end|>"


def test_files_of_all_kinds(model, tmp_path):
    text = "The quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}) + "\n\n" + json.dumps({"text": text}) + "\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as stream:
        stream.write(
            json.dumps({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": text}]})
        )
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.jsonl.gz")]
    found = load(files, model, length=32, held_out=3, seed=0)
    assert len(found.held_out) == 3
    assert found.train.ids.shape[1] == 32
    again = load(files, model, length=32, held_out=3, seed=0)
    np.testing.assert_array_equal(found.train.ids, again.train.ids)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "a,b", "must be .txt or .jsonl"),
        ("x.txt", "", "must hold text"),
        ("x.txt", "short", "must fill two windows"),
        ("x.jsonl", "{", "line 1: each line must be JSON"),
        ("x.jsonl", '{"body": 1}', 'must have "text" or "messages"'),
        ("x.jsonl", '{"messages": "hi"}', "must be a list of turns"),
    ],
)
def test_what_cannot_be_data_is_refused(model, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load([tmp_path / name], model, length=32, held_out=3, seed=0)


def test_missing_files_and_lengths_are_refused(model, tmp_path):
    with pytest.raises(UserError, match="must be readable"):
        load([tmp_path / "none.txt"], model, length=32, held_out=3, seed=0)
    with pytest.raises(UserError, match="healing needs data"):
        load([], model, length=32, held_out=3, seed=0)
    with pytest.raises(UserError, match="length must be from 8"):
        load([tmp_path / "none.txt"], model, length=4096, held_out=3, seed=0)


def test_each_epoch_takes_each_window_once():
    rows = np.concatenate([rows_of_step(10, step, 4, seed=3) for step in range(5)])
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    np.testing.assert_array_equal(rows_of_step(10, 2, 4, seed=3), rows[8:12])


def test_held_out_windows_are_apart():
    corpus = pack([Document(np.arange(400, dtype=np.int32), np.ones(400, np.bool_))], 8, separator=0)
    found = split(corpus, held_out=4, seed=0)
    train, held_out = ({tuple(row) for row in part.ids.tolist()} for part in (found.train, found.held_out))
    assert len(held_out) == 4
    assert not train & held_out
    assert len(train | held_out) == len(corpus)
