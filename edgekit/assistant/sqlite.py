"""Opening SQLite with the vector search of sqlite-vec.

Python's sqlite3 can load extensions where it was built so. Where it was not, as by pyenv or on macOS, the library that
it runs on can still be told to start sqlite-vec in each new connection: `sqlite3_auto_extension`, called through ctypes
for the moment of one `connect`. Either way the connection is asked for its version, so nothing is half loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from edgekit.errors import DeviceError, ModelError, UserError

_loading = threading.Lock()  # automatic extensions are one list for the whole process


def connect(path: Path) -> sqlite3.Connection:
    """A connection that any thread may use, one at a time, with the functions and tables of sqlite-vec. Transactions
    are the caller's.

    Raises UserError when sqlite-vec is not installed or the file cannot be opened, DeviceError when this Python's
    SQLite cannot have extensions, ModelError when the file is no database.
    """
    try:
        import sqlite_vec
    except ImportError as problem:
        raise UserError('an index needs sqlite-vec: install it with pip install "edgekit[assistant]"') from problem
    extension = sqlite_vec.loadable_path()
    if hasattr(sqlite3.Connection, "enable_load_extension"):
        connection = _open(path)
        connection.enable_load_extension(True)
        connection.load_extension(extension)
        connection.enable_load_extension(False)
        return connection
    with _started_automatically(extension):
        connection = _open(path)
    try:
        connection.execute("SELECT vec_version()")
    except sqlite3.Error as problem:
        connection.close()
        raise DeviceError(
            "an index needs an SQLite that takes extensions: this Python's does not; use another Python, such as the"
            " system's (Debian, Raspberry Pi OS) or uv's"
        ) from problem
    return connection


def _open(path: Path) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(path, timeout=10, isolation_level=None, check_same_thread=False)
    except sqlite3.Error as problem:
        raise UserError(f"an index must be a file that can be opened: {path}: {problem}") from problem
    try:
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "cache_size=-8000", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error as problem:
        connection.close()
        raise ModelError(f"an index must be an SQLite file: {path}: {problem}; choose another name") from problem
    return connection


@contextlib.contextmanager
def _started_automatically(extension: str) -> Iterator[None]:
    """Connections opened inside have the extension, if its library and SQLite's are found."""
    with _loading:
        sqlite, library = (
            _library("libsqlite3.so.0", "libsqlite3.dylib"),
            _library(f"{extension}.so", f"{extension}.dylib"),
        )
        entry = getattr(library, "sqlite3_vec_init", None)
        begin = getattr(sqlite, "sqlite3_auto_extension", None)
        end = getattr(sqlite, "sqlite3_cancel_auto_extension", None)
        if begin is None or end is None or entry is None:
            yield
            return
        begin(entry)
        try:
            yield
        finally:
            end(entry)


def _library(*names: str) -> ctypes.CDLL | None:
    """The first of these libraries that loads; one that the process has already is that same one."""
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None
