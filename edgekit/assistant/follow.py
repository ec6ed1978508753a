"""Following a link: a server of `models/current` goes over to what was deployed, between two answers.

    with Follower(link, release, opened=model_of, use=use, say=print): ...

A thread looks where the link leads. When that changes it opens the new release beside the old one, and hands it over:
an answer that is being made goes on with the model that it began with, the next one is made by the new model, and
nobody is refused meanwhile. A release that cannot be opened, or does not fit beside the old one, is said so once; the
old one stays until the link changes again.
Not supported: other settings of the server; another encoder or index.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Self, TypeVar

T = TypeVar("T")

EVERY_S = 1.0


class Follower(Generic[T]):
    """Calls `use(opened(folder))` whenever `link` has come to lead to another folder than `release`, the one in use."""

    def __init__(
        self,
        link: Path,
        release: Path,
        *,
        opened: Callable[[Path], T],
        use: Callable[[T], None],
        say: Callable[[str], None],
        every_s: float = EVERY_S,
    ) -> None:
        self.release = release
        self._link, self._opened, self._use, self._say = link, opened, use, say
        self._tried = release
        self._every_s = every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

    def look(self) -> None:
        """Follow the link now if it changed."""
        folder = Path(os.path.realpath(self._link))
        if folder == self._tried or not folder.is_dir():
            return
        self._tried = folder
        if folder == self.release:  # there and back before the other one was in use
            return
        try:
            found = self._opened(folder)
        except Exception as problem:  # whatever is wrong with the new one, the old one serves
            self._say(f"still {self.release.name}: {folder.name} cannot be used: {problem}")
            return
        self.release = folder
        self._use(found)
        self._say(f"now {folder.name}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            self.look()
