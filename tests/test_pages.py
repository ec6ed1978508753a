import numpy as np
import pytest

from edgekit.runtime import pages as module
from edgekit.runtime.pages import LazyPages, huge_bytes


def huge_kilobytes(pages: LazyPages) -> int:
    """What the system says that huge pages hold of the array."""
    first = pages.array.ctypes.data
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0] and ":" not in line.split()[0]:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = begin >= first and end <= first + pages.array.nbytes
            elif inside and line.startswith("AnonHugePages"):
                total += int(line.split()[1])
    return total


def test_zeros_of_any_type_and_shape() -> None:
    pages = LazyPages((1, 3, 70, 64), np.dtype(np.float16))
    assert pages.array.shape == (1, 3, 70, 64)
    assert not pages.array.any()
    assert pages.join(70) == 0, "smaller than a huge page"


@pytest.mark.parametrize("rows", [1, 3])
def test_pages_are_joined_when_half_of_them_is_used(rows: int) -> None:
    huge = huge_bytes()
    if huge == 0:
        pytest.skip("this system has no huge pages")
    places = 4 * huge // 64  # of each row
    pages = LazyPages((1, rows, places, 64), np.dtype(np.uint8))
    rng = np.random.default_rng(0)
    written = places // 8 * 5  # two and a half huge pages of a row
    values = rng.integers(0, 256, (1, rows, written, 64), np.uint8)
    pages.array[:, :, :written] = values
    assert pages.join(1) == 0
    new = pages.join(written)
    if new == 0:
        pytest.skip("this system joins no pages")
    assert 2 * rows - 1 <= new <= 3 * rows
    assert pages.join(written) == 0, "each only once"
    assert huge_kilobytes(pages) == new * huge // 1024
    assert np.array_equal(pages.array[:, :, :written], values)
    assert not pages.array[:, :, written:].any()


def test_nothing_is_joined_where_there_are_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "huge_bytes", lambda: 0)
    pages = LazyPages((1, 1, 1 << 17, 64), np.dtype(np.uint8))
    pages.array[:] = 1
    assert pages.join(1 << 17) == 0
    assert pages.array.all()


def test_more_than_there_is_cannot_be_had() -> None:
    with pytest.raises(MemoryError):
        LazyPages((1, 1, 1 << 60, 64), np.dtype(np.float16))
