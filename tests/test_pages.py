import numpy as np
import pytest

from edgekit.runtime import pages as module
from edgekit.runtime.pages import LazyPages, huge_bytes


def one(shape: tuple[int, ...], kind: type) -> LazyPages:
    return LazyPages({"a": (shape, np.dtype(kind))})


def huge_kilobytes(array: np.ndarray) -> int:
    """What the system says that huge pages hold of the mapping that the array is in."""
    first = array.ctypes.data
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split()[0] and ":" not in line.split()[0]:
                begin, end = (int(part, 16) for part in line.split()[0].split("-"))
                inside = begin < first + array.nbytes and end > first
            elif inside and line.startswith("AnonHugePages"):
                total += int(line.split()[1])
    return total


def test_zeros_of_any_type_and_shape() -> None:
    pages = LazyPages({"a": ((1, 3, 70, 64), np.dtype(np.float16)), "b": ((1, 2, 5), np.dtype(np.uint8))})
    assert pages.arrays["a"].shape == (1, 3, 70, 64)
    assert pages.arrays["b"].dtype == np.uint8
    for array in pages.arrays.values():
        assert not array.any()
        assert array.ctypes.data % 64 == 0
        array[:] = 1
    assert all((array == 1).all() for array in pages.arrays.values()), "none lies over another"


@pytest.mark.parametrize("rows", [1, 3])
def test_pages_are_joined_when_half_of_them_is_used(rows: int) -> None:
    huge = huge_bytes()
    if huge == 0:
        pytest.skip("this system has no huge pages")
    places = 4 * huge // 64  # of each row
    pages = one((1, rows, places, 64), np.uint8)
    rng = np.random.default_rng(0)
    written = places // 8 * 5  # two and a half huge pages of a row
    values = rng.integers(0, 256, (1, rows, written, 64), np.uint8)
    array = pages.arrays["a"]
    array[:, :, :written] = values
    assert pages.join({"a": 1}) == 0
    assert pages.join({"a": written}) == 3 * rows
    if huge_kilobytes(array) == 0:
        pytest.skip("this system joins no pages")
    assert pages.join({"a": written}) == 0, "each only once"
    assert huge_kilobytes(array) == 3 * rows * huge // 1024
    assert np.array_equal(array[:, :, :written], values)
    assert not array[:, :, written:].any()


def test_small_arrays_share_a_huge_page() -> None:
    huge = huge_bytes()
    if huge == 0:
        pytest.skip("this system has no huge pages")
    form = ((1, 2, 1024, 64), np.dtype(np.uint8))  # 128 kB
    count = huge // (128 << 10)
    pages = LazyPages({str(i): form for i in range(count)})
    assert pages.join({str(i): 256 for i in range(count)}) == 0
    assert pages.join({str(i): 512 for i in range(count)}) == 1
    for i, array in enumerate(pages.arrays.values()):
        array[:] = i % 256
    assert all((array == i % 256).all() for i, array in enumerate(pages.arrays.values()))


def test_what_is_released_is_zero_and_the_others_stay() -> None:
    form = ((1, 1, 1000, 3), np.dtype(np.uint8))
    pages = LazyPages({"a": form, "b": form})
    for array in pages.arrays.values():
        array[:] = 7
    pages.release("a")
    assert not pages.arrays["a"].any()
    assert (pages.arrays["b"] == 7).all()


def test_nothing_is_joined_where_there_are_no_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "huge_bytes", lambda: 0)
    pages = one((1, 1, 1 << 17, 64), np.uint8)
    pages.arrays["a"][:] = 1
    assert pages.join({"a": 1 << 17}) == 0
    assert pages.arrays["a"].all()


def test_more_than_there_is_cannot_be_had() -> None:
    with pytest.raises(MemoryError):
        one((1, 1, 1 << 60, 64), np.float16)
