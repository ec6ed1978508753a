"""The index: what is stored is found, what is gone is not, a killed run loses nothing, strangers' files are refused."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from knowledge import PAPERS, make_index, word_embedder, write

from edgekit.assistant import vectors
from edgekit.assistant.documents import Skipped
from edgekit.assistant.index import Index
from edgekit.assistant.update import update
from edgekit.errors import ModelError, UserError

TESTS = Path(__file__).parent


@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 64, 384]))
def test_codes_keep_the_cosine(seed: int, dim: int) -> None:
    random = np.random.default_rng(seed)
    v, q = (random.standard_normal(dim).astype(np.float32) for _ in range(2))
    v, q = v / np.linalg.norm(v), q / np.linalg.norm(q)
    exact = float(q @ v)
    (rounded,) = vectors.cosines(q, [vectors.stored(v, "int8")], "int8")
    # half a step a number, before and after the length is divided out
    assert abs(rounded - exact) <= 2 * np.sqrt(dim) / 254 * float(np.abs(v).max()) + 1e-6
    (same,) = vectors.cosines(q, [vectors.stored(v, "float")], "float")
    assert same == pytest.approx(exact, abs=1e-6)
    assert vectors.stored(v, "bit") == np.packbits(v > 0, bitorder="little").tobytes()


@pytest.mark.parametrize("kind", ["float", "int8", "bit"])
def test_nearest_is_what_numpy_says(kind: vectors.Vectors, tmp_path: Path) -> None:
    papers = {f"{n}.txt": " ".join(f"word{(n * k) % 47}" for k in range(1, 12)) for n in range(60)}
    index, changes = make_index(tmp_path, papers, vectors=kind)
    assert changes.passages == 60
    texts = {name: f"{name[:-4]}\n{text}" for name, text in papers.items()}
    exact = dict(zip(texts, index.embedder.embed(list(texts.values())), strict=True))
    query = index.embedder.embed(["word3 word7 word20"])[0]
    found = index.nearest(query, limit=5)
    best = sorted((float(vector @ query) for vector in exact.values()), reverse=True)[:5]
    assert [cosine for _, cosine in found] == pytest.approx(best, abs=0.02)
    for number, cosine in found:
        assert cosine == pytest.approx(float(exact[index.entry(number).document] @ query), abs=0.01)


def test_an_update_reads_only_what_has_changed(tmp_path: Path) -> None:
    index, first = make_index(tmp_path)
    docs = tmp_path / "docs"
    assert (first.added, first.changed, first.removed, first.unchanged) == (5, 0, 0, 0)
    before = index.embedder.texts  # type: ignore[attr-defined]
    again = update(index, docs)
    assert (again.added, again.unchanged, again.passages) == (0, 5, first.passages)
    assert index.embedder.texts == before  # type: ignore[attr-defined]
    (docs / "travel/trains.md").write_text("# Travel\n\nTake the tram.\n")
    (docs / "kitchen.html").unlink()
    (docs / "new.txt").write_text("A new sentence.")
    later = update(index, docs)
    assert (later.added, later.changed, later.removed, later.unchanged) == (1, 1, 1, 3)
    assert index.matching(["zephyr"], limit=5) == []
    assert index.matching(["dishwasher"], limit=5) == []
    assert [index.entry(n).text for n in index.matching(["tram"], limit=5)] == ["Take the tram."]
    for path in PAPERS:
        (docs / path).unlink(missing_ok=True)
    (docs / "new.txt").unlink()
    assert update(index, docs).passages == 0
    for table in ("documents", "passages", "vectors"):
        assert index._rows(f"SELECT count(*) FROM {table}")[0][0] == 0
    assert index.matching(["leave", "tram", "new"], limit=5) == []


def test_passages_are_spans_of_their_documents(tmp_path: Path) -> None:
    index, _ = make_index(tmp_path)
    (number,) = index.matching(["zephyr"], limit=5)
    entry = index.entry(number)
    whole = (tmp_path / "docs" / entry.document).read_text()
    assert whole[entry.start : entry.end] == entry.text == index.text(entry.document, entry.start, entry.end)
    assert (entry.document, entry.heading) == ("travel/trains.md", "Travel")
    assert index.text("nowhere.md", 0, 5) == index.text(entry.document, 5, 5) == index.text(entry.document, -3, 5) == ""


def test_words_are_no_operators(tmp_path: Path) -> None:
    index, _ = make_index(tmp_path)
    for word in ('"', "leave OR pay", "heading:leave", "NEAR(", "*", "';--", "^leave", ""):
        index.matching([word], limit=5)
        index.holders(word, [1])


def test_what_cannot_be_read_is_named_and_not_read_again(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs")
    (docs / "bad.pdf").write_bytes(b"no pdf")
    (docs / "link.txt").symlink_to(docs / "leave.md")
    index = Index.open(tmp_path / "kb.db", word_embedder(), create=True)
    first, again = update(index, docs), update(index, docs)
    assert {skipped.path for skipped in first.skipped} == {"bad.pdf", "link.txt"} == {s.path for s in again.skipped}
    assert again.unchanged == 6
    assert index.skipped() == [Skipped("bad.pdf", "a PDF that is broken or needs a password")]


def test_one_index_one_folder(tmp_path: Path) -> None:
    index, _ = make_index(tmp_path)
    other = write(tmp_path / "other", {"a.txt": "something else"})
    with pytest.raises(UserError, match=r"is of one folder: .*docs, got .*other; use another -o, or --force"):
        update(index, other)
    assert update(index, other, force=True).removed == 5


def test_another_embedder_or_kind_is_refused(tmp_path: Path) -> None:
    make_index(tmp_path)[0].close()
    path = tmp_path / "kb.db"
    for embedder in (word_embedder(salt=1), word_embedder(dim=64)):
        with pytest.raises(UserError, match="must be used with the embedder that made it"):
            Index.open(path, embedder)
    with pytest.raises(UserError, match=r"--vectors is int8 in .*: got bit"):
        Index.open(path, word_embedder(), vectors="bit")
    with pytest.raises(UserError, match="multiple of 8: the embedder has 12"):
        Index.open(tmp_path / "new.db", word_embedder(dim=12), create=True, vectors="bit")


def test_strangers_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make it with edgekit index DIR"):
        Index.open(tmp_path / "none.db", word_embedder())
    (tmp_path / "text.db").write_text("this is no database, but quite a long text" * 50)
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE documents (path)")
    foreign.commit()
    foreign.close()
    before = (tmp_path / "foreign.db").read_bytes()
    for name in ("text.db", "foreign.db"):
        with pytest.raises(ModelError):
            Index.open(tmp_path / name, word_embedder(), create=True)
    assert (tmp_path / "foreign.db").read_bytes() == before
    index, _ = make_index(tmp_path)
    index.close()
    data = bytearray((tmp_path / "kb.db").read_bytes())
    data[5000:] = os.urandom(len(data) - 5000)
    (tmp_path / "kb.db").write_bytes(data)
    (tmp_path / "kb.db-wal").unlink(missing_ok=True)
    with pytest.raises(ModelError):
        read_all(tmp_path / "kb.db")


def read_all(path: Path) -> None:
    index = Index.open(path, word_embedder())
    index.digests()
    index.matching(["leave"], limit=5)
    index.nearest(index.embedder.embed(["leave"])[0], limit=5)


def test_a_failure_in_the_middle_of_a_document_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, _ = make_index(tmp_path)
    (tmp_path / "docs" / "travel/trains.md").write_text("# Travel\n\nOne.\n\n# Two\n\nTwo.\n")
    insert, calls = Index._insert, []

    def fails(self: Index, *args: object) -> None:
        insert(self, *args)  # type: ignore[arg-type]
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Index, "_insert", fails)
    with pytest.raises(KeyboardInterrupt):
        update(index, tmp_path / "docs")
    monkeypatch.undo()
    assert calls
    assert len(index.matching(["zephyr"], limit=5)) == 1
    assert update(index, tmp_path / "docs").changed == 1


def test_threads_share_an_index(tmp_path: Path) -> None:
    index, _ = make_index(tmp_path)
    problems: list[BaseException] = []

    def read() -> None:
        try:
            for _ in range(30):
                assert index.entry(index.matching(["zephyr"], limit=1)[0]).document == "travel/trains.md"
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for round_ in range(5):
        index.put("extra.txt", str(round_), Skipped("extra.txt", "for a test"))
    for thread in threads:
        thread.join()
    assert problems == []


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from knowledge import word_embedder
from edgekit.assistant.index import Index
from edgekit.assistant.update import update

index = Index.open({path!r}, word_embedder(), create=True)
print("begun", flush=True)
update(index, Path({docs!r}), on_progress=lambda done, total: print(done, flush=True))
"""


def test_kill_9_loses_at_most_the_unfinished_document(tmp_path: Path) -> None:
    papers = {f"{n:03}.md": f"# Paper {n}\n\n" + f"Sentence about topic{n} and more. " * 40 for n in range(200)}
    docs = write(tmp_path / "docs", papers)
    path = tmp_path / "kb.db"
    code = KILLED.format(tests=str(TESTS), path=str(path), docs=str(docs))
    done = 0
    for stop_at in (1, 20, 60):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == str(stop_at):
                time.sleep(0.003 * stop_at % 0.01)
                break
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        index = Index.open(path, word_embedder())
        assert index._rows("PRAGMA integrity_check") == [("ok",)]
        assert index.documents >= max(done, stop_at)  # `n` is printed when the first n are stored
        done = index.documents
        assert index._rows("SELECT count(*) FROM passages")[0][0] == index._rows("SELECT count(*) FROM vectors")[0][0]
        index.close()
    index = Index.open(path, word_embedder())
    changes = update(index, docs)
    assert (changes.unchanged, changes.added) == (done, 200 - done)
    for n in (0, done - 1, done, 199):
        assert index.entry(index.matching([f"topic{n}"], limit=1)[0]).document == f"{n:03}.md"
