"""Documents, an embedder of words and an index of them, for the tests of the assistant."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from test_reference import rounded, tiny_checkpoint

from edgekit.assistant.index import Index
from edgekit.assistant.update import Changes, update
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.quant.grid import Grid
from edgekit.runtime.embeddings import Embedder, Floats
from edgekit.runtime.session import Session

PAPERS = {
    "leave.md": "# Leave\n\n## Annual leave\n\nEvery employee has thirty days of annual leave in a calendar year."
    " Ask your manager two weeks before.\n\n## Sick leave\n\nCall the office before nine in the morning when you are"
    " ill.\n",
    "travel/trains.md": "# Travel\n\nBook trains in second class. The Zephyr pass is sold at counter twelve.\n",
    "travel/planes.txt": "Flights below six hundred kilometres are not refunded.\n",
    "staff/private/pay.md": "# Pay\n\nThe salary of Ada Quill is four thousand and two hundred marks a month.\n",
    "kitchen.html": "<html><head><title>Kitchen</title><script>ignore()</script></head><body><h1>Kitchen</h1>"
    "<p>The dishwasher runs at <b>eight</b> in the evening.</p></body></html>",
}


class WordEmbedder:
    """Vectors that count words: texts with the same words are near. Stands in for `Embedder`."""

    def __init__(self, *, dim: int = 256, salt: int = 0) -> None:
        self.dim = dim
        self.max_length = 128
        self.salt = salt
        self.texts = 0

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(re.findall(r"\w+|[^\w\s]", text)) + 2 for text in texts]

    def embed(self, texts: Sequence[str], *, truncate: bool = False) -> Floats:
        self.texts += len(texts)
        vectors = np.full((len(texts), self.dim), 1e-3, np.float32)
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                code = zlib.crc32(word[:5].encode(), self.salt)
                row[code % self.dim] += 1 if code & 1024 else -1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def word_embedder(**options: int) -> Embedder:
    return cast(Embedder, WordEmbedder(**options))


def write(folder: Path, papers: dict[str, str] = PAPERS) -> Path:
    for name, text in papers.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def make_index(home: Path, papers: dict[str, str] = PAPERS, *, vectors: str = "int8") -> tuple[Index, Changes]:
    """An index of papers that lie in home/docs, as home/kb.db."""
    docs = write(home / "docs", papers)
    index = Index.open(home / "kb.db", word_embedder(), create=True, vectors=vectors)  # type: ignore[arg-type]
    return index, update(index, docs)


def tiny_session(home: Path) -> Session:
    """A decoder with random weights."""
    export(rounded(tiny_checkpoint(), Grid(4, 32, "symmetric")), home / "bundle", target=TARGETS["portable"])
    return Session.open(home / "bundle", threads=1)
