"""Profiles on other machines: with a stand-in for ssh that runs the script here, and, slow, with a real sshd."""

from __future__ import annotations

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
import time
from collections.abc import Iterator
from pathlib import Path

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
    assert not list((fake.cache / "bundles").iterdir())
    packages = [path.name for path in fake.cache.iterdir() if path.name.startswith("edgekit-")]
    again = only(remote.profile_on(["ssh://pi@there"], bundle, QUICK))
    assert again.report is not None
    assert [path.name for path in fake.cache.iterdir() if path.name.startswith("edgekit-")] == packages


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


def test_a_full_disk(fake: Fake, bundle: Path) -> None:
    fake.command("df", "echo head; echo '/dev/sda 100 90 10 90% /'")
    error = only(remote.profile_on(["ssh://there"], bundle, QUICK)).error
    assert isinstance(error, BudgetError)
    assert "must have room for the bundle" in str(error)


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
    assert not list((fake.cache / "bundles").iterdir())


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


@pytest.fixture
def sshd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real sshd on the loopback that lets this user in with a key of its own."""
    server = shutil.which("sshd", path="/usr/sbin:/usr/bin")
    if not server or not shutil.which("ssh-keygen"):
        pytest.skip("no OpenSSH server is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    tmp_path.chmod(0o700)
    (tmp_path / "user.pub").rename(tmp_path / "authorized")
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": tmp_path / "host", "PidFile": tmp_path / "pid",
        "AuthorizedKeysFile": tmp_path / "authorized", "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes",
        "SetEnv": f"HOME={tmp_path}/home",
    }  # fmt: skip
    (tmp_path / "home").mkdir()
    (tmp_path / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    key = (tmp_path / "host.pub").read_text()
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {key}")
    (tmp_path / "config").write_text(f"IdentityFile {tmp_path}/user\nUserKnownHostsFile {tmp_path}/known\n")
    monkeypatch.setenv("EDGEKIT_SSH", f"ssh -F {tmp_path}/config")
    Path("/run/sshd").mkdir(exist_ok=True)
    process = subprocess.Popen([server, "-D", "-f", tmp_path / "sshd_config"])
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_a_real_sshd(sshd: str, bundle: Path, tmp_path: Path) -> None:
    outcome = only(remote.profile_on([sshd], bundle, QUICK))
    assert outcome.error is None, outcome.error
    assert outcome.report is not None
    assert (tmp_path / "home/.cache/edgekit/remote").is_dir()
    # Its connection is killed midway: once it is tried again by itself.
    killed: list[str] = []

    def kill(host: str, stage: str) -> None:
        if stage.startswith("copying ") and "MB" in stage and not killed:
            killed.append(stage)
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if words[0].startswith(b"sshd: ") and b"[priv]" not in words[0] and b"listener" not in words[0]:
                    os.kill(int(folder.name), signal.SIGKILL)

    outcome = only(remote.profile_on([sshd], bundle, QUICK, tell=kill))
    assert killed
    assert outcome.error is None, outcome.error
    known = (tmp_path / "known").read_text().split()
    other = (tmp_path / "authorized").read_text().split()
    (tmp_path / "known").write_text(f"{known[0]} {other[0]} {other[1]}\n")
    error = only(remote.profile_on([sshd], bundle, QUICK)).error
    assert isinstance(error, DeviceError)
    assert "key" in str(error)
