"""What makes an Arm bundle start on a bare device: run.sh, edgekit with kernels for it, and what else to install.

run.sh              installs into a folder of its own at the first start, and runs the bundle
requirements.txt    the light install in the versions that were tested
wheels/             edgekit for aarch64; with a wheelhouse, all the others too, and the empty file `complete`
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from edgekit.errors import DeviceError, UserError
from edgekit.export.wheel import write_wheel

RUN = Path(__file__).with_name("run.sh")
PYTHONS = ("3.11", "3.12", "3.13")  # of Debian 12, Ubuntu 24.04, Debian 13
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 26, 27, 28, 31)))


def add_starter(folder: Path, *, wheelhouse: bool) -> None:
    """Put run.sh, requirements.txt and wheels/ into a bundle's folder. With `wheelhouse` it will need no network.

    Raises UserError: zig or pip is missing, or a package has no wheel. DeviceError: the kernels do not compile.
    """
    wheels = folder / "wheels"
    wheel = write_wheel(wheels, "aarch64")
    (folder / "run.sh").write_bytes(RUN.read_bytes())
    (folder / "run.sh").chmod(0o755)
    version = wheel.name.split("-")[1]
    lines = [f"edgekit=={version}", *light_install()]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if wheelhouse:
        for python in PYTHONS:
            _download(light_install(), wheels, python)
        (wheels / "complete").write_text("", encoding="utf-8")


def light_install() -> list[str]:
    """The base install's packages, each in the version that is installed here: what this machine was tested with."""
    names = []
    for requirement in importlib.metadata.requires("edgekit") or []:
        if "extra ==" not in requirement:
            name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
            names.append(f"{name}=={importlib.metadata.version(name)}")
    return sorted(names)


def _download(requirements: list[str], wheels: Path, python: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--dest", str(wheels)]
    command += ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp"]
    command += [f"--abi={abi}" for abi in (f"cp{python.replace('.', '')}", "abi3", "none")]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    try:
        done = subprocess.run([*command, *requirements], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as problem:
        raise DeviceError(f"pip must run to fill a wheelhouse: {problem}") from problem
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-3:]
        raise UserError(
            f"the wheelhouse needs a wheel of each package for Python {python} on aarch64: {' '.join(last)}"
        )
