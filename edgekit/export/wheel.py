"""A wheel of edgekit itself with the kernels of another processor: what a device installs, packed where it is exported.

The package is Python but for one library, so a wheel for another machine is the installed files with that machine's
library in the place of ours. The same inputs give the same bytes.

    python -m edgekit.export.wheel FOLDER        wheels for x86-64 and 64-bit Arm, both compiled by zig
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import platform
import re
import sys
import zipfile
from pathlib import Path
from typing import get_args

import edgekit
from edgekit.device import Arch, devices_folder
from edgekit.errors import UserError
from edgekit.folder import digest
from edgekit.kernels.build import CSRC, GLIBC, build_for
from edgekit.kernels.library import NAME, library_path
from edgekit.model.builtin import cache_folder

EARLIEST = (1980, 1, 1, 0, 0, 0)  # of a zip file


def write_wheel(folder: Path, arch: Arch, *, by_zig: bool = False) -> Path:
    """Pack edgekit for Linux on `arch` into `folder`; returns the wheel, whose tag names the C library that it needs.

    On a machine of that kind the installed kernels are packed, unless `by_zig`.
    Raises UserError: compiling for another processor needs ziglang. DeviceError: the compiler failed.
    """
    library = kernels_for(arch, by_zig=by_zig)
    tag = f"py3-none-manylinux_2_{needed_glibc(library.read_bytes())}_{arch}"
    found = importlib.metadata.distribution("edgekit")
    info = f"edgekit-{found.version}.dist-info"
    package = Path(edgekit.__file__).parent
    sources = {f"edgekit/{path.relative_to(package).as_posix()}": path for path in sorted(package.rglob("*"))}
    sources |= {f"edgekit/devices/{path.name}": path for path in sorted(devices_folder().glob("*.toml"))}
    sources[f"edgekit/kernels/{NAME}"] = library
    files = {
        name: path.read_bytes()
        for name, path in sources.items()
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    for name in ("METADATA", "entry_points.txt"):
        files[f"{info}/{name}"] = (found.read_text(name) or "").encode()
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: edgekit\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    rows = [f"{name},sha256={_short_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"edgekit-{found.version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, EARLIEST)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, content)
    return wheel


def needed_glibc(library: bytes) -> int:
    """The minor version of glibc 2 that a library asks for: the newest that its symbols name, and 17 at least."""
    return max([17, *(int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", library))])


def kernels_for(arch: Arch, *, by_zig: bool = False) -> Path:
    """The kernel library for `arch`: the installed one on such a machine, else one from zig, which is kept.

    Raises as `write_wheel`.
    """
    installed = library_path()
    if platform.machine() == arch and installed is not None and not by_zig:
        return installed
    sources = "".join(digest(path) for path in sorted(CSRC.iterdir()) if path.is_file())
    name = hashlib.sha256(f"{sources}{GLIBC}".encode()).hexdigest()[:16]
    kept = cache_folder() / f"kernels-{arch}-{name}.so"
    if not kept.is_file():
        build_for(arch, kept)
    return kept


def _short_digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("say where the wheels go: python -m edgekit.export.wheel FOLDER")
    for arch in get_args(Arch):
        print(write_wheel(Path(sys.argv[1]), arch, by_zig=True))


if __name__ == "__main__":
    main()
