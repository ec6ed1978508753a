"""Folders that are whole or absent: atomic writes, digests, and paths that stay inside.

A folder is written under a temporary name beside its target, flushed to disk, and renamed. A reader therefore never
sees a half-written one, and a failed write leaves what stood there before.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from edgekit.errors import BudgetError, ModelError, UserError


def digest(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def inside(root: Path, relative: str) -> Path:
    """`root / relative`, checked to be a plain path below `root`.

    Raises ModelError: absolute, with `..`, with a drive or backslash, or leading outside through a link.
    """
    pure = PurePosixPath(relative)
    plain = relative and not pure.is_absolute() and ".." not in pure.parts
    if not plain or "\\" in relative or ":" in relative or "\0" in relative:
        raise ModelError(
            f"a path must stay inside its folder: got {relative!r} in {root}; the folder is not safe to use"
        )
    path = root / pure
    try:
        leads_outside = not path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError, ValueError) as problem:  # a loop of links, or characters that no path can have
        raise ModelError(f"a path must lead to a file: {relative!r} in {root} does not ({problem})") from problem
    if leads_outside:
        raise ModelError(f"a path must stay inside its folder: {relative!r} in {root} is a link that leads outside")
    return path


@contextlib.contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    Raises UserError when `target` exists (without `force`) or cannot be written, BudgetError when the disk is full.
    """
    with explain_write_errors(target):
        refuse_existing(target, force=force)
    target = Path(os.path.abspath(target))
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with explain_write_errors(target):
            _sweep(target)
            work.mkdir(parents=True)
            yield work
            refuse_existing(target, force=force)  # it may have come meanwhile
            publish(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sweep(target: Path) -> None:
    """Remove what killed processes left of `target`, and an earlier try of this one."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        pid = left.name.removesuffix(".partial").rpartition(".")[2]
        if pid.isdecimal() and (int(pid) == os.getpid() or not _runs(int(pid))):
            shutil.rmtree(left, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def refuse_existing(target: Path, *, force: bool) -> None:
    """Raise UserError when `target` is there and may not be replaced, or is nothing that we would replace."""
    if target.is_symlink():
        raise UserError(f"the output must not be a link: {target}; name the folder that it leads to")
    if not target.exists():
        return
    if not force:
        raise UserError(f"the output must not exist: {target}; choose another name or pass --force")
    if not target.is_dir() or (any(target.iterdir()) and not (target / "edgekit.json").exists()):
        raise UserError(f"--force replaces only folders that edgekit wrote: {target} has no edgekit.json")


def publish(work: Path, target: Path) -> None:
    """Flush `work` to disk and rename it to `target`; a folder that stood there is replaced and then removed."""
    for path in [*work.rglob("*"), work]:
        sync(path)
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush one file or directory entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REFUSALS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ELOOP,
)


@contextlib.contextmanager
def explain_write_errors(target: Path) -> Iterator[None]:
    """Turn the operating system's refusals while writing `target` into our errors."""
    try:
        yield
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BudgetError(
                f"the disk is full: writing {target} failed; free space or choose another disk"
            ) from problem
        if problem.errno in _REFUSALS:
            raise UserError(
                f"the output must be writable: {target} ({problem.strerror}); choose another place"
            ) from problem
        raise
