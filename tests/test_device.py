import dataclasses
import os
import platform
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit import device as device_module
from edgekit.device import Cluster, Device, Npu, known_devices, load_device, numbers
from edgekit.errors import DeviceError, UserError
from edgekit.host import cgroups, host_device, memory_limit

GB = 2**30


# The files in devices/


@pytest.mark.parametrize("name", known_devices())
def test_every_device_file_loads_under_its_own_name(name):
    device = load_device(name)
    assert device.name == name
    assert device.title
    assert device.isa


@pytest.mark.parametrize("name", known_devices())
def test_every_number_has_a_source_and_every_source_a_fact(name):
    device = load_device(name)
    facts = {key for key, _ in numbers(dataclasses.asdict(device))}
    for key in facts:
        assert key in device.sources or key.partition(".")[0] in device.sources, f"{name}: {key} has no source"
    names = {field.name for field in dataclasses.fields(Device) if getattr(device, field.name)} | {"isa"}
    for key, source in device.sources.items():
        assert source.strip()
        assert key in facts or key in names, f"{name}: the source of {key} has no fact"


def test_the_devices_that_we_ship():
    assert set(known_devices()) >= {"generic-x86", "pi5", "pi4", "pi-zero2w", "orange-pi5"}


@pytest.mark.parametrize(
    ("name", "has", "lacks", "threads"),
    [
        ("pi5", {"neon", "dotprod", "fp16"}, {"i8mm", "sve", "avx2"}, 4),
        ("pi4", {"neon"}, {"dotprod", "fp16", "lse"}, 4),
        ("pi-zero2w", {"neon"}, {"dotprod"}, 4),
        ("orange-pi5", {"neon", "dotprod", "fp16"}, {"i8mm"}, 4),
        ("generic-x86", {"avx2"}, {"avx512_vnni", "avx_vnni", "neon"}, None),
    ],
)
def test_capabilities_and_threads_of_known_devices(name, has, lacks, threads):
    device = load_device(name)
    assert all(device.has(feature) for feature in has)
    assert not any(device.has(feature) for feature in lacks)
    assert device.threads == threads


def test_read_bandwidth_by_threads():
    pi5 = load_device("pi5")
    assert [pi5.read_gbs(threads) for threads in (1, 2, 3, 4, 8)] == [13.8, 12.7, 12.7, 10.7, 10.7]
    assert load_device("pi4").read_gbs(4) is None


def test_devices_are_found_inside_an_installed_package_first(tmp_path, monkeypatch):
    module = tmp_path / "edgekit" / "device.py"
    for folder in (tmp_path / "devices", tmp_path / "edgekit" / "devices"):
        folder.mkdir(parents=True)
        (folder / f"{folder.parent.name}.toml").write_text("")
    monkeypatch.setattr(device_module, "__file__", str(module))
    assert known_devices() == ("edgekit",)


# Loading


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pi6", "did you mean 'pi5'"),
        ("orangepi5", "did you mean 'orange-pi5'"),
        ("zzz", "known are apple-m, generic-x86"),
        ("absent.toml", "absent.toml"),
        ("no/such", "no/such"),
    ],
)
def test_an_unknown_device_is_the_users_error(name, message):
    with pytest.raises(UserError, match=message):
        load_device(name)


MINIMAL = 'name = "mine"\ntitle = "t"\narch = "aarch64"\n[[clusters]]\ncore = "c"\n'


def test_a_device_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    assert load_device(path) == load_device(str(path)) == Device("mine", "t", "aarch64", (Cluster("c"),))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "must be TOML"),
        ("x = " + "[" * 100_000, "must be TOML"),
        (MINIMAL + "mhz = 1" + "0" * 400, "mhz is out of range"),
        ('name = "x"', "'title' is missing"),
        (MINIMAL + "core_count = 4", "unknown key 'core_count'"),
        (MINIMAL.replace("aarch64", "riscv64"), "must be one of x86_64, aarch64"),
        (MINIMAL.replace('[[clusters]]\ncore = "c"', "clusters = []"), "needs a cluster"),
        (MINIMAL + "little = true", "not little"),
        (MINIMAL + "count = 0", "clusters.count must be above zero: got 0"),
        (MINIMAL + "count = 1.5", "count must be an integer"),
        (MINIMAL + "mhz = nan", "clusters.mhz must be above zero"),
        (MINIMAL + "mhz = inf", "clusters.mhz must be above zero"),
        (MINIMAL + 'isa = ["dotproduct"]', "must be one of"),
        (MINIMAL + 'isa = ["neon", "avx2"]', "isa must be of aarch64: got 'avx2'"),
        ("ram_options_gb = [1, -1]\n" + MINIMAL, "ram_options_gb must be above zero"),
        (MINIMAL + "[bandwidth_read_gbs]\nall = 3", "keyed by thread count: got 'all'"),
        (MINIMAL + "[bandwidth_read_gbs]\n0 = 3", "keyed by thread count: got '0'"),
        (MINIMAL + '[npu]\nname = "n"\ntops = 0\ndtype = "int8"', "npu.tops must be above zero"),
    ],
)
def test_a_device_file_that_breaks_a_rule_is_refused_with_its_place(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_device(path)
    assert "mine.toml" in str(caught.value)


positive = st.floats(1e-6, 1e9)
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
devices = st.builds(
    Device,
    text,
    text,
    st.just("aarch64"),
    st.lists(
        st.builds(
            Cluster,
            text,
            st.none() | st.integers(1, 512),
            st.none() | positive,
            st.sampled_from([(), ("neon", "i8mm")]),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    ram_bytes=st.none() | st.integers(1, 2**60),
    ram_options_gb=st.lists(positive, max_size=3).map(tuple),
    bandwidth_read_gbs=st.dictionaries(st.integers(1, 999).map(str), positive, max_size=3),
    power_coverage=st.none() | text,
    npu=st.none() | st.builds(Npu, text, positive, text),
    sources=st.dictionaries(text, text, max_size=3),
)


@given(device=devices)
def test_to_toml_round_trip(tmp_path_factory, device):
    path = tmp_path_factory.mktemp("devices") / "x.toml"
    path.write_bytes(device.to_toml().encode())
    assert load_device(path) == device


@pytest.mark.parametrize("name", known_devices())
def test_known_devices_survive_to_toml(tmp_path, name):
    path = tmp_path / "copy.toml"
    path.write_text(load_device(name).to_toml())
    assert load_device(path) == load_device(name)


# This machine, from fake trees


def arm(*parts: str, features: str) -> str:
    """/proc/cpuinfo of an Arm system with one CPU for each part number."""
    blocks = (
        f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 3\n"
        for number, part in enumerate(parts)
    )
    return "\n".join([*blocks, "Revision\t: c03115\nModel\t\t: a board\n"])


def x86(cores: int, *, siblings: int = 1, flags: str = "fpu avx2 fma") -> str:
    """/proc/cpuinfo of a PC: the second hyperthreads follow all first ones."""
    return "\n".join(
        f"processor\t: {number}\nvendor_id\t: Intel\nmodel name\t: Some CPU\ncpu MHz\t\t: 799.9\nflags\t\t: {flags}\n"
        f"physical id\t: 0\ncore id\t\t: {number % cores}\n"
        for number in range(cores * siblings)
    )


A76 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
PI4 = {
    "proc/cpuinfo": arm(*["0xd08"] * 4, features="fp asimd evtstrm crc32 cpuid"),
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/meminfo": "MemTotal:        3885396 kB\nMemFree:  1 kB\n",
    **{f"sys/devices/system/cpu/cpu{number}/cpufreq/cpuinfo_max_freq": "1800000\n" for number in range(4)},
}
PI5 = {
    "proc/cpuinfo": arm(*["0xd0b"] * 4, features=A76),
    "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
    **{f"sys/devices/system/cpu/cpu{number}/cpufreq/cpuinfo_max_freq": "2400000\n" for number in range(4)},
}
RK3588 = {"proc/cpuinfo": arm(*["0xd05"] * 4, *["0xd0b"] * 4, features=A76)}
PC = {"proc/cpuinfo": x86(4, siblings=2, flags="fpu sse2 avx2 fma avx_vnni avx512_vnni")}
CONTAINER = {
    **PC,
    "proc/meminfo": "MemTotal: 16777216 kB\n",
    "proc/self/cgroup": "0::/\n",
    "sys/fs/cgroup/memory.max": f"{2 * GB}\n",
    "sys/fs/cgroup/cpu.max": "250000 100000\n",
}


def host(root: Path, files: dict[str, str]) -> Device:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return host_device(root)


def test_a_pi_4(tmp_path):
    device = host(tmp_path, PI4)
    assert (device.title, device.arch) == ("Raspberry Pi 4 Model B Rev 1.4", "aarch64")
    assert device.clusters == (Cluster("cortex-a72", 4, 1800.0, ("neon",)),)
    assert device.ram_bytes == 3885396 * 1024
    assert (device.threads, device.logical_cores, device.cpu_limit) == (4, 4, None)
    assert not device.has("dotprod")
    assert not device.has("lse")


def test_a_pi_5(tmp_path):
    device = host(tmp_path, PI5)
    assert device.clusters == (Cluster("cortex-a76", 4, 2400.0, ("neon", "dotprod", "fp16", "lse")),)
    assert device.ram_bytes is None
    assert device.has("dotprod")
    assert not device.has("i8mm")


def test_little_cores_are_no_threads(tmp_path):
    device = host(tmp_path, RK3588)
    assert [(one.core, one.count, one.little) for one in device.clusters] == [
        ("cortex-a55", 4, True),
        ("cortex-a76", 4, False),
    ]
    assert (device.threads, device.logical_cores) == (4, 8)


def test_where_all_cores_are_small_none_is_little(tmp_path):
    device = host(tmp_path, {"proc/cpuinfo": arm(*["0xd03"] * 4, features="fp asimd")})
    assert device.clusters == (Cluster("cortex-a53", 4, None, ("neon",)),)
    assert device.threads == 4


def test_unknown_cores_are_told_apart_by_their_capacity(tmp_path):
    cpuinfo = arm("0x805", "0x805", "0x804", "0x804", features=A76).replace("0x41", "0x51")
    capacity = {
        f"sys/devices/system/cpu/cpu{n}/cpu_capacity": f"{value}\n" for n, value in enumerate((380, 380, 900, 1024))
    }
    device = host(tmp_path, {"proc/cpuinfo": cpuinfo} | capacity)
    assert [(one.core, one.count, one.little) for one in device.clusters] == [
        ("0x51:0x805", 2, True),
        ("0x51:0x804", 2, False),
    ]


def test_intels_e_cores_are_little(tmp_path):
    device = host(tmp_path, {"proc/cpuinfo": x86(6), "sys/devices/cpu_atom/cpus": "2-3,5\n"})
    assert [(one.count, one.little) for one in device.clusters] == [(3, False), (3, True)]
    assert device.threads == 3


def test_a_pc_counts_physical_cores(tmp_path):
    device = host(tmp_path, PC)
    assert (device.title, device.arch) == ("Some CPU", "x86_64")
    assert (device.threads, device.logical_cores) == (4, 8)
    assert device.clusters[0].mhz is None
    assert device.isa == {"avx2", "fma", "avx_vnni", "avx512_vnni"}


@pytest.mark.parametrize(("allowed", "threads", "logical"), [("0-7", 4, 8), ("0,4", 1, 2), ("0-1,6", 3, 3)])
def test_cpus_outside_the_affinity_do_not_count(tmp_path, allowed, threads, logical):
    device = host(tmp_path, PC | {"proc/self/status": f"Name:\tx\nCpus_allowed_list:\t{allowed}\n"})
    assert (device.threads, device.logical_cores) == (threads, logical)


def test_a_container_is_as_small_as_its_cgroup(tmp_path):
    device = host(tmp_path, CONTAINER)
    assert (device.ram_bytes, device.cpu_limit, device.threads) == (2 * GB, 2.5, 2)
    assert device.logical_cores == 8


@pytest.mark.parametrize(
    ("files", "ram", "share"),
    [
        ({"sys/fs/cgroup/cpu.max": "max 100000\n", "sys/fs/cgroup/memory.max": "max\n"}, 16 * GB, None),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n", "sys/fs/cgroup/memory.max": f"{32 * GB}\n"}, 16 * GB, 0.5),
        # Version 2, nested: the tightest of all levels.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "100000 100000\n",
                "sys/fs/cgroup/a/b/memory.max": f"{GB}\n",
            },
            GB,
            1.0,
        ),
        # Version 1, where the container's own group is mounted as the root.
        (
            {
                "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:cpuset:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GB}\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3 * GB,
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n2:cpu:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            16 * GB,
            None,
        ),
    ],
)
def test_cgroup_limits_of_both_versions(tmp_path, files, ram, share):
    base = {key: value for key, value in CONTAINER.items() if not key.startswith("sys/")}
    device = host(tmp_path, base | files)
    assert (device.ram_bytes, device.cpu_limit) == (ram, share)
    assert device.threads == (4 if share is None else max(1, int(share)))


def test_cgroups_lead_from_the_own_group_to_the_mount(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("3:memory,pids:/a/b\n2:cpu:/c\n0::/../up\n4:memory://x\n")
    mount = tmp_path / "sys/fs/cgroup"
    v1 = mount / "memory,pids"
    assert cgroups(tmp_path, "memory") == [v1 / "a/b", v1 / "a", v1, mount, mount / "memory/x", mount / "memory"]


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("max", "4096\n", 4096),
        ("max", "max\n", None),
        ("max", "0\n", None),
        ("high", "8192\n", 8192),
        ("limit_in_bytes", "4096\n", 4096),
        ("limit_in_bytes", "9223372036854771712\n", None),
        ("limit_in_bytes", "-1\n", None),
    ],
)
def test_the_memory_limit_of_one_cgroup(tmp_path, name, text, limit):
    (tmp_path / f"memory.{name}").write_text(text)
    assert memory_limit(tmp_path) == limit


def test_no_flags_means_no_features(tmp_path):
    cpuinfo = "processor\t: 0\nvendor_id\t: GenuineIntel\n\nprocessor\t: 1\nvendor_id\t: GenuineIntel\n"
    device = host(tmp_path, {"proc/cpuinfo": cpuinfo})
    assert device.clusters == (Cluster("unknown", 2),)
    assert device.isa == frozenset()
    assert device.threads == 2


def test_without_proc_only_the_number_of_cpus_is_known(tmp_path):
    device = host_device(tmp_path)
    assert device.clusters == (Cluster("unknown", os.cpu_count()),)
    assert (device.ram_bytes, device.cpu_limit, device.title) == (None, None, "this machine")


@pytest.mark.parametrize("machine", ["riscv64", "armv7l", ""])
def test_a_foreign_architecture_is_refused(tmp_path, monkeypatch, machine):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(DeviceError, match=f"this machine is '{machine}'"):
        host(tmp_path, {"proc/cpuinfo": "processor\t: 0\nhart\t\t: 1\n"})


@given(content=st.text(max_size=300))
def test_foreign_text_never_breaks_the_detection(tmp_path_factory, content):
    root = tmp_path_factory.mktemp("root")
    for name in ("proc/cpuinfo", "proc/meminfo", "proc/self/cgroup", "proc/self/status", "sys/devices/cpu_atom/cpus"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode(errors="replace"))
    assert host_device(root).threads >= 1


def test_this_machine():
    device = host_device()
    assert 1 <= device.threads <= device.logical_cores
    assert device.ram_bytes > 0
    assert set(device.sources) >= {key.partition(".")[0] for key, _ in numbers(dataclasses.asdict(device))}


def test_the_fingerprint_tells_machines_apart(tmp_path):
    pi5 = host(tmp_path / "pi5", PI5)
    container = host(tmp_path / "container", CONTAINER)
    assert pi5.fingerprint() == {
        "device": "Raspberry Pi 5 Model B Rev 1.0",
        "arch": "aarch64",
        "cores": "4 x cortex-a76",
        "isa": "dotprod fp16 lse neon",
    }
    assert container.fingerprint()["ram"] == "2.1 GB"
    assert container.fingerprint()["cpu limit"] == "2.5"
