"""Prompts that are read once: the cache of their tokens, kept on disk.

    prefixes = Prefixes(folder)
    prefixes.read(session, ids)       # "model": read now, and kept; "disk": taken from there; "memory": still there
    session.generate(...)             # of a prompt that begins with `ids`, reads only what comes after them

A document of thousands of tokens takes a small device seconds or minutes to read, and its cache a fraction of a second
to load. A kept cache is of one bundle, one path of the kernels and these very tokens; all of that is in its name, and
the tokens are in it as well. It is a file

    magic (8)  bytes of the header (4)  checksum (4)  header, JSON  ids (int32)  buffers, in the header's order

and the checksum, a CRC-32 of what comes after the header, is compared before anything is used: against accidents, not
against those who can write the folder. A file that is torn, damaged or of another version is removed, and the model
reads again. The folder holds at most `limit_bytes`; the files that were not used for longest go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit.bundle import SPEC
from edgekit.errors import ContextOverflow, ModelError
from edgekit.folder import digest
from edgekit.manifest import NAME
from edgekit.runtime.budget import PREFILL_CHUNK
from edgekit.runtime.engine import Engine
from edgekit.runtime.session import Session

Origin = Literal["memory", "disk", "model", "stopped"]
MAGIC = b"ekcache1"  # the last digit is the version
HEAD = struct.Struct("<8sII")  # magic, bytes of the header, checksum
LIMIT_BYTES = 1 << 30
MAX_HEADER = 1 << 20
SUFFIX = ".prefix"


class Prefixes:
    """A folder of kept caches, which is made at the first use. Several processes may share it."""

    def __init__(self, folder: Path, *, limit_bytes: int = LIMIT_BYTES) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes

    def read(self, session: Session, ids: Sequence[int]) -> Origin:
        """Bring `ids` into the session's cache, whole, and say where from; "stopped" where `session.go_on` said no.

        Raises ContextOverflow when they leave no room for an answer. That nothing could be kept (no room on the disk,
        no right to write there) is no error: the next time takes as long as this one.
        """
        engine = session.engine
        if len(ids) >= engine.context:
            raise ContextOverflow(len(ids), engine.context, session.bundle.spec.cache_bytes(len(ids)))
        if engine.tokens[: len(ids)] == list(ids):
            return "memory"
        path = self.folder / f"{name(session, ids)}{SUFFIX}"
        if self._load(session, ids, path):
            return "disk"
        engine.rewind(_shared(engine.tokens, ids))
        for start in range(len(engine.tokens), len(ids), PREFILL_CHUNK):
            if not session.go_on():
                return "stopped"
            engine.forward(ids[start : start + PREFILL_CHUNK])
        with contextlib.suppress(OSError):
            self._keep(session, path)
        return "model"

    def _load(self, session: Session, ids: Sequence[int], path: Path) -> bool:
        if not isinstance(session.engine, Engine):  # graphs of fixed shapes keep their cache to themselves
            return False
        try:
            tokens, kept = _unpacked(np.memmap(path, np.uint8, "r"))
            if tokens != list(ids):
                raise ModelError("it is of other tokens")
            session.engine.restore(tokens, kept)
            os.utime(path)
        except FileNotFoundError:
            return False
        except (OSError, ValueError, ModelError):  # ValueError: an empty file cannot be mapped
            with contextlib.suppress(OSError):
                path.unlink()
            return False
        return True

    def _keep(self, session: Session, path: Path) -> None:
        engine = session.engine
        if not isinstance(engine, Engine):
            return
        kept = engine.kept(len(engine.tokens))
        size = sum(part.nbytes for part in kept.values())
        if size > self.limit_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._make_room(self.limit_bytes - size)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "wb") as stream:
                _write(stream, engine.tokens, kept)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _make_room(self, limit_bytes: int) -> None:
        """Remove what was not used for longest until at most `limit_bytes` are left."""
        files = sorted(self.folder.glob(f"*{SUFFIX}*"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > limit_bytes:
                path.unlink(missing_ok=True)


def name(session: Session, ids: Sequence[int]) -> str:
    """The name of a kept cache: a digest of the bundle, of what computes and of the tokens."""
    engine, bundle = session.engine, session.bundle
    facts = (digest(bundle.path / NAME), digest(bundle.path / SPEC), engine.kernels, engine.budget if bundle.spec.sparse
             else None, ort.__version__)  # fmt: skip
    return hashlib.sha256(repr(facts).encode() + np.asarray(ids, np.int32).tobytes()).hexdigest()[:40]


def _write(stream: BinaryIO, tokens: Sequence[int], kept: Mapping[str, NDArray[Any]]) -> None:
    """Write a file, with one buffer's bytes at a time in memory."""
    parts = {key: [part.dtype.str, list(part.shape)] for key, part in kept.items()}
    header = json.dumps({"tokens": len(tokens), "parts": parts}).encode()
    stream.write(bytes(HEAD.size) + header)
    checksum = 0
    for part in (np.asarray(tokens, np.int32), *kept.values()):
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        checksum = zlib.crc32(data.data, checksum)
        stream.write(data.data)
    stream.seek(0)
    stream.write(HEAD.pack(MAGIC, len(header), checksum))


def _unpacked(data: NDArray[np.uint8]) -> tuple[list[int], dict[str, NDArray[Any]]]:
    """The tokens and the parts of a file. Raises ModelError for one that is not whole."""
    try:
        magic, size, checksum = HEAD.unpack(data[: HEAD.size].tobytes())
        if magic != MAGIC or size > MAX_HEADER:
            raise ModelError("it is none of ours")
        header = json.loads(data[HEAD.size : HEAD.size + size].tobytes())
        body = data[HEAD.size + size :]
        if zlib.crc32(body.data) != checksum:
            raise ModelError("it is damaged")
        end = 4 * int(header["tokens"])
        tokens: list[int] = body[:end].view(np.int32).tolist()
        parts = {}
        for key, (kind, shape) in header["parts"].items():
            begin, end = end, end + np.dtype(kind).itemsize * int(np.prod(shape))
            parts[str(key)] = body[begin:end].view(kind).reshape(shape)
    except (struct.error, ValueError, TypeError, KeyError, RecursionError) as problem:
        raise ModelError(f"it is damaged: {problem}") from problem
    return tokens, parts


def _shared(cached: Sequence[int], wanted: Sequence[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(cached, wanted, strict=False)) if a != b), min(len(cached), len(wanted))
    )
