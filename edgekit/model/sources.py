"""Where models come from: `open_model` turns what a user types into a checkpoint.

a path          a folder that edgekit wrote, a transformers folder, or a .gguf file
a name          of `builtin.BUILTIN`, such as smollm2-135m
owner/name      a model of the Hugging Face Hub, with @revision if wanted
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from pathlib import Path

from edgekit.checkpoint import (
    INDEX,
    TOKENIZER_FILES,
    Checkpoint,
    SafetensorsReader,
    open_checkpoint,
    read_assets,
    read_json,
)
from edgekit.errors import ModelError, UserError
from edgekit.folder import digest
from edgekit.manifest import NAME, SourceRecord
from edgekit.model import hub
from edgekit.model.builtin import BUILTIN, Progress, fetch_builtin
from edgekit.model.encoder import open_encoder
from edgekit.model.encoder_config import is_encoder
from edgekit.model.gguf import open_gguf
from edgekit.schema import nearest

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
ACCEPTED = "a folder, a .gguf file, a built-in name or a Hub id (owner/name[@revision])"
FILE_SUFFIXES = (".gguf", ".safetensors", ".onnx", ".bin", ".pt")


def open_model(spec: str, *, offline: bool = False, progress: Progress | None = None) -> Checkpoint:
    """Open the model that `spec` names; an existing path wins over a name, a name over a Hub id.

    Its weights are read when asked for, and whether its architecture is supported is asked by `Checkpoint.decoder`.
    `offline` fetches nothing. `progress` gets a line before a built-in model is fetched.

    Raises UserError: nothing of this name, or it cannot be fetched; ModelError: it is there but broken or foreign.
    """
    path = Path(os.path.expanduser(spec))  # unlike Path.expanduser and Path.exists, these two never raise
    if spec and os.path.exists(path):
        return open_path(path)
    if spec in BUILTIN:
        path = fetch_builtin(spec, offline=offline, progress=progress)
        opened = open_folder(path) if BUILTIN[spec].contents else open_gguf(path, digest=BUILTIN[spec].sha256)
        named = dataclasses.replace(opened.source, name=spec, license=BUILTIN[spec].license)
        return dataclasses.replace(opened, source=named)
    looks_like_file = spec.endswith(FILE_SUFFIXES)
    match = HUB_ID.fullmatch(spec)
    if match and not looks_like_file:
        return _open_from_hub(spec, match["repo"], match["revision"], offline=offline)
    if looks_like_file or "/" in spec or spec.startswith((".", "~")):
        raise UserError(f"a model must exist: there is no file or folder {spec!r:.200}; pass {ACCEPTED}")
    raise UserError(f"a model must exist or be known: got {spec!r:.200}{nearest(spec, BUILTIN)}; pass {ACCEPTED}")


def _open_from_hub(spec: str, repo: str, revision: str | None, *, offline: bool) -> Checkpoint:
    try:
        folder = hub.fetch(repo, revision, offline=offline)
    except UserError as problem:
        raise UserError(f"there is no file or folder {spec!r} here, and from the Hub: {problem}") from problem
    opened = open_folder(folder)
    return dataclasses.replace(opened, source=dataclasses.replace(opened.source, name=spec, kind="hub"))


def open_path(path: Path) -> Checkpoint:
    """Open a local folder or file. Raises ModelError: what it holds is no whole model; UserError: no kind we read."""
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"a model file must be .gguf: got {path.name}; pass {ACCEPTED}")
        return open_gguf(path)
    if (path / NAME).exists():
        return open_checkpoint(path)
    return open_folder(path)


def open_folder(folder: Path) -> Checkpoint:
    """Open a transformers folder: config.json, safetensors weights, tokenizer files. Raises ModelError otherwise."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"a model folder must hold config.json or {NAME}: {folder} has neither; pass {ACCEPTED}")
    config = read_json(folder / "config.json")
    tensors = SafetensorsReader(folder)
    source = SourceRecord(
        name=folder.resolve().name,
        kind="folder",
        digest=folder_digest(folder, shards={path.name for path in tensors.files()}),
        license=readme_license(folder),
    )
    opened = Checkpoint(config=config, tensors=tensors, source=source, assets=read_assets(folder))
    return open_encoder(opened, folder) if is_encoder(config) else opened


def folder_digest(folder: Path, *, shards: set[str]) -> str:
    """The sha256 over the sorted names and sha256 of the config, the shards, their index and the tokenizer files."""
    names = {"config.json", INDEX, *TOKENIZER_FILES, *shards}
    present = sorted(name for name in names if (folder / name).is_file())
    lines = [f"{name} {digest(folder / name)}\n" for name in present]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def readme_license(folder: Path) -> str:
    """The licence in the front matter of the folder's README.md, or "unknown".

    For `license: other` it is `license_name`, which says which other.
    """
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "unknown"
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = dict(re.findall(r"^(license|license_name):[ \t]*[\"']?([\w.+-]+)", front[1] if front else "", re.MULTILINE))
    stated: str = found.get("license", "unknown")
    return str(found.get("license_name", stated)) if stated == "other" else stated
