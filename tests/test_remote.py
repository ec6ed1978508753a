"""Profiles on other machines: with a stand-in for ssh that runs the script here, and, slow, with a real sshd."""

from __future__ import annotations

import contextlib
import dataclasses
import getpass
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import ok
from test_reference import tiny_checkpoint

from edgekit.bundle import Bundle
from edgekit.errors import BudgetError, DeviceError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile import remote
from edgekit.profile.options import Options

QUICK = Options(prompt_tokens=4, generate_tokens=2, repetitions=1, settle_s=0, idle_s=0, cold=False, operators=False)

FAKE = """#!/bin/bash
for last; do :; done
case " $* " in *" -O "*) exit 0;; esac
echo "$last" >> {log}
{before}
HOME={home} PATH={bin}:$PATH exec sh -c "$last"
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS["portable"])
    return path


class Fake:
    """A machine behind a stand-in for ssh: its home, the scripts that were sent, and what fails first."""

    def __init__(self, folder: Path) -> None:
        self.home, self.log, self.bin, self.path = folder / "home", folder / "log", folder / "bin", folder / "ssh"
        self.home.mkdir()
        self.bin.mkdir()
        self.log.touch()
        (self.bin / "python3").symlink_to(sys.executable)
        self.cache = self.home / ".cache/edgekit/remote"
        self.fails_with("")

    def fails_with(self, before: str) -> None:
        self.path.write_text(FAKE.format(log=self.log, home=self.home, bin=self.bin, before=before))
        self.path.chmod(0o755)

    def command(self, name: str, script: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f"#!/bin/sh\n{script}\n")
        (self.bin / name).chmod(0o755)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(tmp_path)
    monkeypatch.setenv("EDGEKIT_SSH", str(made.path))
    # The venv of the tests stands in for a Python that has the packages.
    made.command("python3", f'exec {sys.executable} "$@"')
    return made


def only(outcomes: list[remote.Outcome]) -> remote.Outcome:
    (outcome,) = outcomes
    return outcome


def test_a_profile_there(fake: Fake, bundle: Path) -> None:
    heard: list[str] = []
    outcome = only(remote.profile_on(["ssh://pi@there"], bundle, QUICK, tell=lambda host, stage: heard.append(stage)))
    assert outcome.error is None
    assert outcome.report is not None
    assert outcome.report.value("pp4") is not None
    assert heard[0] == "connecting"
    assert any(stage.startswith("copying ") for stage in heard)
    assert any(stage.startswith("measuring 1 of ") for stage in heard)
    assert not list(fake.home.iterdir()), "nothing is left behind"


def test_what_stays_for_the_next_time(fake: Fake, bundle: Path) -> None:
    heard: list[str] = []
    for _ in range(2):
        done = only(
            remote.profile_on(["ssh://pi@there"], bundle, QUICK, stay=True, tell=lambda _, it: heard.append(it))
        )
        assert done.report is not None
    assert [path.name.split("-")[0] for path in fake.cache.iterdir()] == ["edgekit"]
    assert heard.count("copying edgekit") == 1


def test_tidying_up_leaves_the_bundle_of_another_run(fake: Fake, bundle: Path) -> None:
    other = fake.cache / "bundles/0123456789abcdef"
    other.mkdir(parents=True)
    (fake.home / ".cache/other").touch()
    assert only(remote.profile_on(["ssh://pi@there"], bundle, QUICK)).report is not None
    assert [path.name for path in (fake.cache / "bundles").iterdir()] == [other.name]
    other.rmdir()
    assert only(remote.profile_on(["ssh://pi@there"], bundle, QUICK)).report is not None
    assert [path.name for path in (fake.home / ".cache").iterdir()] == ["other"]


def test_the_package_is_all_that_a_device_needs(tmp_path: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(remote.pack(os.uname().machine))) as tar:
        tar.extractall(tmp_path, filter="data")
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in f"{{type(f).__module__}} {{type(f).__name__}}".lower()]
sys.path.insert(0, {str(tmp_path)!r})
import edgekit.profile.worker, edgekit.profile.run, edgekit.runtime.session
files = {{name: m.__file__ for name, m in sys.modules.items() if name.startswith("edgekit") and m.__file__}}
assert all(path.startswith({str(tmp_path)!r}) for path in files.values()), files
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert remote.pack("riscv64") == remote.pack("riscv64")
    assert len(remote.pack("riscv64")) < 4_000_000


def test_what_light_needs_can_be_imported() -> None:
    assert {"numpy", "onnxruntime", "tokenizers"} <= {text.split(">")[0] for text in remote.needed_packages()}


def test_a_cut_copy_goes_on_where_it_ended(fake: Fake, bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    host = remote.find_host("ssh://there", tmp_path)
    folder = remote.copy_bundle(host, opened, lambda stage: None)
    name, record = max(opened.manifest.files.items(), key=lambda item: item[1].size_bytes)
    there = fake.cache / folder / name
    whole = there.read_bytes()
    there.with_name(there.name + ".part").write_bytes(whole[: len(whole) // 3])
    there.unlink()
    sent: list[int] = []
    remote._copy_file(host, bundle / name, f"{folder}/{name}", record, sent.append)
    assert there.read_bytes() == whole
    assert sent[-1] == len(whole)
    assert "cat >>" in fake.log.read_text().splitlines()[-2] + fake.log.read_text()

    there.with_name(there.name + ".part").write_bytes(b"x" * 7)  # not a beginning of it
    there.unlink()
    with pytest.raises(DeviceError, match=r"must receive .* whole"):
        remote._copy_file(host, bundle / name, f"{folder}/{name}", record, sent.append)
    assert not there.exists()
    remote._copy_file(host, bundle / name, f"{folder}/{name}", record, sent.append)
    assert there.read_bytes() == whole


def test_a_connection_that_ends_is_tried_again(fake: Fake, bundle: Path, tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("0")
    fake.fails_with(
        f'case "$last" in *"wc -c"*) n=$(cat {count}); echo $((n + 1)) > {count};'
        ' [ $n -eq 1 ] && { echo "Connection reset by peer" >&2; exit 255; };; esac'
    )
    outcome = only(remote.profile_on(["ssh://there"], bundle, QUICK))
    assert outcome.error is None, outcome.error
    fake.fails_with('case "$last" in *"wc -c"*) echo "Connection reset by peer" >&2; exit 255;; esac')
    outcome = only(remote.profile_on(["ssh://there"], bundle, QUICK))
    assert isinstance(outcome.error, remote.Cut)
    assert "goes on where it ended" in str(outcome.error)


@pytest.mark.parametrize(
    ("said", "way_out"),
    [
        ("Host key verification failed.", "ssh-keygen -R"),
        ("pi@there: Permission denied (publickey).", "ssh-copy-id"),
        ("ssh: Could not resolve hostname there", "check the name"),
        ("connect to host there port 22: Connection refused", "is sshd running"),
        ("connect to host there port 22: Connection timed out", "is it on"),
    ],
)
def test_a_host_that_cannot_be_reached(fake: Fake, bundle: Path, said: str, way_out: str) -> None:
    fake.fails_with(f"echo '{said}' >&2; exit 255")
    error = only(remote.profile_on(["ssh://pi@there"], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    assert said in str(error)
    assert way_out in str(error)
    assert "ssh://pi@there" in str(error)


def test_a_host_without_python(fake: Fake, bundle: Path) -> None:
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        fake.command(name, "exit 1")
    error = only(remote.profile_on(["ssh://there"], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    assert "must have Python 3.11 or newer" in str(error)
    assert not list(fake.home.iterdir())


def test_a_full_disk(fake: Fake, bundle: Path) -> None:
    fake.command("df", "echo head; echo '/dev/sda 100 90 10 90% /'")
    error = only(remote.profile_on(["ssh://there"], bundle, QUICK)).error
    assert isinstance(error, BudgetError)
    assert "must have room for the bundle" in str(error)


def test_a_disk_that_fills_up_while_copying(fake: Fake, bundle: Path) -> None:
    fake.command("cat", "echo 'cat: write error: No space left on device' >&2; exit 1")
    error = only(remote.profile_on(["ssh://there"], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    assert "No space left on device" in str(error)
    assert not list(fake.home.iterdir())


def test_nonsense_for_an_answer(fake: Fake, bundle: Path) -> None:
    fake.command("uname", "printf '\\033[31m\\n'")
    fake.command("df", "echo no; echo no")
    error = only(remote.profile_on(["ssh://there"], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    assert "no sensible answer" in str(error)
    assert "\033" not in str(error)


def test_packages_that_cannot_be_had(fake: Fake, bundle: Path) -> None:
    fake.command(
        "python3",
        f'case "$*" in *numpy*) exit 1;; *venv*) mkdir -p env/bin; printf "#!/bin/sh\\necho no network >&2\\nexit 1\\n"'
        f' > env/bin/python; chmod +x env/bin/python;; *) exec {sys.executable} "$@";; esac',
    )
    error = only(remote.profile_on(["ssh://there"], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    assert "no network" in str(error)
    assert "onnxruntime" in str(error)
    assert not (fake.cache / "env").exists()


def test_an_error_of_the_profile_keeps_its_kind(fake: Fake, bundle: Path) -> None:
    error = only(remote.profile_on(["ssh://there"], bundle, Options(prompt_tokens=10**6))).error
    assert isinstance(error, UserError)
    assert "--prompt and --generate" in str(error)
    assert not list(fake.home.iterdir())


def test_a_worker_that_dies(fake: Fake, bundle: Path) -> None:
    fake.command("python3", f'case "$*" in *worker*) kill -9 $$;; *) exec {sys.executable} "$@";; esac')
    error = only(remote.profile_on(["ssh://there"], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    fake.command("python3", f'case "$*" in *worker*) echo "{{}}"; echo x;; *) exec {sys.executable} "$@";; esac')
    error = only(remote.profile_on(["ssh://there"], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    assert "without a report" in str(error)


@pytest.mark.parametrize(
    "text",
    [
        "there",
        "ssh://",
        "ssh://-oProxyCommand=x",
        "ssh://a@-b",
        "ssh://a:0",
        "ssh://a:99999",
        "adb://",
        "adb://-s",
        "ssh://a b",
        "ssh://a/b",
        "http://a",
    ],
)
def test_names_that_are_no_hosts(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--on must be"):
        remote.find_host(text, tmp_path)


def test_names_of_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_SSH", "ssh -F 'a file'")
    command = remote.find_host("ssh://pi@[::1]:2222", tmp_path).command
    assert command[:3] == ("ssh", "-F", "a file")
    assert command[-2:] == ("--", "pi@::1")
    assert command[-5:-3] == ("-p", "2222")
    assert remote.find_host("adb://emulator-5554", tmp_path).command[:3] == ("adb", "-s", "emulator-5554")


def test_one_host_twice(bundle: Path) -> None:
    with pytest.raises(UserError, match="different hosts"):
        remote.profile_on(["ssh://a", "ssh://a"], bundle, QUICK)


def test_the_command_with_two_hosts(fake: Fake, bundle: Path, tmp_path: Path) -> None:
    home = f"{tmp_path}/${{@: -2:1}}"  # of each host its own
    fake.fails_with(f'mkdir -p {home}; HOME={home} PATH={fake.bin}:$PATH exec sh -c "$last"')
    words = ["profile", str(bundle), "--on", "ssh://one", "--on", "ssh://two", "--prompt", "4", "--generate", "2",
             "--repeat", "1", "--settle", "0", "--idle", "0", "--no-cold", "--no-operators"]  # fmt: skip
    done = ok(*words, "-o", tmp_path / "r.json")
    assert "ssh://one" in done.out
    assert (tmp_path / "r.one.json").exists()
    assert (tmp_path / "r.two.json").exists()
    assert set(json.loads(ok(*words, "--json").out)) == {"ssh://one", "ssh://two"}


class Sshd:
    """A real sshd on the loopback that lets a user in with a key of its own: by root another user, else this one."""

    def __init__(self, folder: Path, server: str) -> None:
        self.folder, self.server = folder, server
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.home = Path(tempfile.mkdtemp(prefix="edgekit-home-"))
        self.user = getpass.getuser()
        if os.getuid() == 0 and shutil.which("useradd"):
            self.user = f"edgekit-{os.getpid()}"
            words = [
                "useradd",
                "--home-dir",
                str(self.home),
                "--no-create-home",
                "--shell",
                "/bin/sh",
                "--password",
                "*",
            ]
            subprocess.run([*words, self.user], check=True, capture_output=True)
            shutil.chown(self.home, self.user)
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        (self.home.parent / f"{self.home.name}.pub").write_bytes((folder / "user.pub").read_bytes())
        self.trust("host")
        (folder / "config").write_text(f"IdentityFile {folder}/user\nUserKnownHostsFile {folder}/known\n")
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}"

    def trust(self, name: str) -> None:
        key = (self.folder / f"{name}.pub").read_text()
        (self.folder / "known").write_text(f"[127.0.0.1]:{self.port} {key}")

    def start(self, **environment: str) -> None:
        self.stop()
        settings = {
            "Port": self.port, "ListenAddress": "127.0.0.1", "HostKey": self.folder / "host", "UsePAM": "no",
            "PidFile": "none", "AuthorizedKeysFile": self.home.parent / f"{self.home.name}.pub", "StrictModes": "no",
            "PermitRootLogin": "yes",
            "SetEnv": " ".join(f"{key}={value}" for key, value in {"HOME": self.home, **environment}.items()),
        }  # fmt: skip
        text = "".join(f"{key} {value}\n" for key, value in settings.items())
        (self.folder / "sshd_config").write_text(text)
        self.process = subprocess.Popen([self.server, "-D", "-f", self.folder / "sshd_config"])
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process:
            self.process.terminate()
            self.process.wait()

    def cut(self) -> None:
        """Kill the processes that serve this user's connections."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")[0]
                if words.startswith(b"sshd: " + self.user.encode()) and b"[priv]" not in words:
                    os.kill(int(folder.name), signal.SIGKILL)

    def left(self) -> list[str]:
        return [str(path.relative_to(self.home)) for path in self.home.rglob("*")]

    def running(self) -> list[str]:
        """What runs there with our worker in its command."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "edgekit.profile.worker" in words and str(self.home) in os.readlink(folder / "cwd"):
                    found.append(words)
        return found

    def end(self) -> None:
        self.stop()
        if self.user != getpass.getuser():
            subprocess.run(["userdel", self.user], check=False, capture_output=True)
        shutil.rmtree(self.home)
        (self.home.parent / f"{self.home.name}.pub").unlink()


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    server = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if not server or not shutil.which("ssh-keygen"):
        pytest.skip("no OpenSSH server is installed")
    Path("/run/sshd").mkdir(exist_ok=True)
    made = Sshd(tmp_path, server)
    monkeypatch.setenv("EDGEKIT_SSH", f"ssh -F {tmp_path}/config")
    yield made
    made.end()


def reachable(outcome: remote.Outcome) -> remote.Outcome:
    """The outcome, unless the other user's Python lacks the packages and could not install them."""
    if outcome.error and "needs these in its Python" in str(outcome.error):
        pytest.skip(str(outcome.error))
    return outcome


@pytest.mark.slow
def test_another_user_through_a_real_sshd(sshd: Sshd, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Python gets a virtual environment, which stays; then the connection is cut in two places."""
    outcome = reachable(only(remote.profile_on([sshd.url], bundle, QUICK, stay=True)))
    assert outcome.error is None, outcome.error
    assert outcome.report is not None
    there = sshd.home / ".cache/edgekit/remote"
    assert there.owner() == sshd.user
    assert not (there / "bundles").exists()

    # While it copies: it goes on by itself, with what is there.
    scripts: list[str] = []
    run = remote.Host.run

    def noting(host: remote.Host, script: str, **options: Any) -> str:
        scripts.append(script)
        return run(host, script, **options)

    monkeypatch.setattr(remote.Host, "run", noting)
    monkeypatch.setattr(remote, "CHUNK", 4096)
    heard: list[str] = []

    def cut_the_copy(host: str, stage: str) -> None:
        heard.append(stage)
        parts = [path.stat().st_size for path in there.rglob("*.part") if path.stat().st_size > 8192]
        if stage.startswith("copying ") and parts and not any("cut" in stage for stage in heard):
            heard.append("cut")
            sshd.cut()

    outcome = only(remote.profile_on([sshd.url], bundle, QUICK, stay=True, tell=cut_the_copy))
    assert outcome.error is None, outcome.error
    assert "the connection was cut; going on" in heard
    assert any(script.startswith("cat >>") for script in scripts)

    # While it measures: an error, nothing runs on, and the next try finds the copy.
    def cut_the_run(host: str, stage: str) -> None:
        if stage.startswith("measuring 1 of"):
            sshd.cut()

    many = dataclasses.replace(QUICK, repetitions=200)
    error = only(remote.profile_on([sshd.url], bundle, many, stay=True, tell=cut_the_run)).error
    assert isinstance(error, remote.Cut)
    assert "goes on where it ended" in str(error)
    for _ in range(100):
        if not sshd.running():
            break
        time.sleep(0.1)
    assert not sshd.running()
    scripts.clear()
    outcome = only(remote.profile_on([sshd.url], bundle, QUICK))
    assert outcome.error is None, outcome.error
    assert not any(script.startswith("cat >>") for script in scripts)
    assert sshd.left() == [], "nothing is left behind"


@pytest.mark.slow
def test_a_wrong_host_key(sshd: Sshd, bundle: Path) -> None:
    sshd.trust("user")
    error = only(remote.profile_on([sshd.url], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    assert "ost key verification failed" in str(error)
    assert "ssh-keygen -R" in str(error)
    assert sshd.left() == []


@pytest.mark.slow
def test_no_python_behind_a_real_sshd(sshd: Sshd, bundle: Path) -> None:
    tools = sshd.folder / "bin"
    tools.mkdir()
    for name in ("sh", "mkdir", "uname", "df", "tail", "awk", "rm", "rmdir", "cat", "test"):
        (tools / name).symlink_to(shutil.which(name) or "/bin/sh")
    public = Path(tempfile.mkdtemp(prefix="edgekit-bin-"))
    shutil.copytree(tools, public, symlinks=True, dirs_exist_ok=True)
    public.chmod(0o755)
    try:
        sshd.start(PATH=str(public))
        error = only(remote.profile_on([sshd.url], bundle, QUICK)).error
    finally:
        shutil.rmtree(public)
    assert isinstance(error, DeviceError)
    assert "must have Python 3.11 or newer" in str(error)
    assert sshd.left() == []


@pytest.mark.slow
@pytest.mark.parametrize("free_mb", [2, 20])
def test_a_full_disk_behind_a_real_sshd(sshd: Sshd, bundle: Path, free_mb: int) -> None:
    """Two megabytes are too few before anything is copied; of twenty, the environment or the bundle takes too much."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={free_mb}m", "tmpfs", sshd.home], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        shutil.chown(sshd.home, sshd.user)
        error = only(remote.profile_on([sshd.url], bundle, QUICK)).error
        left = sshd.left()
    finally:
        subprocess.run(["umount", sshd.home], check=True)
    assert isinstance(error, BudgetError if free_mb == 2 else DeviceError)
    assert ("must have room for the bundle" if free_mb == 2 else "No space left on device") in str(error)
    assert left == []
