"""The text of a PDF, page by page, read by pypdf in a process of its own.

A PDF is a program that makes text, and small ones can make petabytes (streams in streams), loop, or nest without end.
The child process bounds itself before it reads: address space and processor seconds by the system's limits; pypdf
has bounds of its own on streams, filters and trees; the parent bounds the time and what it takes in. So the worst that
a PDF can do is to be left out. Where the system has no such limits (Windows), the others still hold.

    python -m edgekit.assistant.pdf MEMORY_BYTES SECONDS PAGES < file.pdf    one JSON string a line
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING

from edgekit.errors import UserError

if TYPE_CHECKING:
    from edgekit.assistant.documents import Limits

TOO_MANY_PAGES, NOT_OPEN, NO_MEMORY = 10, 11, 12
_REASONS = {
    NOT_OPEN: "a PDF that is broken or needs a password",
    NO_MEMORY: "a PDF that needs more memory than {memory_bytes:,} bytes",
    TOO_MANY_PAGES: "a PDF of more than {pages} pages",
}


def pages(data: bytes, limits: Limits) -> list[str] | str:
    """The text of each page, or the reason why there is none. Raises UserError where pypdf is not installed."""
    if importlib.util.find_spec("pypdf") is None:
        raise UserError('reading a PDF needs pypdf: install it with pip install "edgekit[assistant]"')
    numbers = (limits.memory_bytes, math.ceil(limits.seconds), limits.pages)
    # -P: a folder of documents may be the current one, and its files are no modules of ours
    command = [sys.executable, "-P", "-m", "edgekit.assistant.pdf", *map(str, numbers)]
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as sink:
        source.write(data)
        source.seek(0)
        with subprocess.Popen(command, stdin=source, stdout=sink, stderr=subprocess.DEVNULL) as child:  # noqa: S603
            try:
                status = child.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                return f"a PDF that takes longer than {limits.seconds:g} s to read"
            finally:
                child.kill()
        if status < 0:  # the system ended it: out of processor time, or of memory in a place that cannot say so
            return "a PDF that takes more time or memory to read than it may"
        if status != 0:
            return _REASONS.get(status, _REASONS[NOT_OPEN]).format(memory_bytes=limits.memory_bytes, pages=limits.pages)
        if os.fstat(sink.fileno()).st_size > 8 * limits.characters:
            return f"a PDF of more than {limits.characters:,} characters"
        sink.seek(0)
        return [json.loads(line) for line in sink]


def main(memory_bytes: int, seconds: int, most: int) -> int:
    """Print the text of the pages of the PDF on standard input; returns the exit status."""
    _bound(memory_bytes, seconds)
    try:
        return _print_pages(most)
    except MemoryError:
        return NO_MEMORY
    except Exception:  # pypdf raises what a broken file makes it raise: of all kinds
        return NOT_OPEN


def _bound(memory_bytes: int, seconds: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # a system without limits, or with lower ones
        import resource

        for kind, value in (
            (resource.RLIMIT_AS, memory_bytes),
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_FSIZE, 256_000_000),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (value, value))


def _print_pages(most: int) -> int:
    import pypdf

    reader = pypdf.PdfReader(sys.stdin.buffer)
    if len(reader.pages) > most:
        return TOO_MANY_PAGES
    for page in reader.pages:
        try:
            text = page.extract_text()
        except MemoryError:
            raise
        except Exception:
            text = ""  # one broken page does not take the others along
        print(json.dumps(text), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*(int(word) for word in sys.argv[1:])))
