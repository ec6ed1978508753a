"""How many threads serve prefill and decode best on this device: what a sweep found, kept for the next session.

`edgekit profile --sweep-threads` finds the counts (`edgekit.profile.threads`), and a session that is not told otherwise
takes them. They are kept by device (its fingerprint) and bundle, in EDGEKIT_CACHE, else in the user's cache.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from edgekit.bundle import MODEL, Bundle
from edgekit.folder import write_file
from edgekit.host import host_device

NAME = "threads.json"


def keep(bundle: Bundle, prefill: int, decode: int, *, folder: Path | None = None) -> None:
    """Remember the counts for this device and bundle; what the file held of others stays."""
    path = (folder or cache_folder()) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    known = _known(path)
    known[_key(bundle)] = {"prefill": prefill, "decode": decode}
    write_file(path, json.dumps(known, indent=1, sort_keys=True).encode())


def kept(bundle: Bundle, *, folder: Path | None = None) -> tuple[int, int] | None:
    """(prefill, decode) threads that a sweep found on this device; None where none was made, or its file is broken."""
    entry = _known((folder or cache_folder()) / NAME).get(_key(bundle), {})
    counts = entry.get("prefill"), entry.get("decode")
    prefill, decode = (count if isinstance(count, int) and 1 <= count <= 1024 else None for count in counts)
    return None if prefill is None or decode is None else (prefill, decode)


def cache_folder() -> Path:
    """EDGEKIT_CACHE, else XDG_CACHE_HOME/edgekit, else ~/.cache/edgekit."""
    if os.environ.get("EDGEKIT_CACHE"):
        return Path(os.environ["EDGEKIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekit"


def _key(bundle: Bundle) -> str:
    facts = json.dumps([host_device().fingerprint(), bundle.manifest.files[MODEL].sha256], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def _known(path: Path) -> dict[str, dict[str, object]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: entry for key, entry in known.items() if isinstance(entry, dict)}
