"""Bringing an index up to date with its folder: what is new or changed is read, what is gone is forgotten.

A document is known by the digest of its bytes. Each one is a transaction of its own, and one at a time is in memory,
so a run can be killed at any moment and goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekit.assistant import documents
from edgekit.assistant.documents import File, Limits, Skipped
from edgekit.assistant.index import Index


@dataclass(frozen=True)
class Changes:
    """What an update did, in documents. `skipped` is all that is left out now; `passages` is what the index holds."""

    added: int
    changed: int
    removed: int
    unchanged: int
    skipped: tuple[Skipped, ...]
    passages: int
    seconds: float


def update(
    index: Index,
    root: Path,
    *,
    limits: Limits = Limits(),  # noqa: B008  frozen
    force: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Changes:
    """Read the documents below `root` into the index. `force` takes them in place of another folder's.

    `on_progress` is told (done, all) in files. Raises UserError: `root` cannot be read, the index is of another
    folder, or another process writes it.
    """
    begin = time.perf_counter()
    listing = list(documents.walk(root))
    index.bind(root, force=force)
    known = index.digests()
    files = [item for item in listing if isinstance(item, File)]
    skipped = [item for item in listing if isinstance(item, Skipped)]
    counts = {"added": 0, "changed": 0, "unchanged": 0}
    seen = set()
    for done, file in enumerate(files):
        on_progress(done, len(files))
        data = documents.load(root, file, limits)
        if isinstance(data, Skipped):  # it may be readable next time: nothing is noted of it
            skipped.append(data)
            continue
        seen.add(file.path)
        digest = documents.digest(data)
        if known.get(file.path) == digest:
            counts["unchanged"] += 1
            continue
        index.put(file.path, digest, documents.read(file, data, limits))
        counts["changed" if file.path in known else "added"] += 1
    gone = known.keys() - seen
    for path in sorted(gone):
        index.remove(path)
    on_progress(len(files), len(files))
    return Changes(
        **counts,
        removed=len(gone),
        skipped=(*skipped, *index.skipped()),
        passages=index.passages,
        seconds=time.perf_counter() - begin,
    )
