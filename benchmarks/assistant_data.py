"""SQuAD for the assistant's benchmarks: paragraphs as files, and questions in two parts that share no article.

The articles are numbered in the order of their titles. Questions on those with a number of 0 or 1 modulo 4 are for
choosing constants and for fitting, those on the others are for testing; an index of the even ones alone lacks half of
what either part asks for.
"""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import data

from edgekit.runtime.embeddings import Embedder, Floats


@dataclass(frozen=True)
class Asked:
    """A question, the file that answers it, its answers, and whether its article has an even number."""

    question: str
    file: str
    answers: tuple[str, ...]
    even: bool


def rows(name: str) -> list[dict[str, str]]:
    with gzip.open(data(f"assistant/{name}.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def articles() -> list[str]:
    return sorted({row["title"] for row in rows("squad_docs")})


def file_name(paragraph: str) -> str:
    """The file of a paragraph, in a folder for each article: the third one of Oxygen is Oxygen/3.md."""
    article, _, number = paragraph.rpartition("#")
    return f"{article.replace('/', '_')}/{number}.md"


def write_paragraphs(folder: Path, *, even_only: bool = False) -> Path:
    """A Markdown file for each paragraph, headed by its article's title."""
    numbers = {title: at for at, title in enumerate(articles())}
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows("squad_docs"):
        if not even_only or numbers[row["title"]] % 2 == 0:
            path = folder / file_name(row["id"])
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"# {row['title']}\n\n{row['text']}\n", encoding="utf-8")
    return folder


def questions(part: Literal["fitting", "testing"], count: int) -> list[Asked]:
    """`count` questions of a part, drawn with a fixed seed."""
    numbers = {title: at for at, title in enumerate(articles())}
    at = {row["id"]: numbers[row["title"]] for row in rows("squad_docs")}
    found = [row for row in rows("squad_qa") if (at[row["doc"]] % 4 < 2) == (part == "fitting")]
    random.Random(1).shuffle(found)
    return [
        Asked(row["question"], file_name(row["doc"]), tuple(row["answers"]), at[row["doc"]] % 2 == 0)
        for row in found[:count]
    ]


class Remembering(Embedder):
    """An embedder that embeds each text once: for indexes that differ in how they keep vectors only."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__(embedder.spec, embedder.encoder, embedder.tokenizer)
        self._known: dict[str, Floats] = {}

    def embed(self, texts: list[str], *, truncate: bool = False) -> Floats:  # type: ignore[override]
        import numpy as np

        for text in texts:
            if text not in self._known:
                self._known[text] = super().embed([text], truncate=truncate)[0]
        return np.array([self._known[text] for text in texts], np.float32).reshape(len(texts), self.dim)
