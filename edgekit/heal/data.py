"""What is healed on: text and chats, packed into sequences of one length.

Documents are joined by the end-of-text token and cut into windows; nothing is padded and no token is lost but at the
very end. A chat is rendered by the model's own template, and only what the assistant says is scored (its turn with the
mark that ends it). Windows are shuffled once an epoch by the seed, so that step n sees the same windows in every run.

Files: .txt (one document), .jsonl with {"text": ...} or {"messages": [...]} a line, each also as .gz.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError, UserError
from edgekit.evaluate.text import read_text
from edgekit.runtime.template import ChatTemplate

Ids = NDArray[np.int32]
Flags = NDArray[np.bool_]
BATCH = 256  # documents tokenised at a time


@dataclass(frozen=True)
class Document:
    """Token ids and which of them are scored."""

    ids: Ids
    scored: Flags


@dataclass(frozen=True)
class Corpus:
    """Windows: `ids` (N, length), `scored` (N, length), true for each token that the model is to predict."""

    ids: Ids
    scored: Flags

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | NDArray[Any]) -> Corpus:
        return Corpus(self.ids[rows], self.scored[rows])

    @property
    def tokens(self) -> int:
        """Scored tokens; the first of a window has nothing before it and counts for nothing."""
        return int(self.scored[:, 1:].sum())


@dataclass(frozen=True)
class Split:
    """Windows to train on, and windows that are only measured on."""

    train: Corpus
    held_out: Corpus


def load(
    files: Sequence[Path],
    checkpoint: Checkpoint,
    *,
    length: int,
    held_out: int,
    seed: int,
    on_file: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Split:
    """Read, tokenise and pack `files` into windows of `length` tokens; `held_out` of them, chosen by the seed, are
    kept apart (at most a tenth).

    Raises UserError: a file that cannot be read or holds no text, or too little text for one window on each side;
    ModelError: the model has no tokenizer, or chats are given and it has no chat template.
    """
    if not files:
        raise UserError("healing needs data: name files of text or chats with --data")
    if not 8 <= length <= checkpoint.decoder.context_length:
        raise UserError(
            f"length must be from 8 to the model's context of {checkpoint.decoder.context_length} tokens: got {length}"
        )
    encoder = Encoder(checkpoint)
    documents: list[Document] = []
    for index, path in enumerate(files):
        documents += encoder.documents(path)
        on_file(path.name, index + 1, len(files))
    return split(pack(documents, length, separator=encoder.separator), held_out=held_out, seed=seed)


def pack(documents: Iterable[Document], length: int, *, separator: int) -> Corpus:
    """All documents in a row, each followed by `separator` (scored where its last token is), cut into windows."""
    ids: list[Ids] = []
    scored: list[Flags] = []
    for document in documents:
        ids += [document.ids, np.array([separator], np.int32)]
        scored += [document.scored, np.array([bool(document.scored[-1:].any())])]
    count = sum(map(len, ids)) // length
    if not count:
        return Corpus(np.empty((0, length), np.int32), np.empty((0, length), np.bool_))
    joined, flags = np.concatenate(ids)[: count * length], np.concatenate(scored)[: count * length]
    corpus = Corpus(joined.reshape(count, length), flags.reshape(count, length))
    return corpus[np.flatnonzero(corpus.scored[:, 1:].any(axis=1))]


def split(corpus: Corpus, *, held_out: int, seed: int) -> Split:
    """A random tenth at most, `held_out` windows if there are as many, apart from the rest. Raises UserError."""
    if held_out < 1:
        raise UserError(f"held_out must be at least 1: got {held_out}")
    if len(corpus) < 2:
        raise UserError(
            f"the data must fill two windows of {corpus.ids.shape[1]} tokens, one of them to measure on: it fills"
            f" {len(corpus)}; give more text or a smaller --length"
        )
    order = np.random.default_rng(seed).permutation(len(corpus))
    apart = min(held_out, max(1, len(corpus) // 10))
    return Split(corpus[np.sort(order[apart:])], corpus[np.sort(order[:apart])])


def rows_of_step(count: int, step: int, batch: int, seed: int) -> NDArray[np.int64]:
    """The windows of optimiser step `step` (from 0): a new permutation of all `count` windows each epoch."""
    start = step * batch
    rows: list[NDArray[np.int64]] = []
    while batch:
        epoch, at = divmod(start, count)
        order = np.random.default_rng((seed, epoch)).permutation(count)[at : at + batch]
        rows.append(order)
        start, batch = start + len(order), batch - len(order)
    return np.concatenate(rows)


class Encoder:
    """Turns files into documents with a checkpoint's tokenizer and chat template."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if "tokenizer.json" not in checkpoint.assets:
            raise ModelError(f"healing needs a tokenizer: {checkpoint.source.name} has no tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
        except Exception as problem:  # the library raises bare Exception
            raise ModelError(f"tokenizer.json of {checkpoint.source.name} must be readable: {problem}") from problem
        self.limit = checkpoint.decoder.vocabulary
        self.separator = _separator(self.tokenizer, checkpoint)
        self._template = _template(checkpoint)

    def documents(self, path: Path) -> Iterator[Document]:
        """The documents of one file. Raises UserError: unreadable, of an unknown kind, without text."""
        found = False
        for document in self._texts_and_chats(path):
            if len(document.ids):
                if document.ids.max() >= self.limit:
                    raise ModelError(
                        f"the tokenizer must fit the model: {path} gives id {document.ids.max()}, the table has"
                        f" {self.limit} rows"
                    )
                found = True
                yield document
        if not found:
            raise UserError(f"a data file must hold text: {path} has none")

    def _texts_and_chats(self, path: Path) -> Iterator[Document]:
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        text = read_text(path)
        if kind == "txt":
            yield from self._encode([text])
        elif kind == "jsonl":
            pending: list[str] = []
            for number, line in enumerate(text.split("\n"), 1):
                if not line.strip():
                    continue
                record = _record(line, f"{path}, line {number}")
                if "messages" in record:
                    yield self._chat(record["messages"], f"{path}, line {number}")
                    continue
                pending.append(record["text"])
                if len(pending) == BATCH:
                    yield from self._encode(pending)
                    pending = []
            yield from self._encode(pending)
        else:
            raise UserError(f"a data file must be .txt or .jsonl, also with .gz: got {path}")

    def _encode(self, texts: list[str]) -> Iterator[Document]:
        for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            ids = np.array(encoding.ids, np.int32)
            yield Document(ids, np.ones(len(ids), np.bool_))

    def _chat(self, messages: object, where: str) -> Document:
        if self._template is None:
            raise ModelError(f"chats need a chat template, which the model does not have ({where}); use plain text")
        if not isinstance(messages, list) or not all(isinstance(turn, Mapping) for turn in messages):
            raise UserError(f"{where}: messages must be a list of turns with role and content")
        text, spans = assistant_spans(self._template, messages, where)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        starts = np.array([start for start, _ in encoding.offsets], np.int64)
        scored = np.zeros(len(ids), np.bool_)
        for begin, end in spans:
            scored |= (starts >= begin) & (starts < end)
        return Document(ids, scored)


def assistant_spans(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where in it the assistant speaks: (first character, one past the last).

    Raises UserError when the template renders earlier turns otherwise once later ones follow: then there is no telling.
    """
    text = template.render(messages, add_generation_prompt=False)
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(messages):
        if turn.get("role") != "assistant":
            continue
        before = template.render(messages[:index], add_generation_prompt=True) if index else ""
        through = template.render(messages[: index + 1], add_generation_prompt=False)
        if not (text.startswith(before) and text.startswith(through)):
            raise UserError(f"{where}: the chat template must keep earlier turns as they are to score one of them")
        spans.append((len(before), len(through.rstrip("\n"))))
    return text, spans


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{where}: each line must be JSON: {problem}") from problem
    if not isinstance(record, dict) or not ("messages" in record or isinstance(record.get("text"), str)):
        raise UserError(f'{where}: each line must have "text" or "messages"')
    return record


def _separator(tokenizer: Tokenizer, checkpoint: Checkpoint) -> int:
    """<|endoftext|> where the vocabulary has it, else the model's first end token."""
    found = tokenizer.token_to_id("<|endoftext|>")
    if found is not None:
        return int(found)
    if checkpoint.decoder.eos_ids:
        return checkpoint.decoder.eos_ids[0]
    raise ModelError(f"documents need an end token between them: config.json of {checkpoint.source.name} has no eos")


def _template(checkpoint: Checkpoint) -> ChatTemplate | None:
    config = json.loads(checkpoint.assets.get("tokenizer_config.json", b"{}"))
    stored = checkpoint.assets.get("chat_template.jinja")
    source = stored.decode() if stored is not None else config.get("chat_template")
    if not isinstance(source, str):
        return None
    named = {key: config.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return ChatTemplate(source, special_tokens={key: text for key, text in texts.items() if isinstance(text, str)})
