"""A store of bundles on a device: deploy, look back, roll back. `current` is always a whole, verified bundle.

    objects/ab/abcd...      every file once, by its sha256
    releases/ID/            a bundle of hard links to objects; ID begins the sha256 of its edgekit.json
    current -> releases/ID  changed by one rename
    keys/*.pub              where there are any, a bundle must be signed by one of them
    history.jsonl           what happened, one line an event, flushed

A deployment copies what is new, checks every digest of the copy, builds the release under another name, renames it,
tries it, notes a trial, switches `current`, runs the health check and notes the end. Killed before the switch, it has
changed nothing that counts; killed after it, the next command finds a trial without an end and goes back.
Not supported: file systems without links; a store shared by machines (its lock is this machine's).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from edgekit.bundle import SPEC
from edgekit.deploy.signing import SIGNATURE, public_key, verify
from edgekit.errors import ModelError, UserError
from edgekit.folder import digest, explain_write_errors, inside, sync, write_file
from edgekit.manifest import NAME, Manifest, now
from edgekit.schema import parse

CURRENT = "current"
BACK = ".current.back"  # where a trial leads back to
HISTORY = "history.jsonl"
ID_LENGTH = 32
KEEP = 3  # releases that garbage collection leaves, the current one among them

Health = Callable[[Path], None]
Watch = Callable[[str], None]


@dataclass(frozen=True)
class Event:
    """A line of the history. `previous` is what was current before; a trial is ended by the event after it."""

    at: str
    event: Literal["trial", "deployed", "failed", "rolled back", "collected"]
    release: str
    name: str = ""
    previous: str = ""
    note: str = ""


@dataclass(frozen=True)
class Store:
    """The folder; made when it is not there by `deploy` alone."""

    path: Path

    # --- reading ------------------------------------------------------------------------------------------------------

    def current(self) -> Path | None:
        """The folder of the current release, None before the first one. Not verified: the runtime does that."""
        try:
            release = os.readlink(self.path / CURRENT)
        except OSError:
            return None
        return self.path / release

    def history(self) -> list[Event]:
        """All events, oldest first. A last line that a power cut tore is left out. Raises ModelError for another."""
        try:
            lines = (self.path / HISTORY).read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:
            return []
        found = []
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                break
            where = f"{self.path / HISTORY}:{number}"
            try:
                found.append(parse(Event, json.loads(line), where=where, error=ModelError))
            except ValueError as problem:
                raise ModelError(f"{where} must be JSON: {problem}") from problem
        return found

    def keys(self) -> list[Path]:
        """The public keys that are trusted."""
        return sorted((self.path / "keys").glob("*.pub"))

    # --- changing -----------------------------------------------------------------------------------------------------

    def trust(self, key: Path) -> None:
        """Trust a public key from now on: bundles that no trusted key signed are refused. Raises UserError: no key."""
        public_key(key)
        with explain_write_errors(self.path):
            (self.path / "keys").mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(key.read_bytes()).hexdigest()[:16]
            write_file(self.path / "keys" / f"{name}.pub", key.read_bytes())

    def deploy(
        self, bundle: Path, *, check: Health, health: Health | None = None, watch: Watch = lambda step: None
    ) -> str:
        """Make `bundle` the current release and return its id.

        `check` tries the release before it becomes current, `health` after; whichever raises an EdgekitError, the
        release that was current is so again. `watch` is told each step as it begins.

        Raises ModelError: the bundle is not whole, or not signed by a trusted key; BudgetError: the disk is full;
        UserError: the store cannot be written; and what `check` and `health` raise.
        """
        with self._locked():
            watch("verify")
            manifest = self._verified(bundle)
            release = digest(bundle / NAME)[:ID_LENGTH]
            with explain_write_errors(self.path):
                for name, record in manifest.files.items():
                    watch(f"copy {name}")
                    self._take(inside(bundle, name), record.sha256)
                watch("release")
                folder = self._release(bundle, manifest, release, watch=watch)
            watch("check")
            self._verified(folder)
            check(folder)
            self._switch(release, "deployed", name=bundle.resolve().name, health=health, watch=watch)
            return release

    def rollback(
        self,
        release: str | None = None,
        *,
        check: Health,
        health: Health | None = None,
        watch: Watch = lambda step: None,
    ) -> str:
        """Make an earlier release current: the one before, or the one whose id begins with `release`; its id.

        Raises UserError: there is none; ModelError: it is no longer whole or not signed by a trusted key.
        """
        with self._locked():
            chosen = self._before() if release is None else self._by_prefix(release)
            watch("check")
            folder = self.path / "releases" / chosen
            self._verified(folder)
            check(folder)
            self._switch(chosen, "rolled back", name=self._name(chosen), health=health, watch=watch)
            return chosen

    def collect(self, *, keep: int = KEEP) -> list[str]:
        """Remove all releases but the `keep` that were current last, and objects that none of them has; their ids.

        What is current is never removed. Raises UserError: `keep` is below 1.
        """
        if keep < 1:
            raise UserError(f"--keep must be at least 1: got {keep}")
        with self._locked():
            kept = self._good()[-keep:]
            current = self.current()
            if current is not None:
                kept.append(current.name)
            gone = []
            for folder in sorted((self.path / "releases").iterdir()) if (self.path / "releases").is_dir() else []:
                if folder.name not in kept:
                    shutil.rmtree(folder)
                    if not folder.name.startswith("."):
                        gone.append(folder.name)
                        self._note(Event(now(), "collected", folder.name))
            for path in (self.path / "objects").glob("*/*"):
                if path.stat().st_nlink == 1:  # no release links to it
                    path.unlink()
            return gone

    # --- parts --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One change at a time; an earlier one that was killed is brought to its end first."""
        with explain_write_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "lock").open("a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(
                        f"one deployment at a time: another is at work in {self.path}; wait for it"
                    ) from None
                self._recover()
                yield

    def _recover(self) -> None:
        """Go back from a trial that never ended."""
        whole = "".join(json.dumps(asdict(event)) + "\n" for event in self.history())
        path = self.path / HISTORY
        if path.exists() and path.stat().st_size != len(whole.encode()):
            write_file(path, whole.encode())  # without the line that a power cut tore
        events = [event for event in self.history() if event.event != "collected"]
        if events and events[-1].event == "trial":
            self._go_back(events[-1], "killed before its health check ended")

    def _go_back(self, trial: Event, why: str) -> None:
        """To what was current before. That needs no room on the disk: the link was laid before the trial."""
        if not trial.previous:
            (self.path / CURRENT).unlink(missing_ok=True)
        elif os.path.lexists(self.path / BACK):
            (self.path / BACK).replace(self.path / CURRENT)
        else:
            self._point_to(trial.previous)
        sync(self.path)
        self._note(Event(now(), "failed", trial.release, trial.name, trial.previous, why[:200]))

    def _verified(self, folder: Path) -> Manifest:
        manifest = Manifest.load(folder)
        if manifest.kind != "bundle" or SPEC not in manifest.files:
            raise UserError(f"what is deployed must be a bundle: {folder} is a {manifest.kind}; run edgekit export")
        for name in (NAME, SIGNATURE):
            if name in manifest.files:
                raise ModelError(f"a manifest must not list {name}: that of {folder} does")
        if keys := self.keys():
            verify(folder, keys)
        return manifest

    def _take(self, source: Path, sha256: str) -> None:
        """Copy a file among the objects, unless it is there; its digest is that of what was written."""
        target = self._object(sha256)
        if target.exists():
            if digest(target) == sha256:
                return
            target.unlink()  # damaged: the release that links to it is found out when it is verified
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.partial")
        hasher = hashlib.sha256()
        try:
            with source.open("rb") as stream, partial.open("wb") as out:
                while piece := stream.read(1 << 20):
                    hasher.update(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            if hasher.hexdigest() != sha256:
                raise ModelError(f"{source} changed while it was copied; deploy it again")
            partial.chmod(0o444)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        sync(target.parent)

    def _release(self, bundle: Path, manifest: Manifest, release: str, *, watch: Watch) -> Path:
        target = self.path / "releases" / release
        work = target.with_name(f".{release}.partial")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for name, record in manifest.files.items():
            path = inside(work, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._object(record.sha256), path)
        for name in (NAME, SIGNATURE):
            if (bundle / name).is_file():
                write_file(work / name, (bundle / name).read_bytes())
        if digest(work / NAME)[:ID_LENGTH] != release:
            raise ModelError(f"{bundle / NAME} changed while it was copied; deploy it again")
        for path in [path for path in work.rglob("*") if path.is_dir()] + [work]:
            sync(path)
        watch("publish")
        if target.exists():  # deployed before
            if (bundle / SIGNATURE).is_file():
                write_file(target / SIGNATURE, (bundle / SIGNATURE).read_bytes())
            try:
                self._verified(target)
            except ModelError:  # its links lead to a damaged object, the new ones do not
                current = self.current()
                if current is not None and current.name == release:
                    raise
                shutil.rmtree(target)
                work.rename(target)
            else:
                shutil.rmtree(work)
        else:
            work.rename(target)
        sync(target.parent)
        return target

    def _switch(
        self,
        release: str,
        event: Literal["deployed", "rolled back"],
        *,
        name: str,
        health: Health | None,
        watch: Watch,
    ) -> None:
        current = self.current()
        previous = current.name if current is not None else ""
        trial = Event(now(), "trial", release, name, previous)
        watch("trial")
        (self.path / BACK).unlink(missing_ok=True)
        if previous:
            (self.path / BACK).symlink_to(Path("releases") / previous)
        self._note(trial)
        try:
            watch("switch")
            self._point_to(release)
            watch("health")
            if health is not None:
                health(self.path / "releases" / release)
            watch("note")
            self._note(Event(now(), event, release, name, previous))
        except BaseException as problem:  # an interrupt and a full disk too
            with contextlib.suppress(OSError):  # what is left undone, the next command does
                self._go_back(trial, str(problem) or "interrupted")
            raise
        watch("done")
        (self.path / BACK).unlink(missing_ok=True)

    def _point_to(self, release: str) -> None:
        link = self.path / f".{CURRENT}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("releases") / release)
        link.replace(self.path / CURRENT)
        sync(self.path)

    def _note(self, event: Event) -> None:
        """Append a line, whole or not at all."""
        line = (json.dumps(asdict(event)) + "\n").encode()
        with (self.path / HISTORY).open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                if stream.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
            except OSError:
                os.ftruncate(stream.fileno(), size)
                raise

    def _good(self) -> list[str]:
        """Releases that were current and well, each once, the latest last, of those that are still here."""
        ids = [event.release for event in self.history() if event.event in ("deployed", "rolled back")]
        latest = list(dict.fromkeys(reversed(ids)))[::-1]
        return [release for release in latest if (self.path / "releases" / release).is_dir()]

    def _before(self) -> str:
        current = self.current()
        good = [release for release in self._good() if current is None or release != current.name]
        if not good:
            raise UserError(f"a roll-back needs an earlier release: {self.path} has none; deploy one")
        return good[-1]

    def _by_prefix(self, prefix: str) -> str:
        found = [release for release in self._good() if release.startswith(prefix)]
        if len(found) != 1:
            known = ", ".join(release[:12] for release in self._good()) or "none"
            raise UserError(
                f"a release must be named by the beginning of one id: got {prefix!r:.40}; known are {known}"
            )
        return found[0]

    def _name(self, release: str) -> str:
        return next((event.name for event in reversed(self.history()) if event.release == release), "")

    def _object(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ModelError(f"a digest must be a sha256 in hex: got {sha256!r:.80}; the manifest is damaged")
        return self.path / "objects" / sha256[:2] / sha256
