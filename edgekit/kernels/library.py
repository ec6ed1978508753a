"""The native kernels: where their library lies, how onnxruntime comes to use it, and which of its paths runs.

The library holds a path for each instruction set and picks the best that this processor has when it is first used.
ctypes and onnxruntime load the same file, so that both speak to one library. What is set here holds for the process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Literal, cast

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edgekit import kernels
from edgekit.errors import DeviceError, UserError

NAME = "_edgekit_kernels.so"
STOCK = "onnxruntime's own operators run"
WAY_OUT = "install edgekit again, or set EDGEKIT_KERNELS=off"

# Number of the processor in an ELF file.
_MACHINES = {"x86_64": 62, "aarch64": 183}


def library_path() -> Path | None:
    """The kernel library, or None where the install has none; EDGEKIT_KERNELS names another one, or is "off"."""
    named = os.environ.get("EDGEKIT_KERNELS")
    if named:
        return None if named == "off" else Path(named).resolve()
    # An editable install has two folders: the sources, and what was built.
    candidates = (Path(folder, NAME) for folder in kernels.__path__)
    return next((path for path in candidates if path.is_file()), None)


def register(
    options: ort.SessionOptions, *, decode_threads: int, prefill_threads: int, activations: Literal[8, 15] = 15
) -> bool:
    """Make a session use the kernels; False when the install has none.

    `activations` are the bits of activations when up to 64 tokens go through at once; with more they have 8, or are
    bfloat16 on the path "amx".
    The session must be made before another is registered: it takes what was set last.

    Raises DeviceError: the library is there but cannot be loaded, or onnxruntime refuses it.
    """
    path = library_path()
    if path is None:
        return False
    loaded = _load(path)
    loaded.edgekit_set_threads(decode_threads, prefill_threads)
    loaded.edgekit_set_activations(activations)
    try:
        options.register_custom_ops_library(str(path))
    except Exception as problem:  # onnxruntime raises classes of its own, with no common base
        raise DeviceError(f"onnxruntime {ort.__version__} refused the kernels: {problem}; {WAY_OUT}") from problem
    return True


def path_name() -> str | None:
    """The path that runs, as "avx512"; None without a library. Raises DeviceError as `register` does."""
    path = library_path()
    return None if path is None else _load(path).edgekit_path().decode()


def known_paths() -> list[str]:
    """The paths that this processor can run, the best first; none without a library."""
    path = library_path()
    if path is None:
        return []
    names = (ctypes.c_char_p * 16)()
    count = _load(path).edgekit_known_paths(names, len(names))
    return [name.decode() for name in names[:count] if name is not None]


def choose_path(name: str) -> None:
    """Run another path from now on, in all sessions. Raises UserError where the processor or the library lacks it."""
    path = library_path()
    if path is None or not _load(path).edgekit_choose_path(name.encode()):
        raise UserError(f"a path must be one of {', '.join(known_paths()) or 'none, without kernels'}: got {name!r}")


def read_memory(data: NDArray[np.uint8]) -> int:
    """The sum of a contiguous array's 8-byte words, read once from start to end: a plain loop to measure memory with.

    Raises DeviceError without a library.
    """
    path = library_path()
    if path is None:
        raise DeviceError(f"reading memory in a native loop needs the kernels: {status()}")
    return int(_load(path).edgekit_read(data.ctypes.data, data.nbytes // 8))


def near_peak() -> Callable[..., int] | None:
    """The C function behind `edgekit.kernels.peak.NearPeak`; None without a library. Raises DeviceError."""
    path = library_path()
    return None if path is None else cast(Callable[..., int], _load(path).edgekit_near_peak)


def status() -> str:
    """One line for people: which kernels run, or why none do."""
    if os.environ.get("EDGEKIT_KERNELS") == "off":
        return f"no native kernels: EDGEKIT_KERNELS is off; {STOCK}"
    try:
        name = path_name()
    except DeviceError as problem:
        return f"broken native kernels: {problem}"
    if name is None:
        return f"no native kernels: the install found no C++ compiler that works; {STOCK}"
    return f"native kernels, {name} path"


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    """The library with its functions' types. Raises DeviceError."""
    try:
        _check(path)
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)
        library.edgekit_set_threads.argtypes = [ctypes.c_int, ctypes.c_int]
        library.edgekit_set_threads.restype = None
        library.edgekit_set_activations.argtypes = [ctypes.c_int]
        library.edgekit_set_activations.restype = None
        library.edgekit_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        library.edgekit_read.restype = ctypes.c_uint64
        library.edgekit_near_peak.argtypes = [
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_float, ctypes.c_float, ctypes.c_int),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        ]
        library.edgekit_near_peak.restype = ctypes.c_int64
        library.edgekit_path.argtypes = []
        library.edgekit_path.restype = ctypes.c_char_p
        library.edgekit_choose_path.argtypes = [ctypes.c_char_p]
        library.edgekit_known_paths.argtypes = [ctypes.POINTER(ctypes.c_char_p), ctypes.c_int]
    except (OSError, AttributeError) as problem:
        raise DeviceError(f"the kernel library must load: {problem}; {WAY_OUT}") from problem
    return library


def _check(path: Path) -> None:
    """Refuse a file whose loading could end the process: the loader maps what its headers say, and trusts them.

    Raises OSError. The table of sections lies at a library's end, so a file that holds it is whole.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or not head.startswith(b"\x7fELF\x02\x01"):
        raise OSError(f"{path} is not a 64-bit shared library")
    number = int.from_bytes(head[18:20], "little")
    if number != _MACHINES.get(platform.machine(), number):
        built_for = next((name for name, known in _MACHINES.items() if known == number), f"machine {number}")
        raise OSError(f"{path} is for {built_for}, and this is {platform.machine()}")
    start, entry, count = (int.from_bytes(head[i:j], "little") for i, j in ((40, 48), (58, 60), (60, 62)))
    size = path.stat().st_size
    if size < start + entry * count:
        raise OSError(f"{path} is cut off: it has {size} bytes of {start + entry * count}")
