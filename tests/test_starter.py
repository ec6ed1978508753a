"""What starts an Arm bundle on a bare device: the wheel, run.sh against a fake system, the wheelhouse's errors."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from edgekit.errors import UserError
from edgekit.export import starter, wheel
from edgekit.export.starter import RUN, add_starter, light_install
from edgekit.export.wheel import write_wheel


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels that somebody compiled, so that none are compiled here."""
    library = tmp_path / "kernels.so"
    library.write_bytes(b"\x7fELF kernels GLIBC_2.4 GLIBC_2.31 GLIBC_2.17")
    monkeypatch.setattr(wheel, "kernels_for", lambda arch, by_zig: library)
    return library


def test_a_wheel_holds_the_package_the_devices_and_the_other_machines_kernels(
    no_compiler: Path, tmp_path: Path
) -> None:
    path = write_wheel(tmp_path / "wheels", "aarch64")
    assert path.name.endswith("-py3-none-manylinux_2_31_aarch64.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        assert {"edgekit/runtime/session.py", "edgekit/devices/pi5.toml", "edgekit/recipes/int4.toml"} <= names
        assert archive.read("edgekit/kernels/_edgekit_kernels.so") == no_compiler.read_bytes()
        assert not any("__pycache__" in name for name in names)
        (record,) = (name for name in names if name.endswith("/RECORD"))
        for line in archive.read(record).decode().splitlines():
            name, digest, size = line.rsplit(",", 2)
            if digest:
                found = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).rstrip(b"=").decode()
                assert (digest, int(size)) == (f"sha256={found}", len(archive.read(name)))
                names.remove(name)
    assert names == {record}


@pytest.mark.parametrize(("needs", "minor"), [(b"", 17), (b"GLIBC_2.2.5", 17), (b"GLIBC_2.14 GLIBC_2.35", 35)])
def test_a_wheels_tag_names_the_c_library_that_its_kernels_need(
    needs: bytes, minor: int, no_compiler: Path, tmp_path: Path
) -> None:
    """Kernels that a machine built for itself may need a newer one than those that zig builds."""
    no_compiler.write_bytes(b"\x7fELF" + needs)
    assert f"manylinux_2_{minor}_x86_64" in write_wheel(tmp_path / "wheels", "x86_64").name


def test_the_same_package_gives_the_same_bytes(no_compiler: Path, tmp_path: Path) -> None:
    first, second = (write_wheel(tmp_path / name, "aarch64").read_bytes() for name in ("one", "two"))
    assert first == second


def test_a_starter_names_every_base_package_in_one_version(no_compiler: Path, tmp_path: Path) -> None:
    add_starter(tmp_path / "bundle", wheelhouse=False)
    lines = (tmp_path / "bundle/requirements.txt").read_text().splitlines()
    assert [line.split("==")[0] for line in lines] == [
        "edgekit", "click", "jinja2", "numpy", "onnxruntime", "psutil", "rich", "tokenizers",
    ]  # fmt: skip
    assert os.access(tmp_path / "bundle/run.sh", os.X_OK)
    assert not (tmp_path / "bundle/wheels/complete").exists()


def test_a_wheelhouse_that_cannot_be_filled_says_which_python(
    no_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="needs a wheel of each package for Python 3\\.11"):
        add_starter(tmp_path / "bundle", wheelhouse=True)


def fake_system(tmp_path: Path, *, machine: str = "aarch64", python: str = "exit 0") -> dict[str, str]:
    """A PATH whose uname, python3 and pip are scripts; pip and edgekit write down how they were called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    calls = tmp_path / "calls"
    scripts = {
        "uname": f"echo {machine}",
        "python3": f"""case "$*" in
            "-m venv"*) mkdir -p "$3/bin"; for tool in pip edgekit; do
                printf '#!/bin/sh\\necho "${{0##*/}} $*" >> {calls}\\n' > "$3/bin/$tool"
                chmod +x "$3/bin/$tool"; done;;
            -c*) {python};;
            *) echo Python 3.9.2;; esac""",
        "taskset": 'shift 2; exec "$@"',
    }
    for name, body in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    return {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path / "home")}


def start(tmp_path: Path, *words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    bundle = tmp_path / "bundle"
    (bundle / "wheels").mkdir(parents=True, exist_ok=True)
    (bundle / "run.sh").write_bytes(RUN.read_bytes())
    (bundle / "requirements.txt").write_text("\n".join(light_install()))
    return subprocess.run(
        ["sh", str(bundle / "run.sh"), *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("offline", [False, True])
def test_run_sh_installs_once_and_runs_the_bundle(offline: bool, tmp_path: Path) -> None:
    environment, bundle = fake_system(tmp_path), tmp_path / "bundle"
    (bundle / "wheels").mkdir(parents=True)
    if offline:
        (bundle / "wheels/complete").touch()
    for words in ((), ("Why?", "--max-tokens", "4")):
        done = start(tmp_path, *words, environment=environment)
        assert (done.returncode, done.stderr) == (0, "")
    install, chat, run = (tmp_path / "calls").read_text().splitlines()
    assert f"--find-links {bundle}/wheels --requirement {bundle}/requirements.txt" in install
    assert ("--no-index" in install) == offline
    assert chat == f"edgekit chat {bundle}"
    assert run == f"edgekit run {bundle} Why? --max-tokens 4"


@pytest.mark.parametrize(
    ("system", "rule"),
    [
        ({"machine": "x86_64"}, "this bundle is for 64-bit Arm (aarch64), and this is x86_64"),
        ({"machine": "armv7l"}, "and this is armv7l"),
        ({"python": "exit 1"}, "Python 3.11 or newer is needed, and this is Python 3.9.2"),
    ],
)
def test_run_sh_says_what_the_device_lacks(tmp_path: Path, system: dict[str, str], rule: str) -> None:
    done = start(tmp_path, environment=fake_system(tmp_path, **system))
    assert done.returncode == 5
    assert rule in done.stderr
