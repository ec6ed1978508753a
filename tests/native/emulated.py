"""Runs an Arm bundle on emulated processors, under Debian's arm64 Python with the real wheels for Arm and its own.

    python tests/native/emulated.py BUNDLE build/arm64

The greedy tokens must be those of this machine, on every processor; an instruction that a processor lacks ends the
program. Needs mmdebstrap and qemu-aarch64-static (Debian: mmdebstrap, qemu-user-static). Userland and wheels stay in
the folder. edgekit with its kernels is the wheel in the bundle. All are unpacked here: only the program runs
emulated.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("numpy", "onnxruntime", "tokenizers", "jinja2", "click", "psutil", "rich")
PYTHON = "3.11"
SYSTEM = "bookworm"  # whose Python that is: the oldest that we support
DEBIAN = "python3,libstdc++6,libgomp1,zlib1g,libffi8"
PROMPT = "The capital of France is"
TOKENS = 16

# What /proc/cpuinfo says on each processor. onnxruntime reads it, and ends with the host's where it finds x86 in it.
PROCESSORS = {
    "cortex-a53": ("0xd03", "fp asimd evtstrm crc32 cpuid"),
    "cortex-a72": ("0xd08", "fp asimd evtstrm crc32 cpuid"),
    "cortex-a76": ("0xd0b", "fp asimd evtstrm crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"),
    "max": ("0xd4f", "fp asimd evtstrm crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp i8mm bf16"),
}


def main(bundle: Path, folder: Path) -> int:
    for program in ("mmdebstrap", "qemu-aarch64-static"):
        if shutil.which(program) is None:
            print(f"emulation needs {program}: apt-get install mmdebstrap qemu-user-static", file=sys.stderr)
            return 5
    folder.mkdir(parents=True, exist_ok=True)
    userland, site = folder / "userland", folder / "site"
    if not (userland / "usr/bin/python3").exists():
        shutil.rmtree(userland, ignore_errors=True)
        run("mmdebstrap", "--variant=extract", "--architectures=arm64", f"--include={DEBIAN}", SYSTEM, str(userland))
    if not (site / "onnxruntime").exists():
        install(site)
    wheels = sorted((bundle / "wheels").glob("edgekit-*_aarch64.whl"))
    if not wheels:
        print(f"{bundle} must hold edgekit for aarch64: export it with ziglang installed (the extra [cross])")
        return 2
    shutil.rmtree(site / "edgekit", ignore_errors=True)
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(site)
    words = ("run", str(bundle.resolve()), PROMPT, "--raw", "--max-tokens", str(TOKENS), "--threads", "1", "--json")
    wanted = text_of(subprocess.run([sys.executable, "-c", START, *words], capture_output=True, text=True, check=True))
    print(f"this machine: {wanted!r}")
    failed = False
    for processor, (part, features) in PROCESSORS.items():
        describe(userland, part, features)
        environment = {
            **os.environ,
            "PYTHONPATH": str(site.resolve()),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment.pop("EDGEKIT_KERNELS", None)  # those of this machine
        emulator = ["qemu-aarch64-static", "-L", str(userland), "-cpu", processor]
        command = [*emulator, str(userland / f"usr/bin/python{PYTHON}"), "-c", START, *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment, cwd=folder, timeout=1200
        )
        if done.returncode != 0:
            failed = True
            print(f"{processor}: exit status {done.returncode}\n{done.stderr[-2000:]}", flush=True)
            continue
        found = text_of(done)
        failed |= found != wanted
        print(f"{processor}: {'the same' if found == wanted else f'DIFFERENT: {found!r}'}", flush=True)
    return int(failed)


START = "from edgekit.cli.main import main; main()"


def text_of(done: subprocess.CompletedProcess[str]) -> str:
    text: str = json.loads(done.stdout)["text"]
    return text


def install(site: Path) -> None:
    """The light install for Arm, in the versions that are tested."""
    platforms = [f"--platform=manylinux{version}_aarch64" for version in ("2014", "_2_17", "_2_27", "_2_28", "_2_31")]
    abis = ["--implementation=cp", "--abi=cp311", "--abi=abi3", "--abi=none"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", f"--python-version={PYTHON}"]
    run(*pip, *platforms, *abis, "--constraint", str(ROOT / "constraints.txt"), "--target", str(site), *PACKAGES)


def describe(userland: Path, part: str, features: str) -> None:
    """Absolute paths are taken from the userland where they exist there: so the program sees an Arm machine."""
    cpu = userland / "sys/devices/system/cpu"
    for path in (cpu, userland / "proc"):
        path.mkdir(parents=True, exist_ok=True)
    for name in ("possible", "present", "online"):
        (cpu / name).write_text("0\n")
    facts = {"processor": 0, "Features": features, "CPU implementer": "0x41", "CPU architecture": 8}
    facts |= {"CPU variant": "0x1", "CPU part": part, "CPU revision": 1}
    (userland / "proc/cpuinfo").write_text("".join(f"{key}\t: {value}\n" for key, value in facts.items()) + "\n")


def run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]).resolve()))
