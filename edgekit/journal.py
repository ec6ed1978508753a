"""The work folder of a compression: `.NAME.partial` beside the output, with a journal of the blocks that are done.

One process at a time holds it. `journal.json` is replaced atomically after each shard and lists that shard with its
digest, so a run that is killed anywhere loses at most the block in its hands: whatever the journal does not list is
removed and written again, and so is a listed shard whose bytes are not those of its digest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgekit.checkpoint import Entry
from edgekit.errors import ModelError, UserError
from edgekit.folder import digest, write_file
from edgekit.manifest import FileRecord
from edgekit.schema import parse
from edgekit.step import Changes

NAME = "journal.json"


@dataclass(frozen=True)
class StepOnBlock:
    """What one step did to one block, with the sizes before and after it."""

    changes: Changes
    before_bytes: int
    after_bytes: int
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class DoneBlock:
    """A block whose shard is whole on disk. `steps` has one entry for each step of the recipe."""

    shard: str
    file: FileRecord
    structure: dict[str, Entry]
    steps: tuple[StepOnBlock, ...]


@dataclass(frozen=True)
class Identity:
    """All that decides the bytes of a run. A run may go on only under the same."""

    source: str
    recipe_sha256: str
    versions: dict[str, str]
    calibration: str = ""


@dataclass(frozen=True)
class Journal:
    """`total` counts the model's blocks; `done` has those that are finished, by name.

    `surveyed` is the recipe as TOML after its steps have planned for the whole model, where some did.
    """

    identity: Identity
    total: int
    surveyed: str = ""
    done: dict[str, DoneBlock] = field(default_factory=dict)

    def with_block(self, name: str, block: DoneBlock) -> Journal:
        return dataclasses.replace(self, done={**self.done, name: block})

    def save(self, work: Path) -> None:
        write_file(work / NAME, json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def load(cls, work: Path) -> Journal | None:
        """The journal in `work`, or None where there is none. Raises ModelError when it is not readable."""
        path = work / NAME
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as problem:
            raise ModelError(f"{path} must be readable JSON: {problem}; pass --force to begin again") from problem
        return parse(cls, data, where=str(path), error=ModelError)


@contextlib.contextmanager
def locked_work_folder(output: Path) -> Iterator[Path]:
    """The work folder of `output`, made if need be and held by this process alone. One with no block done is removed.

    Raises UserError when another process holds it.
    """
    work = output.with_name(f".{output.name}.partial")
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _lock(handle) or not _is_there(work, handle):
            raise UserError(f"one run at a time may write an output: another is writing {output}; wait for it")
        try:
            yield work
        finally:
            if _is_there(work, handle) and not (work / NAME).exists():
                shutil.rmtree(work)
    finally:
        os.close(handle)  # and with it the lock


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_there(work: Path, handle: int) -> bool:
    """Whether `work` is still the folder that was opened: its holder may have published it under us."""
    return work.exists() and os.path.samestat(os.fstat(handle), work.stat())


def begin(work: Path, fresh: Journal, *, resume: bool, force: bool) -> Journal:
    """The journal to go on with: that of an earlier run when `resume` is set, else `fresh`; other files are removed.

    Raises UserError: an earlier run is there and neither `resume` nor `force` is set, or it began with something else.
    """
    earlier = None if force and not resume else Journal.load(work)
    if earlier is not None and not resume:
        raise UserError(
            f"an earlier run stopped after block {len(earlier.done)} of {earlier.total} ({work});"
            " pass --resume to go on or --force to begin again"
        )
    if earlier is not None:
        _refuse_other(earlier.identity, fresh.identity, work)
        fresh = dataclasses.replace(
            earlier, done={name: block for name, block in earlier.done.items() if _is_whole(work, block)}
        )
    keep = {NAME, *(block.shard for block in fresh.done.values())} if fresh.done else set()
    for path in work.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return fresh


def _refuse_other(earlier: Identity, now: Identity, work: Path) -> None:
    parts = {
        "the source model": earlier.source == now.source,
        "the recipe": earlier.recipe_sha256 == now.recipe_sha256,
        "the calibration text": earlier.calibration == now.calibration,
        f"the versions ({_differences(earlier.versions, now.versions)})": earlier.versions == now.versions,
    }
    changed = [part for part, same in parts.items() if not same]
    if changed:
        raise UserError(
            f"--resume goes on only with what a run began with: {' and '.join(changed)} changed since {work};"
            " restore that, or pass --force without --resume to begin again"
        )


def _differences(earlier: dict[str, str], now: dict[str, str]) -> str:
    names = sorted(name for name in earlier.keys() | now.keys() if earlier.get(name) != now.get(name))
    return ", ".join(f"{name} {earlier.get(name, 'absent')} -> {now.get(name, 'absent')}" for name in names)


def _is_whole(work: Path, block: DoneBlock) -> bool:
    path = work / block.shard
    return path.is_file() and path.stat().st_size == block.file.size_bytes and digest(path) == block.file.sha256
