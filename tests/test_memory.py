import mmap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.profile.memory import Memory, PeakMemory, available_bytes, mapped_bytes, read_faults, read_memory

ROLLUP = """5594b9252000-7ffcb24d5000 ---p 00000000 00:00 0                          [rollup]
Rss:              900 kB
Pss:              700 kB
Pss_Dirty:        310 kB
Pss_Anon:         300 kB
Pss_File:         390 kB
Pss_Shmem:         10 kB
Private_Dirty:    310 kB
"""
STATUS = "Name:\tpython\nVmPeak:\t    5000 kB\nVmSize:\t    4000 kB\nVmHWM:\t    1200 kB\nVmRSS:\t     896 kB\n"
OLD_ROLLUP = "\n".join(line for line in ROLLUP.splitlines() if "Pss_" not in line)


def grow(root: Path, files: dict[str, str]) -> Path:
    """Write a fake file system below `root`."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def kb(*numbers: int | None) -> Memory:
    return Memory(*(None if number is None else number * 1024 for number in numbers))


@pytest.mark.parametrize(
    ("files", "memory"),
    [
        ({"smaps_rollup": ROLLUP, "status": STATUS}, kb(900, 700, 310, 390, 1200)),
        ({"smaps_rollup": OLD_ROLLUP, "status": STATUS}, kb(900, 700, None, None, 1200)),
        ({"status": STATUS}, kb(896, None, None, None, 1200)),
        ({"smaps_rollup": ROLLUP}, kb(900, 700, 310, 390, None)),
        ({"smaps_rollup": "Rss: much\nPss:   kB\n", "status": "VmRSS:\t-1 kB\nVmHWM 3 kB\n"}, kb(*[None] * 5)),
        ({}, kb(*[None] * 5)),
    ],
)
def test_each_figure_is_read_or_none(tmp_path, files, memory):
    grow(tmp_path, {f"proc/self/{name}": text for name, text in files.items()})
    assert read_memory(tmp_path) == memory


def test_another_process_is_read_by_its_number(tmp_path):
    grow(tmp_path, {"proc/77/status": STATUS})
    assert read_memory(tmp_path, pid=77).rss_bytes == 896 * 1024
    assert read_memory(tmp_path, pid=78) == kb(*[None] * 5)


def test_anonymous_memory_is_private_and_a_mapped_file_is_not(tmp_path):
    size = 32 << 20
    (tmp_path / "weights").write_bytes(bytes(size))
    before = read_memory()
    if before.private_bytes is None:
        pytest.skip("this kernel does not split PSS")
    anonymous = bytearray(b"\1") * size
    with (tmp_path / "weights").open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[::4096]) == 0
        now = read_memory()
    assert now.private_bytes - before.private_bytes == pytest.approx(len(anonymous), rel=0.1)
    assert now.file_bytes - before.file_bytes == pytest.approx(size, rel=0.1)
    assert now.private_bytes + now.file_bytes == pytest.approx(now.pss_bytes, abs=4096)


GB = 2**30
MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: 8388608 kB\n"
V2 = "0::/user.slice/app\n"
UNLIMITED = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 8 * GB),
        # Version 2: the group's own limit, then one above it, then a soft limit that throttles.
        ({"app/memory.max": f"{4 * GB}\n", "app/memory.current": f"{GB}\n"}, 3 * GB),
        ({"app/memory.max": "max\n", "app/memory.current": f"{GB}\n"}, 8 * GB),
        (
            {
                "app/memory.max": f"{4 * GB}\n",
                "app/memory.current": f"{GB}\n",
                "memory.max": f"{5 * GB}\n",
                "memory.current": f"{3 * GB}\n",
            },
            2 * GB,
        ),
        (
            {
                "app/memory.max": f"{4 * GB}\n",
                "app/memory.high": f"{2 * GB}\n",
                "app/memory.current": f"{GB}\n",
            },
            GB,
        ),
        # Cache that was read once and can go counts as free; more than the limit in use leaves nothing.
        (
            {
                "app/memory.max": f"{4 * GB}",
                "app/memory.current": f"{4 * GB}",
                "app/memory.stat": f"anon 5\ninactive_file {3 * GB}\n",
            },
            3 * GB,
        ),
        ({"app/memory.max": f"{GB}\n", "app/memory.current": f"{2 * GB}\n"}, 0),
        ({"app/memory.max": f"{GB}\n"}, 8 * GB),
    ],
)
def test_available_is_the_least_bound_of_version_2(tmp_path, files, available):
    if files and "proc/meminfo" not in files:
        files = {f"sys/fs/cgroup/user.slice/{name}": text for name, text in files.items()}
        files |= {"proc/self/cgroup": V2, "proc/meminfo": MEMINFO}
    assert available_bytes(grow(tmp_path, files)) == available


@pytest.mark.parametrize("folder", ["memory/docker/abc", "memory/docker", "memory"])
def test_version_1_is_walked_up_to_its_root(tmp_path, folder):
    group = f"sys/fs/cgroup/{folder}"
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "9:name=systemd:/\n4:memory:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{9 * GB}\n",
        f"{group}/memory.limit_in_bytes": f"{3 * GB}\n",
        f"{group}/memory.usage_in_bytes": f"{2 * GB}\n",
        f"{group}/memory.stat": f"inactive_file 7\ntotal_inactive_file {GB}\n",
    }
    assert available_bytes(grow(tmp_path, files)) == 2 * GB


def test_a_path_out_of_the_cgroup_mount_is_not_followed(tmp_path):
    files = {
        "proc/self/cgroup": "0::/../../../etc\n4:memory://etc\n",
        "etc/memory.max": "1\n",
        "etc/memory.current": "1\n",
        "sys/fs/cgroup/memory.max": f"{GB}\n",
        "sys/fs/cgroup/memory.current": "0\n",
    }
    assert available_bytes(grow(tmp_path, files)) == GB


@pytest.mark.parametrize(("limit", "available"), [("unlimited", 8 * GB), (str(GB), GB - 4000 * 1024), ("1000", 0)])
def test_the_address_space_limit_counts(tmp_path, limit, available):
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/status": STATUS,
        "proc/self/limits": f"Limit   Soft Limit  Hard Limit Units\nMax address space   {limit}   unlimited   bytes\n",
    }
    assert available_bytes(grow(tmp_path, files)) == available


@given(text=st.text(max_size=200))
def test_foreign_text_never_breaks_a_reading(tmp_path_factory, text):
    names = ("meminfo", "self/status", "self/smaps_rollup", "self/limits", "self/cgroup")
    root = tmp_path_factory.mktemp("proc")
    for name in names:
        path = root / "proc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode(errors="replace"))
    assert available_bytes(root) is None or available_bytes(root) >= 0
    assert isinstance(read_memory(root), Memory)


def test_this_machine_has_memory_to_give():
    assert available_bytes() > 0
    assert read_memory().rss_bytes > 1 << 20


def test_the_peak_is_seen_and_lower_ends_are_not(tmp_path):
    proc = grow(tmp_path, {"proc/self/smaps_rollup": ROLLUP, "proc/self/status": STATUS})
    with PeakMemory(hz=1000, root=proc) as peak:
        grow(proc, {"proc/self/smaps_rollup": ROLLUP.replace("Pss:              700", "Pss:             5000")})
        readings = peak.n
        deadline = time.monotonic() + 5
        while peak.n < readings + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        grow(proc, {"proc/self/smaps_rollup": ROLLUP})
    assert peak.peak_pss_bytes == 5000 * 1024
    assert (peak.peak_rss_bytes, peak.peak_private_bytes, peak.peak_file_bytes) == (900 * 1024, 310 * 1024, 390 * 1024)


@pytest.mark.parametrize(("after", "rss"), [("1200", 900), ("9000", 9000)])
def test_the_kernels_peak_counts_only_when_the_block_set_it(tmp_path, after, rss):
    proc = grow(tmp_path, {"proc/self/smaps_rollup": ROLLUP, "proc/self/status": STATUS})
    with PeakMemory(hz=0.01, root=proc) as peak:
        grow(proc, {"proc/self/status": STATUS.replace("1200", after)})
    assert peak.peak_rss_bytes == rss * 1024
    assert peak.n == 2


def test_a_system_that_tells_nothing_gives_none(tmp_path):
    with PeakMemory(hz=0.01, root=tmp_path) as peak:
        pass
    assert (peak.peak_rss_bytes, peak.peak_pss_bytes, peak.peak_private_bytes, peak.peak_file_bytes) == (None,) * 4


def test_an_error_in_the_block_ends_the_thread_and_passes_on():
    with pytest.raises(ZeroDivisionError), PeakMemory() as peak:
        raise ZeroDivisionError
    assert not peak._thread.is_alive()


SMAPS = """55d5dc9a6000-55d5dca00000 r--p 00000000 08:01 4242     /usr/lib/libfoo.so.1
Rss:                 100 kB
Pss:                  40 kB
55d5dca00000-55d5dcb00000 r-xp 00000000 08:01 4242     /usr/lib/libfoo.so.1
Pss:                   2 kB
7f0000000000-7f0000001000 r--s 00000000 08:01 77       /data/a model/model.onnx.data
Pss:                 900 kB
7f0000100000-7f0000200000 rw-p 00000000 00:00 0
Pss:                  64 kB
Pss_Dirty:            64 kB
7ffe88b6d000-7ffe88b8e000 rw-p 00000000 00:00 0                          [stack]
Pss:                  12 kB
"""


def test_mappings_are_added_up_by_what_backs_them(tmp_path):
    grow(tmp_path, {"proc/self/smaps": SMAPS})
    assert mapped_bytes(tmp_path) == {
        "/usr/lib/libfoo.so.1": 42 * 1024, "/data/a model/model.onnx.data": 900 * 1024, "": 64 * 1024, "[stack]": 12 *
        1024,
    }  # fmt: skip
    assert mapped_bytes(tmp_path / "absent") == {}


def test_the_mappings_of_this_process_add_up_to_its_pss():
    whole = read_memory().pss_bytes
    if whole is None:
        pytest.skip("this kernel does not tell PSS")
    assert sum(mapped_bytes().values()) == pytest.approx(whole, rel=0.05)


def test_faults_only_rise_and_fresh_pages_make_them():
    before = read_faults()
    with mmap.mmap(-1, 4 << 20) as pages:
        for at in range(0, len(pages), 4096):
            pages[at] = 1
    after = read_faults()
    assert after.minor > before.minor
    assert after.major >= before.major


def test_readings_are_kept_also_those_after_the_block(tmp_path):
    proc = grow(tmp_path, {"proc/self/smaps_rollup": ROLLUP, "proc/self/status": STATUS})
    with PeakMemory(hz=0.01, root=proc) as peak:
        pass
    grow(proc, {"proc/self/smaps_rollup": ROLLUP.replace("Pss:              700", "Pss:             5000")})
    assert peak.look().pss_bytes == peak.peak_pss_bytes == 5000 * 1024
    assert [memory.pss_bytes for _, memory in peak.history] == [700 * 1024, 700 * 1024, 5000 * 1024]
    assert peak.history == sorted(peak.history, key=lambda reading: reading[0])
