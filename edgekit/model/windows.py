"""Windows of tokens from calibration texts: what a model is run on to see what its matrices read.

A text becomes `samples` windows of `length` tokens; a seed says which documents they are cut from.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgekit.checkpoint import Checkpoint
from edgekit.errors import ModelError, UserError
from edgekit.step import CalibrationOptions, CalibrationRecord

PIECE = 8192  # characters of a plain text that are sampled as one document


def read_documents(path: Path) -> list[str]:
    """The documents of a UTF-8 .txt or .jsonl file, either also as .gz, in their order.

    A line of a .jsonl holds {"text": ...} or {"messages": [{"content": ...}, ...]}. A plain text is cut at line ends
    into pieces of about 8,000 characters. Raises UserError: it cannot be read, or a line has neither.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except OSError as problem:
        raise UserError(f"a calibration file must be readable: {path} ({problem.strerror or problem})") from problem
    except (EOFError, zlib.error) as problem:
        raise UserError(f"a .gz file must be whole: {path} ({problem})") from problem
    except UnicodeDecodeError as problem:
        raise UserError(f"a calibration text must be UTF-8: {path}, byte {problem.start}") from problem
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        lines = enumerate(text.splitlines(), 1)
        return [_document(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    pieces, size = [""], 0
    for line in text.splitlines(keepends=True):
        if size > PIECE:
            pieces.append("")
            size = 0
        pieces[-1] += line
        size += len(line)
    return [piece for piece in pieces if piece.strip()]


def _document(line: str, where: str) -> str:
    try:
        data = json.loads(line)
        if "messages" in data:
            return "\n\n".join(message["content"] for message in data["messages"])
        if isinstance(data["text"], str):
            return str(data["text"])
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f'a calibration record must hold "text" or "messages": {where} does not')


@dataclass(frozen=True)
class Windows:
    """Token windows (samples, length) and the record of where they come from."""

    ids: NDArray[np.int64]
    record: CalibrationRecord


def token_windows(checkpoint: Checkpoint, options: CalibrationOptions, *, seed: int) -> Windows:
    """`options.samples` windows of the documents of all files, taken in an order that `seed` chooses.

    Documents are joined by the model's end-of-text token; each window begins with the token that the tokenizer puts
    before a text, where it has one. Raises UserError: the texts are too short, or no file is named; ModelError: the
    model has no tokenizer.json.
    """
    if not options.files:
        raise UserError(
            "a step of this recipe needs calibration text: name files with --calibration (.txt or .jsonl, also .gz)"
        )
    length = options.length or min(1024, checkpoint.decoder.context_length)
    if not 2 <= length <= checkpoint.decoder.context_length:
        raise UserError(
            f"calibration windows must have from 2 to {checkpoint.decoder.context_length} tokens, the model's context:"
            f" got {length}"
        )
    tokenizer = _tokenizer(checkpoint)
    documents = [document for file in options.files for document in read_documents(Path(file))]
    order = np.random.default_rng((seed, len(documents))).permutation(len(documents))
    first = tokenizer.encode("", add_special_tokens=True).ids[:1]
    ends = list(checkpoint.decoder.eos_ids[:1])
    needed, tokens = options.samples * (length - len(first)), list[int]()
    for index in order:
        tokens += tokenizer.encode(documents[index], add_special_tokens=False).ids + ends
        if len(tokens) >= needed:
            break
    if len(tokens) < needed:
        raise UserError(
            f"calibration text must fill {options.samples} windows of {length} tokens ({needed}): it has {len(tokens)};"
            " name more files, or ask for fewer samples"
        )
    ids = np.array(tokens[:needed], np.int64).reshape(options.samples, -1)
    ids = np.concatenate([np.tile(np.array(first, np.int64), (options.samples, 1)), ids], axis=1)
    if ids.max() >= checkpoint.decoder.vocabulary:
        raise ModelError(f"the tokenizer must fit the model: token {ids.max()} of {checkpoint.decoder.vocabulary}")
    names = tuple(sorted(Path(file).name for file in options.files))
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    return Windows(ids, CalibrationRecord(names, options.samples, length, digest))


def _tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    try:
        return Tokenizer.from_str(checkpoint.assets["tokenizer.json"].decode())
    except KeyError:
        raise ModelError("calibration needs the model's tokenizer.json: it has none") from None
    except Exception as problem:  # the tokenizers package raises nothing narrower
        raise ModelError(f"tokenizer.json must be readable: {problem}") from problem
