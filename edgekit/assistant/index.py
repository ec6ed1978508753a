"""The index: documents, their passages, words and vectors in one SQLite file.

    index = Index.open("kb.db", embedder, create=True)
    update(index, Path("manuals"))                          # edgekit/assistant/update.py

Tables: `documents` (path, digest, text, or why there is none), `passages` (span and headings), `words` (FTS5 over
headings and text, which holds no second copy of the text) and `vectors` (sqlite-vec; vectors.py has the formats).

Crash-safe: a document comes, changes or goes in one transaction, so that a killed run loses the document that it was
at. The file is in WAL mode: others can read while one writes.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.assistant import sqlite
from edgekit.assistant.chunks import Chunk, chunks
from edgekit.assistant.documents import Document, Skipped
from edgekit.assistant.vectors import AS_VECTOR, MOST, POOL, Vectors, cosines, stored, tables
from edgekit.errors import BudgetError, ModelError, UserError
from edgekit.runtime.embeddings import Embedder, Floats

APPLICATION_ID = 0x656B6262  # "ekbb", which marks the file as ours
SCHEMA_VERSION = 1
HEADING_TOKENS = 56  # of an embedded text, left for the headings before a passage
HEADING_CHARACTERS = 200
BATCH = 32  # passages embedded at a time
PROBE = "The quick brown fox reads the manual of a small device."  # its vector tells embedders apart
SAME = 0.95  # cosine: the same model in 4, 8 or 32 bits is above it, another one far below

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE documents (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, digest TEXT NOT NULL,
    title TEXT NOT NULL, text TEXT NOT NULL, skipped TEXT);
CREATE TABLE passages (id INTEGER PRIMARY KEY, document INTEGER NOT NULL REFERENCES documents(id),
    start INTEGER NOT NULL, "end" INTEGER NOT NULL, heading TEXT NOT NULL);
CREATE INDEX passages_of_document ON passages(document);
CREATE VIRTUAL TABLE words USING fts5(heading, text, content='', tokenize='porter unicode61 remove_diacritics 2');
"""
_PASSAGE = 'substr(d.text, p.start + 1, p."end" - p.start)'  # of passages p and documents d


@dataclass(frozen=True)
class Entry:
    """A passage as it stands in the index."""

    document: str
    title: str
    heading: str
    start: int
    end: int
    text: str


class Index:
    """An open index and the embedder it was made with. Several threads may use it; one at a time is served."""

    def __init__(self, connection: sqlite3.Connection, embedder: Embedder, path: Path, vectors: Vectors) -> None:
        self.embedder = embedder
        self.path = path
        self.vectors = vectors
        self._db = connection
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls, path: str | Path, embedder: Embedder, *, create: bool = False, vectors: Vectors | None = None
    ) -> Index:
        """Open an index; `create` makes it where there is none, its vectors kept as `vectors` says (int8).

        Raises UserError: no such file, another embedder or other `vectors` than the index has; ModelError: a file that
        is no index, or a broken one; DeviceError as `sqlite.connect`.
        """
        path = Path(path)
        if not create and not path.is_file():
            raise UserError(f"an index must be a file: {path} is none; make it with edgekit index DIR -o {path}")
        connection = sqlite.connect(path)
        try:
            if create and _is_empty(connection):
                _make(connection, embedder, vectors or "int8")
            return cls(connection, embedder, path, _checked(connection, path, embedder, vectors))
        except sqlite3.Error as problem:
            connection.close()
            raise _explained(problem, path) from problem
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @property
    def passages(self) -> int:
        """How many passages there are."""
        return int(self._rows("SELECT count(*) FROM passages")[0][0])

    @property
    def documents(self) -> int:
        """How many documents have text in the index."""
        return int(self._rows("SELECT count(*) FROM documents WHERE skipped IS NULL")[0][0])

    def digests(self) -> dict[str, str]:
        """The digest of each document by its path, of those left out as well."""
        return {row[0]: row[1] for row in self._rows("SELECT path, digest FROM documents")}

    def skipped(self) -> list[Skipped]:
        """The documents that were left out, and why."""
        rows = self._rows("SELECT path, skipped FROM documents WHERE skipped IS NOT NULL ORDER BY path")
        return [Skipped(*row) for row in rows]

    def entry(self, passage: int) -> Entry:
        """A passage by its number, as `nearest` and `matching` give it."""
        rows = self._rows(
            f'SELECT d.path, d.title, p.heading, p.start, p."end", {_PASSAGE}'  # noqa: S608  constants
            " FROM passages p JOIN documents d ON d.id = p.document WHERE p.id = ?",
            passage,
        )
        if not rows:
            raise ModelError(f"a passage must be in the index: {passage} is not in {self.path}; make the index again")
        return Entry(*rows[0])

    def text(self, document: str, start: int, end: int) -> str:
        """The text of a document between two characters; "" where the index has no such document."""
        rows = self._rows("SELECT substr(text, ?, ?) FROM documents WHERE path = ?", start + 1, end - start, document)
        return str(rows[0][0]) if rows and 0 <= start < end else ""

    def whole(self, document: str) -> tuple[str, str]:
        """The title and the text of a document. Raises UserError where the index has none of that path."""
        rows = self._rows("SELECT title, text FROM documents WHERE path = ? AND skipped IS NULL", document)
        if not rows:
            raise UserError(f"a document must be in the index, by its path in there: {document!r:.200} is not")
        return str(rows[0][0]), str(rows[0][1])

    def of_document(self, document: str) -> list[Entry]:
        """The passages of a document, in order; none where the index has no such document."""
        rows = self._rows(
            f'SELECT d.path, d.title, p.heading, p.start, p."end", {_PASSAGE}'  # noqa: S608  constants
            " FROM passages p JOIN documents d ON d.id = p.document WHERE d.path = ? ORDER BY p.start, p.id",
            document,
        )
        return [Entry(*row) for row in rows]

    def nearest(self, query: Floats, *, limit: int) -> list[tuple[int, float]]:
        """The passages nearest to a vector (dim,) float32, with their cosines, best first."""
        rows = self._rows(
            f"SELECT rowid FROM vectors WHERE vector MATCH {AS_VECTOR[self.vectors]} AND k = ?",  # noqa: S608
            stored(query, self.vectors),
            min(limit * POOL[self.vectors], MOST),
        )
        return self.cosines(query, [row[0] for row in rows])[:limit]

    def cosines(self, query: Floats, passages: Sequence[int]) -> list[tuple[int, float]]:
        """The cosines of passages with a vector in float32, by what is stored of theirs, the largest first."""
        select = (
            "SELECT id, code FROM codes WHERE id"
            if self.vectors == "bit"
            else "SELECT rowid, vector FROM vectors WHERE rowid"
        )
        rows = self._rows(f"{select} IN ({_marks(passages)})", *passages)
        values = cosines(query, [row[1] for row in rows], self.vectors)
        found = [(int(row[0]), float(value)) for row, value in zip(rows, values, strict=True)]
        return sorted(found, key=lambda pair: (-pair[1], pair[0]))

    def matching(self, terms: Sequence[str], *, limit: int) -> list[int]:
        """The passages that have some of the words, best first by BM25; words are compared by their stems."""
        if not terms:
            return []
        rows = self._rows(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY bm25(words), rowid LIMIT ?",
            " OR ".join(map(_quoted, terms)),
            limit,
        )
        return [int(row[0]) for row in rows]

    def holders(self, term: str, passages: Sequence[int]) -> tuple[int, set[int]]:
        """In how many passages a word is, and in which of `passages`."""
        everywhere = self._rows("SELECT count(*) FROM words WHERE words MATCH ?", _quoted(term))
        here = self._rows(
            f"SELECT rowid FROM words WHERE words MATCH ? AND rowid IN ({_marks(passages)})",  # noqa: S608
            _quoted(term),
            *passages,
        )
        return int(everywhere[0][0]), {int(row[0]) for row in here}

    def holders_of_phrase(self, words: Sequence[str]) -> list[str]:
        """The documents that have these words in a row."""
        rows = self._rows(
            "SELECT DISTINCT d.path FROM words JOIN passages p ON p.id = words.rowid"
            " JOIN documents d ON d.id = p.document WHERE words MATCH ?",
            _quoted(" ".join(words)),
        )
        return [str(row[0]) for row in rows]

    def put(self, path: str, digest: str, content: Document | Skipped) -> None:
        """Store a document in place of what the index has of that path, or that it was left out."""
        title, text, reason = "", "", None
        pieces: list[tuple[Chunk, Floats]] = []
        if isinstance(content, Skipped):
            reason = content.reason
        else:
            title, text, pieces = content.title, content.text, self._pieces(content)
        with self._transaction():
            self._remove(path)
            row = self._db.execute(
                "INSERT INTO documents (path, digest, title, text, skipped) VALUES (?, ?, ?, ?, ?)",
                (path, digest, title, text, reason),
            )
            for chunk, vector in pieces:
                self._insert(row.lastrowid, title, text, chunk, vector)

    def remove(self, path: str) -> None:
        """Forget a document."""
        with self._transaction():
            self._remove(path)

    def bind(self, root: Path, *, force: bool = False) -> None:
        """Note which folder the index is of. Raises UserError when it is of another one, unless `force`."""
        rows = self._rows("SELECT value FROM facts WHERE name = 'folder'")
        wanted = str(root.resolve())
        if rows and rows[0][0] != wanted and not force:
            raise UserError(
                f"an index is of one folder: {self.path} is of {rows[0][0]}, got {wanted}; use another -o, or --force"
                " to take this folder's documents in place of those"
            )
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES ('folder', ?)", (wanted,))

    def _pieces(self, document: Document) -> list[tuple[Chunk, Floats]]:
        room = max(16, self.embedder.max_length - HEADING_TOKENS)
        found = chunks(document, count=self.embedder.count_tokens, tokens=room)
        pieces: list[tuple[Chunk, Floats]] = []
        for start in range(0, len(found), BATCH):
            batch = found[start : start + BATCH]
            texts = [f"{above(document.title, c.heading)}\n{document.text[c.start : c.end]}" for c in batch]
            pieces += zip(batch, self.embedder.embed(texts, truncate=True), strict=True)
        return pieces

    def _insert(self, document: int | None, title: str, text: str, chunk: Chunk, vector: Floats) -> None:
        number = self._db.execute(
            'INSERT INTO passages (document, start, "end", heading) VALUES (?, ?, ?, ?)',
            (document, chunk.start, chunk.end, chunk.heading),
        ).lastrowid
        self._db.execute(
            "INSERT INTO words (rowid, heading, text) VALUES (?, ?, ?)",
            (number, above(title, chunk.heading), text[chunk.start : chunk.end]),
        )
        self._db.execute(
            f"INSERT INTO vectors (rowid, vector) VALUES (?, {AS_VECTOR[self.vectors]})",  # noqa: S608
            (number, stored(vector, self.vectors)),
        )
        if self.vectors == "bit":
            self._db.execute("INSERT INTO codes (id, code) VALUES (?, ?)", (number, stored(vector, "int8")))

    def _remove(self, path: str) -> None:
        rows = self._db.execute(
            f"SELECT p.id, d.title, p.heading, {_PASSAGE}"  # noqa: S608
            " FROM passages p JOIN documents d ON d.id = p.document WHERE d.path = ?",
            (path,),
        ).fetchall()
        for number, title, heading, text in rows:
            self._db.execute(  # FTS5 keeps no text here: to forget words it must be told them
                "INSERT INTO words (words, rowid, heading, text) VALUES ('delete', ?, ?, ?)",
                (number, above(title, heading), text),
            )
            self._db.execute("DELETE FROM vectors WHERE rowid = ?", (number,))
            if self.vectors == "bit":
                self._db.execute("DELETE FROM codes WHERE id = ?", (number,))
            self._db.execute("DELETE FROM passages WHERE id = ?", (number,))
        self._db.execute("DELETE FROM documents WHERE path = ?", (path,))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except sqlite3.Error as problem:
                raise _explained(problem, self.path) from problem
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _rows(self, query: str, *values: object) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as problem:
                raise _explained(problem, self.path) from problem


def above(title: str, heading: str) -> str:
    """What stands above a passage: the document's title, then its headings."""
    whole = heading if heading.startswith(title) else f"{title} > {heading}" if heading else title
    return whole[:HEADING_CHARACTERS]


def _is_empty(connection: sqlite3.Connection) -> bool:
    return not connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()


def _make(connection: sqlite3.Connection, embedder: Embedder, vectors: Vectors) -> None:
    """All tables in one transaction: a killed run leaves an empty file, which the next one takes for new."""
    probe = embedder.embed([PROBE])[0].astype(np.float32).tobytes()
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        for statement in (_TABLES + tables(vectors, embedder.dim)).split(";"):
            connection.execute(statement)
        facts = (("vectors", vectors), ("dim", embedder.dim), ("probe", probe))
        connection.executemany("INSERT INTO facts VALUES (?, ?)", facts)
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _checked(connection: sqlite3.Connection, path: Path, embedder: Embedder, wanted: Vectors | None) -> Vectors:
    """How the index keeps its vectors, once it is clear that it is one, and of this embedder."""
    (application,), (version,) = (
        connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if application != APPLICATION_ID:
        raise ModelError(f"an index must be a file of edgekit: {path} is another one; choose another name")
    if version != SCHEMA_VERSION:
        raise ModelError(f"an index must have version {SCHEMA_VERSION}: {path} has {version}; make it again")
    connection.execute("PRAGMA synchronous=NORMAL")  # in WAL mode a kill loses nothing, a power cut the last commits
    facts = dict(connection.execute("SELECT name, value FROM facts").fetchall())
    vectors, dim, probe = (facts.get(name) for name in ("vectors", "dim", "probe"))
    if vectors not in ("float", "int8", "bit") or not isinstance(probe, bytes) or len(probe) % 4:
        raise ModelError(f"an index must say how it was made: {path} does not; make it again")
    if wanted not in (None, vectors):
        raise UserError(f"--vectors is {vectors} in {path}: got {wanted}; make another index with -o")
    ours = embedder.embed([PROBE])[0]
    cosine = float(cosines(ours, [probe], "float")[0]) if dim == embedder.dim == len(probe) // 4 else 0.0
    if not cosine > SAME:
        raise UserError(
            f"an index must be used with the embedder that made it: {path} has vectors of {dim} numbers, and those of"
            f" this one differ (cosine {cosine:.2f}); use that embedder, or make the index again"
        )
    kept: Vectors = vectors
    return kept


def _explained(problem: sqlite3.Error, path: Path) -> Exception:
    """An error of SQLite as one of ours."""
    text = str(problem)
    if "locked" in text:
        return UserError(f"an index has one writer at a time: {path} is being written; wait, or end the other run")
    if "full" in text:
        return BudgetError(f"the disk must have room for the index: {path}: {text}")
    if "readonly" in text or "unable to open" in text:
        return UserError(f"an index must be a file that can be written: {path}: {text}")
    return ModelError(f"an index must be whole: {path}: {text}; delete it and make it again")


def _quoted(term: str) -> str:
    """A word as FTS5 takes it: whatever it holds, it is no operator."""
    return '"' + term.replace('"', '""') + '"'


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
