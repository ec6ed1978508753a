"""Texts to evaluate on, as they lie on disk."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from edgekit.errors import UserError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, decompressed when its name ends in .gz. Raises UserError: it cannot be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except OSError as problem:  # gzip raises some that carry no number
        raise UserError(f"a file must be readable: {path} ({problem.strerror or problem})") from problem
    except (EOFError, zlib.error) as problem:
        raise UserError(f"a .gz file must be whole: {path} ({problem})") from problem
    except UnicodeDecodeError as problem:
        raise UserError(f"a text must be UTF-8: {path} has {problem.reason} at byte {problem.start}") from problem
