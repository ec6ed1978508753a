"""Runs the test driver, compiled for 64-bit Arm, on emulated processors: every path that each of them has.

    python tests/native/arm.py build/kernels-arm

Needs ziglang (the extra [cross]) and qemu-aarch64-static (Debian's qemu-user-static). An instruction that a processor
lacks ends the driver there, as it would on the processor.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from edgekit.kernels.build import CSRC, build_for, compile_units

EMULATOR = "qemu-aarch64-static"
# What each processor must have found: Pi 3 and Zero 2, Pi 4, Pi 5, and one with everything.
PROCESSORS = {
    "cortex-a53": {"portable", "neon"},
    "cortex-a72": {"portable", "neon"},
    "cortex-a76": {"portable", "neon", "neon_dotprod"},
    "max": {"portable", "neon", "neon_dotprod", "neon_i8mm"},
}


def main(folder: Path) -> int:
    if shutil.which(EMULATOR) is None:
        print(f"emulation needs {EMULATOR}: apt-get install qemu-user-static", file=sys.stderr)
        return 5
    driver, library = folder / "driver", folder / "_edgekit_kernels.so"
    units = [*sorted(CSRC.glob("path_*.cpp")), CSRC / "dispatch.cpp", Path(__file__).with_name("driver.cpp")]
    compile_units("aarch64", units, driver, program=True)
    build_for("aarch64", library)
    print(f"{library}: {library.stat().st_size} bytes")
    failed = False
    for processor, paths in PROCESSORS.items():
        done = subprocess.run([EMULATOR, "-cpu", processor, str(driver)], capture_output=True, text=True, check=False)
        print(f"{processor}: exit status {done.returncode}\n{done.stdout}{done.stderr}", end="", flush=True)
        found = {line.split()[0] for line in done.stdout.splitlines()}
        if done.returncode != 0 or found != paths:
            failed = True
            print(f"{processor} must run {', '.join(sorted(paths))}: it ran {', '.join(sorted(found)) or 'none'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
