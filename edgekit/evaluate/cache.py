"""Results of evaluation on disk, under the digest of all that they depend on: asking twice costs nothing.

A key holds the model's digest, the texts' digests, the options and the versions that compute; change one and it is
another result. Kept in $EDGEKIT_CACHE/eval, else $XDG_CACHE_HOME/edgekit/eval, else ~/.cache/edgekit/eval. A file that
cannot be read counts as absent. A cache that cannot be written is no reason to fail, but whoever asks is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekit.bundle import SPEC
from edgekit.folder import write_file
from edgekit.manifest import NAME, Manifest, versions

ASIDE = ("report.json", "MODEL_CARD.md")  # of a folder's files, those that no result depends on


def cached(
    key: Mapping[str, object],
    compute: Callable[[], Any],
    *,
    fresh: bool = False,
    on_trouble: Callable[[str], None] = lambda why: None,
) -> Any:
    """What `compute` gives, JSON data, from the cache where it is known; `fresh` computes it anew.

    `on_trouble` is told why the result could not be kept.
    """
    path = folder() / f"{_digest(dict(key) | {'versions': _versions()})}.json"
    if not fresh:
        try:
            return json.loads(path.read_text(encoding="utf-8"))["result"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
    result = json.loads(json.dumps(compute()))  # as it will be read
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps({"key": dict(key), "result": result}, ensure_ascii=False).encode())
    except OSError as problem:  # a read-only home: the result is as good without the cache
        on_trouble(f"results are not kept: {path.parent} ({problem.strerror})")
    return result


def folder() -> Path:
    """Where results are kept."""
    if base := os.environ.get("EDGEKIT_CACHE"):
        return Path(base).expanduser() / "eval"
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "edgekit" / "eval"
    return Path.home() / ".cache" / "edgekit" / "eval"


def bundle_digest(path: Path) -> str:
    """One digest for what a bundle computes. Raises ModelError: it is not whole."""
    return manifest_digest(Manifest.load(path))


def manifest_digest(manifest: Manifest) -> str:
    """One digest of a folder's files, but for those `ASIDE`."""
    return _digest({name: file.sha256 for name, file in manifest.files.items() if name not in ASIDE})


def model_digest(spec: str) -> str:
    """The digest of whatever `open_scorer` opens. Raises as it does."""
    if os.path.isfile(os.path.join(spec, NAME)) and os.path.isfile(os.path.join(spec, SPEC)):
        return bundle_digest(Path(spec))
    from edgekit.model.sources import open_model

    checkpoint = open_model(spec)
    return checkpoint.source.digest if checkpoint.manifest is None else manifest_digest(checkpoint.manifest)


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions() -> dict[str, str]:
    return versions("numpy", "onnxruntime", "tokenizers") | {"machine": platform.machine()}


def _digest(data: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
