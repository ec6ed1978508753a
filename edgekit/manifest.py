"""The manifest: `edgekit.json` in every folder that edgekit writes, saying how it came to be.

It lists each file with its digest, the source model, the recipe, the seed, the versions and what each step did.
Times and memory figures are records of one run and take no part in comparing two folders.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgekit import __version__
from edgekit.errors import ModelError
from edgekit.folder import digest, inside, write_file
from edgekit.report import Measurement
from edgekit.schema import parse

SCHEMA = 1
NAME = "edgekit.json"


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of one file of the folder."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class SourceRecord:
    """The model that everything began with. `digest` covers its weights and tokenizer."""

    name: str
    kind: str
    digest: str
    license: str = "unknown"


@dataclass(frozen=True)
class Skip:
    """Something that a step left as it was, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class StepRecord:
    """What one step did to the whole model."""

    step: str
    options: dict[str, object]
    changed: int
    before_bytes: int
    after_bytes: int
    facts: dict[str, float] = field(default_factory=dict)
    skipped: tuple[Skip, ...] = ()
    seconds: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True)
class Manifest:
    """See the module. `steps` and `measurements` accumulate from folder to folder."""

    kind: Literal["checkpoint", "bundle", "onnx"]
    source: SourceRecord
    files: dict[str, FileRecord]
    recipe: str = ""
    recipe_sha256: str = ""
    seed: int = 0
    steps: tuple[StepRecord, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    schema: int = SCHEMA

    def save(self, folder: Path) -> None:
        """Write `edgekit.json`; call it last, when every other file is there."""
        text = json.dumps(dataclasses.asdict(self), indent=1)
        write_file(folder / NAME, text.encode())

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> Manifest:
        """Read `edgekit.json` and, unless told not to, check the size and digest of every file it lists.

        Raises ModelError: absent, not ours, of a newer schema, a file missing, changed or outside the folder.
        """
        path = folder / NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(f"an edgekit folder must hold {NAME}: {folder} has none") from None
        except (OSError, ValueError, RecursionError) as problem:
            raise ModelError(f"{path} must be readable JSON: {problem}") from problem
        schema = data.get("schema") if isinstance(data, dict) else None
        if isinstance(schema, int) and schema > SCHEMA:
            raise ModelError(
                f"{path} has schema {schema}, this edgekit ({__version__}) reads up to {SCHEMA}; update edgekit"
            )
        manifest = parse(cls, data, where=str(path), error=ModelError)
        if verify:
            manifest.verify(folder)
        return manifest

    def verify(self, folder: Path) -> None:
        """Check every listed file against its size and digest. Raises ModelError naming the first that differs."""

        def check(item: tuple[str, FileRecord]) -> None:
            name, record = item
            path = inside(folder, name)
            try:
                if not path.is_file():
                    raise ModelError(f"{folder} lacks {name}, which its {NAME} lists; copy the whole folder again")
                same = path.stat().st_size == record.size_bytes and digest(path) == record.sha256
            except OSError as problem:
                raise ModelError(
                    f"{folder}: {name:.80} must be readable: {problem.strerror}; copy it again"
                ) from problem
            if not same:
                raise ModelError(f"{path} differs from its digest in {NAME}; it was changed or cut, fetch it again")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(check, self.files.items()))


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Size and digest of the named files of `folder`, in sorted order."""
    return {name: FileRecord((folder / name).stat().st_size, digest(folder / name)) for name in sorted(names)}


def versions(*packages: str) -> dict[str, str]:
    """Versions of edgekit, Python and those of `packages` that are installed."""
    found = {"edgekit": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC to the second, as manifests record it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
