"""Measure a bundle on another machine: over OpenSSH, or over adb.

A host needs a shell and Python 3.11 or newer, nothing else. In `~/.cache/edgekit/remote` there it gets a copy of this
package (without what a device never runs), once a version; a virtual environment with the packages that it needs,
unless its Python has them; and the bundle, file by file, each checked against the digest of the manifest. A copy that
was cut goes on where it ended, when it is tried again at once and when the command is given again. In the end, also
after an error, all of it is removed; with `stay` package and environment are left for the next time.

ssh runs as the user's own: keys, jump hosts and known hosts are those of its configuration, and it never asks
(`BatchMode`). `EDGEKIT_SSH` names another command, as "ssh -F file". What a host says is data: lines are bounded, and
the report is checked like any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import edgekit
from edgekit.bundle import Bundle
from edgekit.errors import BudgetError, DeviceError, EdgekitError, ModelError, UserError
from edgekit.kernels import library
from edgekit.manifest import NAME as MANIFEST
from edgekit.manifest import FileRecord
from edgekit.profile.options import Options
from edgekit.report import Report, plain

Tell = Callable[[str], None]

SSH_HOST = re.compile(r"ssh://(?:(\w[\w.-]*)@)?(\w[\w.-]*|\[[0-9a-fA-F:.]+\])(?::(\d{1,5}))?/?")
ADB_HOST = re.compile(r"adb://(\w[\w.:-]*)")
PARTS = frozenset(
    [
        "bundle",
        "device",
        "devices",
        "errors",
        "evaluate",
        "folder",
        "host",
        "kernels",
        "manifest",
        "profile",
        "report",
        "runtime",
        "schema",
        "weight",
    ]
)
TRIES = 3
CHUNK = 1 << 18
LONGEST_LINE = 1 << 24
PYTHON = (3, 11)
UNREACHABLE = 255  # what ssh ends with when it was ssh that failed

# What stands in the way, by what ssh says of it, and the way out.
REASONS = {
    "host key verification": "compare its key by hand once, or forget the old one: ssh-keygen -R HOST",
    "permission denied": "let ssh in without a password: ssh-copy-id HOST",
    "could not resolve": "check the name",
    "connection refused": "is sshd running there, on this port?",
    "timed out": "is it on, and in this network?",
    "no devices": "connect it and allow debugging; adb devices lists them",
    "not found": "is it connected? adb devices lists them",
}


TRY_AGAIN = "try again: a copy goes on where it ended"


class Cut(DeviceError):
    """The connection ended; what was copied so far is kept there."""


@dataclass(frozen=True)
class Host:
    """A machine with a shell: `name` as given, `command` what runs a script, `root` our folder there."""

    name: str
    command: tuple[str, ...]
    root: str = '"$HOME"/.cache/edgekit/remote'

    def run(self, script: str, *, send: Iterable[bytes] = (), line: Callable[[str], None] | None = None) -> str:
        """Run a script there with `send` as its input; returns its output, or tells it line by line.

        Raises Cut when the connection failed, DeviceError when the script did: the last line that it said stands in it.
        """
        whole = f"export ORT_DISABLE_TELEMETRY=1; EK={self.root}; mkdir -p $EK && cd $EK || exit 1\n{script}"
        command = [*self.command, f"sh -c {shlex.quote(whole)}"]
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)  # noqa: S603
            except OSError as problem:
                raise DeviceError(
                    f"{self.name} needs {self.command[0]} on this machine: {problem.strerror}"
                ) from problem
            feeder = threading.Thread(target=_feed, args=(process, send), daemon=True)
            feeder.start()
            said: list[str] = []
            try:
                for text in _lines(process):
                    (line or said.append)(text)
                status = process.wait()
            finally:
                process.kill()
                process.wait()
                feeder.join()
            if status == 0:
                return "\n".join(said)
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 4000))
            words = [text for text in errors.read().decode(errors="replace").splitlines() if text.strip()]
        reason = plain(words[-1]) if words else f"it ended with status {status}"
        if status == UNREACHABLE or (self.command[0] == "adb" and reason.startswith(("adb: ", "error: "))):
            way_out = next(
                (way for key, way in REASONS.items() if key in reason.lower()),
                "try again: a copy goes on where it ended",
            )
            raise Cut(f"{self.name} cannot be reached: {reason}; {way_out}")
        raise DeviceError(f"{self.name} failed: {reason}")


def find_host(text: str, control: Path) -> Host:
    """The host of `ssh://[USER@]HOST[:PORT]` or `adb://SERIAL`. `control`: a folder for ssh's shared connection.

    Raises UserError: neither of these.
    """
    if found := ADB_HOST.fullmatch(text):
        return Host(text, ("adb", "-s", found[1], "shell", "-T"), root="/data/local/tmp/edgekit")
    found = SSH_HOST.fullmatch(text)
    if not found or not 0 < int(found[3] or 22) < 1 << 16:
        raise UserError(f"--on must be ssh://[USER@]HOST[:PORT] or adb://SERIAL: got {text!r}")
    user, host, port = found.groups()
    options = {"BatchMode": "yes", "ConnectTimeout": 10, "ServerAliveInterval": 10, "ServerAliveCountMax": 3,
               "ControlMaster": "auto", "ControlPath": control / "%C", "ControlPersist": 60}  # fmt: skip
    command = shlex.split(os.environ.get("EDGEKIT_SSH") or "ssh")
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    command += ["-p", port] if port else []
    return Host(text, (*command, "-T", "--", f"{user}@{host.strip('[]')}" if user else host.strip("[]")))


@dataclass
class Outcome:
    """What came of one host: a report, or the error that stood in the way."""

    host: str
    report: Report | None = None
    error: EdgekitError | None = None


def profile_on(
    hosts: Iterable[str],
    bundle: Path,
    options: Options,
    *,
    stay: bool = False,
    tell: Callable[[str, str], None] = lambda host, stage: None,
) -> list[Outcome]:
    """Measure a bundle on several hosts at once; `tell` hears (host, what it does). One's error stops no other.
    With `stay` package and environment are left there for the next time.

    Raises UserError: a host's name that is none, two that are the same, no bundle at the path.
    """
    names = list(hosts)
    if len(set(names)) < len(names):
        raise UserError(f"--on must name different hosts: got {', '.join(names)}")
    opened = Bundle.open(bundle)
    with tempfile.TemporaryDirectory(prefix="ek") as control:
        found = [find_host(name, Path(control)) for name in names]

        def one(host: Host) -> Outcome:
            try:
                report = profile_there(host, opened, options, lambda stage: tell(host.name, stage), stay=stay)
                return Outcome(host.name, report)
            except EdgekitError as problem:
                return Outcome(host.name, error=problem)

        with ThreadPoolExecutor(len(found)) as pool:
            outcomes = list(pool.map(one, found))
        for host in found:  # the shared connections end with us
            if host.command[0] != "adb":
                end = [*host.command[:-3], "-O", "exit", *host.command[-2:]]
                subprocess.run(end, capture_output=True, check=False)  # noqa: S603  the user's ssh
    return outcomes


def profile_there(host: Host, bundle: Bundle, options: Options, tell: Tell, *, stay: bool = False) -> Report:
    """Measure a bundle on one host, and tidy up there, unless the connection was cut: then the next try goes on.

    Raises DeviceError, BudgetError, ModelError, or what the profile raised there.
    """
    try:
        report = _prepare_and_measure(host, bundle, options, tell)
    except Cut:
        raise
    except EdgekitError:
        with contextlib.suppress(DeviceError):  # the first error is the one to tell
            tidy(host, bundle, stay=stay)
        raise
    tidy(host, bundle, stay=stay)
    return report


def _prepare_and_measure(host: Host, bundle: Bundle, options: Options, tell: Tell) -> Report:
    tell("connecting")
    size = sum(file.size_bytes for file in bundle.manifest.files.values())
    machine = survey(host)
    if machine.free_bytes < 1.1 * size + 1e7:
        raise BudgetError(
            f"{host.name} must have room for the bundle: {size / 1e6:.0f} MB and a little, free are"
            f" {machine.free_bytes / 1e6:.0f} MB in {host.root}"
        )
    package = send_package(host, machine, tell)
    python = prepare_python(host, machine, tell)
    folder = copy_bundle(host, bundle, tell)
    return measure(host, package, python, folder, options, tell)


@dataclass(frozen=True)
class Machine:
    """What a host says of itself."""

    processor: str
    python: str
    free_bytes: int


def survey(host: Host) -> Machine:
    """Processor, Python and free room. Raises DeviceError: no Python, or one that is too old."""
    answer = host.run(
        "uname -m\n"
        "df -Pk . | tail -n 1 | awk '{print $4}'\n"
        'for p in python3 python3.14 python3.13 python3.12 python3.11; do "$p" -c "import sys;'
        ' sys.exit(sys.version_info < (3, 11))" 2>/dev/null && { echo "$p"; break; }; done; true'
    ).splitlines()
    if len(answer) < 2 or not answer[1].strip().isdecimal():
        raise DeviceError(f"{host.name} gave no sensible answer to uname and df: {plain(' '.join(answer))!r}")
    if len(answer) < 3:
        raise DeviceError(f"{host.name} must have Python {PYTHON[0]}.{PYTHON[1]} or newer as python3: install it there")
    return Machine(answer[0].strip(), answer[2].strip(), 1024 * int(answer[1]))


def send_package(host: Host, machine: Machine, tell: Tell) -> str:
    """Bring this package there, with the kernels if they are for its processor; returns its folder there."""
    packed = pack(machine.processor)
    name = f"edgekit-{edgekit.__version__}-{hashlib.sha256(packed).hexdigest()[:16]}"
    if host.run(f"test -d {name} && echo yes || true") != "yes":
        tell("copying edgekit")
        host.run(
            f"rm -rf {name}.new && mkdir {name}.new && tar xf - -C {name}.new && mv {name}.new {name}", send=[packed]
        )
    return name


def pack(processor: str) -> bytes:
    """This package's light parts as a tar file, the same bytes each time."""
    root = Path(edgekit.__file__).parent
    files = {path.relative_to(root): path for path in root.rglob("*") if path.suffix in (".py", ".toml")}
    chosen = {
        name: path
        for name, path in files.items()
        if name.name == "__init__.py" or name.parts[0].removesuffix(".py") in PARTS
    }
    kernels = library.library_path()
    if kernels and processor == os.uname().machine:
        chosen[Path("kernels", library.NAME)] = kernels
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in sorted(chosen):
            content = chosen[name].read_bytes()
            entry = tarfile.TarInfo(str(Path("edgekit", name)))
            entry.size, entry.mode = len(content), 0o755 if name.suffix == ".so" else 0o644
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def needed_packages() -> list[str]:
    """What the light install depends on, as pip takes it."""
    return [text for text in importlib.metadata.requires("edgekit") or [] if "extra ==" not in text]


def prepare_python(host: Host, machine: Machine, tell: Tell) -> str:
    """A Python there that has the packages: its own, or that of a virtual environment made now. Returns its path."""
    modules = ", ".join(re.split(r"[^\w.]", text)[0].lower() for text in needed_packages())
    check = f'-c "import {modules}" 2>/dev/null'
    for python in ("env/bin/python", machine.python):
        if host.run(f"{python} {check} && echo yes || true") == "yes":
            return python
    tell("installing " + modules)
    packages = " ".join(map(shlex.quote, needed_packages()))
    try:
        host.run(
            f"rm -rf env && {machine.python} -m venv env >&2"
            f" && env/bin/python -m pip install -q --no-cache-dir {packages} >&2"
            " || { free=$(df -Pk . | awk 'NR == 2 {print $4}'); rm -rf env\n"
            'test "$free" -gt 1024 || echo "No space left on device" >&2; exit 1; }'
        )
    except Cut:
        raise
    except DeviceError as problem:
        raise DeviceError(
            f"{problem}; {host.name} needs these in its Python: {', '.join(needed_packages())}"
        ) from problem
    return "env/bin/python"


def folder_of(bundle: Bundle) -> str:
    """Where a bundle lies there: another bundle lies elsewhere."""
    return f"bundles/{hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()[:16]}"


def copy_bundle(host: Host, bundle: Bundle, tell: Tell) -> str:
    """Copy what is not there yet, going on where an earlier copy ended; returns the folder there."""
    listed = (bundle.path / MANIFEST).read_bytes()
    files = bundle.manifest.files
    folder = folder_of(bundle)
    total = sum(file.size_bytes for file in files.values())
    before = 0
    for name, file in sorted(files.items()):
        for attempt in range(1, TRIES + 1):
            try:
                _copy_file(host, bundle.path / name, f"{folder}/{name}", file, lambda sent, base=before: tell(  # type: ignore[misc]
                    f"copying {(base + sent) / 1e6:.0f} of {total / 1e6:.0f} MB"))  # fmt: skip
                break
            except Cut:
                if attempt == TRIES:
                    raise
                tell("the connection was cut; going on")
        before += file.size_bytes
    host.run(f"cat > {folder}/{MANIFEST}", send=[listed])
    return folder


def _copy_file(host: Host, source: Path, target: str, file: FileRecord, sent: Callable[[int], None]) -> None:
    there, part = shlex.quote(target), shlex.quote(f"{target}.part")
    state = host.run(
        f"mkdir -p $(dirname {there}); if test -f {there}; then echo whole; elif test -f {part}; then wc -c < {part};"
        " else echo 0; fi"
    ).strip()
    if state == "whole":
        return sent(file.size_bytes)
    offset = int(state) if state.isdecimal() and int(state) <= file.size_bytes else 0
    host.run(
        f"{'cat >>' if offset else 'cat >'} {part}",
        send=_chunks(source, offset, sent) if offset < file.size_bytes else (),
    )
    got = host.run(f"sha256sum {part} && mv {part} {there}").split()
    if not got or got[0] != file.sha256:
        host.run(f"rm -f {there} {part}")
        raise DeviceError(f"{host.name} must receive {source.name} whole: its digest there is another one; try again")
    return sent(file.size_bytes)


def _chunks(source: Path, offset: int, sent: Callable[[int], None]) -> Iterator[bytes]:
    with source.open("rb") as stream:
        stream.seek(offset)
        while chunk := stream.read(CHUNK):
            yield chunk
            offset += len(chunk)
            sent(offset)


def measure(host: Host, package: str, python: str, folder: str, options: Options, tell: Tell) -> Report:
    """Run the profile there."""
    result: dict[str, object] = {}

    def line(text: str) -> None:
        try:
            said = json.loads(text)
        except ValueError:
            return  # something else wrote to the output there
        if isinstance(said, dict):
            result.update(said)
            if isinstance(said.get("step"), list):
                tell("measuring " + " of ".join(plain(str(n)) for n in said["step"][:2]))

    tell("measuring")
    command = f"PYTHONPATH=$PWD/{package} PYTHONDONTWRITEBYTECODE=1 {python} -m edgekit.profile.worker {folder}"
    try:
        host.run(command, send=[options.to_json().encode()], line=line)
    except Cut:
        raise
    except DeviceError as problem:
        if isinstance(result.get("error"), str):
            kinds = {kind.exit_code: kind for kind in (UserError, ModelError, BudgetError)}
            kind = kinds.get(result.get("exit"), DeviceError)  # type: ignore[call-overload]
            raise kind(f"{host.name}: {plain(str(result['error']))}") from problem
        raise
    if not isinstance(result.get("report"), str):
        raise DeviceError(f"{host.name} ended without a report; try again")
    return Report.from_json(str(result["report"]), where=f"the report of {host.name}")


def tidy(host: Host, bundle: Bundle, *, stay: bool) -> None:
    """Remove the bundle there, and unless `stay` all that is ours, if no other bundle lies there: one that is being
    measured now, or whose copy was cut."""
    all_of_it = (
        'test -e bundles || rm -rf "$PWD"\n'
        'test -e "$PWD" || test "$PWD" != "$HOME/.cache/edgekit/remote" || rmdir "${PWD%/*}" "$HOME/.cache" 2>/dev/null'
    )
    host.run(f"rm -rf {folder_of(bundle)}; rmdir bundles 2>/dev/null\n{'' if stay else all_of_it}\ntrue")


def _feed(process: subprocess.Popen[bytes], send: Iterable[bytes]) -> None:
    """Write to a process, and end its input, whatever becomes of it."""
    assert process.stdin is not None
    try:
        for chunk in send:
            process.stdin.write(chunk)
        process.stdin.close()
    except (BrokenPipeError, ValueError, OSError):  # it has ended: its status says why
        process.kill()


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    assert process.stdout is not None
    while line := process.stdout.readline(LONGEST_LINE):
        yield line.decode(errors="replace").rstrip("\r\n")
