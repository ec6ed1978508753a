"""The kernel library for another machine, compiled here.

zig, from the package `ziglang`, compiles C++ for any processor and brings the C++ library with it. What it makes needs
glibc 2.31 (Debian 11, Ubuntu 20.04) or newer. The first build for a processor takes minutes, for zig then compiles its
own libraries; they stay in its cache, and later builds take seconds.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from edgekit.device import Arch
from edgekit.errors import DeviceError, UserError

CSRC = Path(__file__).with_name("csrc")
GLIBC = "2.31"

# As in CMakeLists.txt.
_COMPILE = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", f"-I{CSRC}")
_SHARED = ("-shared", "-s", "-Wl,--gc-sections", f"-Wl,--version-script={CSRC / 'exports.map'}")
_STATIC = ("-static", "-s")


def build_for(arch: Arch, output: Path) -> None:
    """Compile the kernel library with all of a processor family's paths, and put it at `output`.

    Raises UserError: ziglang is not installed. DeviceError: the compiler failed; the message ends with what it said.
    """
    compile_units(arch, sorted(CSRC.glob("*.cpp")), output)


def compile_units(arch: Arch, units: Sequence[Path], output: Path, *, program: bool = False) -> None:
    """Compile C++ files into a shared library, or into a program that needs no library at all where it runs."""
    if importlib.util.find_spec("ziglang") is None:
        raise UserError(f"compiling kernels for {arch} needs zig: pip install 'edgekit[cross]'")
    zig = (sys.executable, "-m", "ziglang", "c++", "-target", f"{arch}-linux-{'musl' if program else f'gnu.{GLIBC}'}")
    flags = path_flags(arch)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [f"{folder}/{unit.stem}.o" for unit in units]

        def compile_unit(unit: Path, built: str) -> None:
            _run(*zig, *_COMPILE, *flags.get(unit.stem.removeprefix("path_"), ()), "-c", str(unit), "-o", built)

        list(pool.map(compile_unit, units, objects))
        whole = f"{folder}/{output.name}"
        _run(*zig, *(_STATIC if program else _SHARED), *objects, "-o", whole)
        os.replace(whole, output)


def path_flags(arch: Arch) -> dict[str, list[str]]:
    """The compiler flags of each path of a processor family, from csrc/paths.txt, as zig spells them."""
    rows = [line.split() for line in (CSRC / "paths.txt").read_text().splitlines() if line and line[0] != "#"]
    # zig has no -march for Arm; its -mcpu takes the same features.
    return {
        name: [flag.replace("-march=armv8.2-a", "-mcpu=generic") for flag in flags]
        for name, family, *flags in rows
        if family == arch
    }


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        raise DeviceError(f"the kernels must compile: {' '.join(command[1:])} said\n{done.stderr.strip()[-2000:]}")
