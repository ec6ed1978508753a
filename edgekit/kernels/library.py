"""The native kernels: where their library lies, and how onnxruntime comes to use it."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import onnxruntime as ort

NAME = "_edgekit_kernels.so"


def library_path() -> Path | None:
    """The kernel library, or None where the install has none. EDGEKIT_KERNELS names another, or is "off"."""
    named = os.environ.get("EDGEKIT_KERNELS")
    if named == "off":
        return None
    path = Path(named) if named else Path(__file__).with_name(NAME)
    return path if path.is_file() else None


def register(options: ort.SessionOptions, *, decode_threads: int, prefill_threads: int) -> bool:
    """Make a session use the kernels; False when there are none."""
    path = library_path()
    if path is None:
        return False
    _load(path).edgekit_set_threads(decode_threads, prefill_threads)
    options.register_custom_ops_library(str(path))
    return True


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
