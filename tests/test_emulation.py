"""The programs that run us on emulated processors say what they lack."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("mmdebstrap", "emulation needs mmdebstrap: apt-get install mmdebstrap qemu-user-static"),
        ("qemu-aarch64-static", "emulation needs qemu-aarch64-static: apt-get install"),
    ],
)
def test_a_missing_emulator_is_named(
    missing: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else f"/usr/bin/{name}")
    assert loaded(HERE / "native" / "emulated.py").main(tmp_path / "bundle", tmp_path / "work") == 5
    assert message in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_so_it_is_where_kernels_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert loaded(HERE / "native" / "arm.py").main(tmp_path / "work") == 5
    assert "emulation needs qemu-aarch64-static: apt-get install qemu-user-static" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_counting_needs_an_emulator_that_takes_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="needs qemu-aarch64 with plugins: apt-get install qemu-user"):
        loaded(HERE.parent / "benchmarks" / "instructions.py").Emulator(tmp_path, "cortex-a76")


def test_a_bundle_without_its_wheel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where it was exported without zig."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for part in ("userland/usr/bin/python3", "site/onnxruntime/x"):
        (tmp_path / "work" / part).parent.mkdir(parents=True)
        (tmp_path / "work" / part).touch()
    assert loaded(HERE / "native" / "emulated.py").main(tmp_path / "bundle", tmp_path / "work") == 2
    assert "must hold edgekit for aarch64" in capsys.readouterr().out
