"""What test files share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tiny import LINE

from edgekit.step import CalibrationOptions


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the module's own: results of evaluation stay out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> CalibrationOptions:
    """A little text: 12 windows of 48 tokens."""
    text = tmp_path_factory.mktemp("text") / "book.txt"
    text.write_text("".join(f"{number}. {LINE}" for number in range(300)))
    return CalibrationOptions((str(text),), 12, 48)
