"""Instructions per decoded token on emulated Arm processors, ours and llama.cpp's: a measure of speed that does not
depend on what else the machine does.

`Emulator` runs a program under qemu-aarch64 (Debian: qemu-user, whose build takes plugins; the static one does not)
and returns how many instructions went into each token. llama.cpp is compiled by zig for the processor, from the source
package on PyPI, in Release, with its repacked kernels; both run on one thread.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = "llama-cpp-python==0.3.36"
OURS = """
import os, pathlib, sys
from edgekit.bundle import MODEL, Bundle
from edgekit.runtime.engine import Engine
bundle = Bundle.open(pathlib.Path(sys.argv[1]))
engine = Engine(bundle.file(MODEL), bundle.spec, context=256, threads=1)
token = 1
for _ in range(int(sys.argv[2]) + 1):
    token = int(engine.forward([token])[-1].argmax())
    os.write(1, b".")
"""


def run(*command: str | Path, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


class Emulator:
    """`folder` is the one of tests/native/emulated.py: it holds userland/ and site/."""

    def __init__(self, folder: Path, processor: str) -> None:
        if shutil.which("qemu-aarch64") is None:
            sys.exit("counting instructions needs qemu-aarch64 with plugins: apt-get install qemu-user")
        self.folder, self.processor = folder.resolve(), processor
        self.plugin = self.folder / "count.so"
        run("cc", "-shared", "-fPIC", "-O2", HERE / "native" / "count.c", "-o", self.plugin)

    def edgekit(self, bundle: Path, tokens: int) -> list[int]:
        """Instructions of each of `tokens` decoded tokens, everything that runs included: Python, sampling, kernels."""
        python = self.folder / "userland/usr/bin/python3.11"
        environment = {"PYTHONPATH": str(self.folder / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
        return self._count([str(python), "-c", OURS, str(bundle.resolve()), str(tokens)], environment)

    def llama_cpp(self, program: Path, model: Path, tokens: int) -> list[int]:
        return self._count([str(program.resolve()), str(model.resolve()), str(tokens)], {})

    def _count(self, program: list[str], environment: dict[str, str]) -> list[int]:
        emulator = ["qemu-aarch64", "-plugin", str(self.plugin), "-L", str(self.folder / "userland")]
        done = subprocess.run(
            [*emulator, "-cpu", self.processor, *program],
            capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=self.folder,
        )  # fmt: skip
        marks = [int(line) for line in done.stderr.splitlines() if line.isdigit()]
        if done.returncode != 0 or len(marks) < 2:
            sys.exit(f"{program[0]} failed under emulation ({done.returncode}): {done.stderr[-2000:]}")
        return [after - before for before, after in itertools.pairwise(marks)]


def build_llama_cpp(work: Path, processor: str) -> Path:
    """The driver over llama.cpp for a processor, as a static program; what is there already is not built again."""
    work = work.resolve()  # CMake looks for its tools elsewhere
    program = work / f"llama-{processor}"
    if program.exists():
        return program
    work.mkdir(parents=True, exist_ok=True)
    if not (source := work / "llama.cpp").exists():
        run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python",
            "--dest", work, SOURCE)  # fmt: skip
        with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        next(work.glob("llama_cpp_python-*/vendor/llama.cpp")).rename(source)
    cpu = processor.replace("-", "_")
    for tool, words in {"cc": f"cc -target aarch64-linux-musl -mcpu={cpu}", "ar": "ar", "ranlib": "ranlib",
                        "c++": f"c++ -target aarch64-linux-musl -mcpu={cpu}"}.items():  # fmt: skip
        script = work / f"zig-{tool}"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m ziglang {words} "$@"\n')
        script.chmod(0o755)
    off = ("GGML_NATIVE", "GGML_OPENMP", "BUILD_SHARED_LIBS", "LLAMA_OPENSSL",
           *(f"LLAMA_BUILD_{part}" for part in ("COMMON", "TOOLS", "EXAMPLES", "TESTS", "SERVER", "APP")))  # fmt: skip
    settings = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_BUILD_TYPE": "Release",
                "CMAKE_C_COMPILER": work / "zig-cc", "CMAKE_CXX_COMPILER": work / "zig-c++",
                "CMAKE_AR": work / "zig-ar", "CMAKE_RANLIB": work / "zig-ranlib",
                **dict.fromkeys(off, "OFF")}  # fmt: skip
    build = work / f"build-{processor}"
    shutil.rmtree(build, ignore_errors=True)  # what a build that was stopped left may be another compiler's
    run("cmake", "-S", source, "-B", build, *(f"-D{key}={value}" for key, value in settings.items()))
    run("cmake", "--build", build, "--target", "llama", "--parallel", "2")
    libraries = [next(build.rglob(f"lib{name}.a")) for name in ("llama", "ggml", "ggml-cpu", "ggml-base")]
    run(work / "zig-c++", "-O2", "-static", f"-I{source}/include", f"-I{source}/ggml/include",
        HERE / "native" / "peer.cpp", *libraries, "-o", program)  # fmt: skip
    return program
