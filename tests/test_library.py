from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import onnxruntime as ort
import pytest

from edgekit.device import Arch
from edgekit.errors import DeviceError, UserError
from edgekit.kernels import build, library

BUILT = library.library_path()
HERE = library._MACHINES[os.uname().machine]
ELSEWHERE = next(number for number in library._MACHINES.values() if number != HERE)
needs_library = pytest.mark.skipif(BUILT is None, reason="no kernel library: this install found no C++ compiler")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place for a library, and EDGEKIT_KERNELS naming it."""
    path = tmp_path / "kernels.so"
    monkeypatch.setenv("EDGEKIT_KERNELS", str(path))
    return path


def register() -> bool:
    return library.register(ort.SessionOptions(), decode_threads=1, prefill_threads=1)


def elf(*, machine: int = HERE, word_size: int = 2, sections_end: int = 64) -> bytes:
    """The header of a library whose table of sections ends at `sections_end`, padded to 64 bytes."""
    head = bytearray(64)
    head[:6] = b"\x7fELF" + bytes([word_size, 1])
    head[18:20] = machine.to_bytes(2, "little")
    head[40:48] = (sections_end - 64).to_bytes(8, "little")
    head[58:60] = (64).to_bytes(2, "little")
    head[60:62] = (1).to_bytes(2, "little")
    return bytes(head)


def test_off_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_KERNELS", "off")
    assert library.library_path() is None
    assert not register()
    assert library.path_name() is None
    assert library.known_paths() == []
    assert library.status() == "no native kernels: EDGEKIT_KERNELS is off; onnxruntime's own operators run"
    with pytest.raises(UserError, match="without kernels"):
        library.choose_path("portable")


def test_an_install_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGEKIT_KERNELS", raising=False)
    monkeypatch.setattr("edgekit.kernels.__path__", [str(tmp_path)])
    assert library.library_path() is None
    assert not register()
    assert "found no C++ compiler" in library.status()


def test_the_library_may_lie_apart_from_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EDGEKIT_KERNELS", raising=False)
    (tmp_path / library.NAME).touch()
    monkeypatch.setattr("edgekit.kernels.__path__", [str(tmp_path / "sources"), str(tmp_path)])
    assert library.library_path() == tmp_path / library.NAME


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "not a 64-bit shared library"),
        (b"#!/bin/sh\n" * 20, "not a 64-bit shared library"),
        (elf(word_size=1), "not a 64-bit shared library"),
        (elf(machine=ELSEWHERE), "is for (aarch64|x86_64), and this is"),
        (elf(machine=9999), "is for machine 9999"),
        (elf(sections_end=65), "is cut off: it has 64 bytes of 65"),
        (elf(), "the kernel library must load"),
    ],
)
def test_a_file_that_is_no_library_is_an_error(named: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        named.write_bytes(content)
    with pytest.raises(DeviceError, match=message):
        register()
    assert library.status().startswith("broken native kernels: the kernel library must load: ")


@needs_library
@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_a_library_that_is_cut_off_is_an_error(named: Path, kept: float) -> None:
    assert BUILT is not None
    whole = BUILT.read_bytes()
    named.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(DeviceError, match="is cut off"):
        register()


def test_a_library_of_something_else_is_an_error(named: Path) -> None:
    import _ctypes

    shutil.copy(_ctypes.__file__, named)
    with pytest.raises(DeviceError, match="edgekit_set_threads"):
        register()


@needs_library
def test_registers_and_names_its_path() -> None:
    assert register()
    assert library.path_name() in library.known_paths()
    assert library.known_paths()[-1] == "portable"
    assert library.status() == f"native kernels, {library.path_name()} path"


@needs_library
def test_every_known_path_can_be_chosen_and_no_other() -> None:
    before = library.path_name()
    assert before is not None
    try:
        for name in library.known_paths():
            library.choose_path(name)
            assert library.path_name() == name
        with pytest.raises(UserError, match=r"a path must be one of .*portable: got 'sse9'"):
            library.choose_path("sse9")
        assert library.path_name() == library.known_paths()[-1]
    finally:
        library.choose_path(before)


@needs_library
def test_ctypes_and_onnxruntime_share_one_library() -> None:
    assert BUILT is not None
    assert register()
    starts = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(BUILT.resolve()))]
    assert [line.split()[2] for line in starts].count("00000000") == 1


@needs_library
def test_its_names_stay_its_own() -> None:
    """Nothing in it may meet what another library of the process calls by the same name."""
    library.path_name()
    assert not hasattr(ctypes.CDLL(None), "edgekit_path")


@needs_library
def test_a_relative_name_is_of_this_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The system's loader would look for a bare name in its own folders."""
    assert BUILT is not None
    (tmp_path / "kernels.so").symlink_to(BUILT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEKIT_KERNELS", "kernels.so")
    assert register()


def test_flags_of_paths_are_of_units_that_exist() -> None:
    for arch in get_args(Arch):
        flags = build.path_flags(arch)
        assert flags
        for name in flags:
            assert (build.CSRC / f"path_{name}.cpp").is_file()
    assert build.path_flags("aarch64")["neon_dotprod"] == ["-mcpu=generic+dotprod"]


def test_cross_compiling_needs_zig(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"needs zig: pip install 'edgekit\[cross\]'"):
        build.build_for("aarch64", tmp_path / "kernels.so")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_path_agrees_with_the_definition(tmp_path: Path) -> None:
    """The driver of tests/native, on every path of this processor: the sanitizers' run without sanitizers."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    root = Path(__file__).parents[1]
    subprocess.run(["cmake", "-S", root, "-B", tmp_path, "-DEDGEKIT_DRIVER=ON"], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path, "--target", "driver"], check=True, capture_output=True)
    for mode in ("full", "threads"):
        done = subprocess.run([tmp_path / "driver", mode], check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", get_args(Arch))
def test_compiles_for_both_processor_families(tmp_path: Path, arch: Arch) -> None:
    pytest.importorskip("ziglang")
    build.build_for(arch, tmp_path / "kernels.so")
    head = (tmp_path / "kernels.so").read_bytes()[:20]
    assert int.from_bytes(head[18:20], "little") == library._MACHINES[arch]
    assert (tmp_path / "kernels.so").stat().st_size < 2_000_000
