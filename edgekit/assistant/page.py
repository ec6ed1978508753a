"""The web page: four files that lie beside this module, read once, and what the page asks the server about."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = ("page.html", "page.css", "page.js", "icon.svg")


@cache
def file(name: str) -> tuple[bytes, str, str]:
    """Content, media type and entity tag of one of FILES. Raises KeyError for any other name."""
    if name not in FILES:
        raise KeyError(name)
    content = (STATIC / name).read_bytes()
    return content, TYPES[Path(name).suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"'
