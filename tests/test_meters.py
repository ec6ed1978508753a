"""Meters with a clock of their own, a serial line that is a pseudo-terminal, and a fake powermetrics."""

from __future__ import annotations

import os
import plistlib
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import UserError
from edgekit.profile.meters import MeterLog, align, powermetrics, read_csv, serial
from edgekit.profile.power import PowerSource, SensorError, Source


def meter(offset: float, load: list[tuple[float, float]], *, hz: float = 10, length: float = 60) -> MeterLog:
    """A meter that runs `offset` seconds ahead and sees 3 W at rest, 7 W under load, and noise."""
    times = np.arange(-10, length, 1 / hz)
    watts = np.full(len(times), 3.0) + np.random.default_rng(0).normal(0, 0.1, len(times))
    for begin, end in load:
        watts[(times >= begin) & (times <= end)] += 4
    return MeterLog(tuple((times + offset).tolist()), tuple(watts.tolist()))


@pytest.mark.parametrize("offset", [0.0, 3.7, -250.0, 1.7e9])
def test_a_log_is_shifted_to_where_it_shows_the_load(offset: float) -> None:
    load = [(12.0, 31.0)]
    shifted, agreement = align(meter(offset, load), load, around=(5.0, 40.0))
    assert agreement > 0.95
    assert shifted.times[0] == pytest.approx(-10, abs=0.15)


def test_a_log_of_another_run_or_too_short_a_one_is_refused() -> None:
    load = [(12.0, 31.0)]
    with pytest.raises(UserError, match="must show the run's load: the best agreement is"):
        align(meter(0, []), load, around=(5.0, 40.0))
    with pytest.raises(UserError, match="must cover the run: it has"):
        align(meter(0, load, length=20), load, around=(0.0, 40.0))


@pytest.mark.parametrize(
    "heading", ["time,power", "Timestamp;no,Power (W)", "t,watts", "\ufeffTime (s),W"],
)  # fmt: skip
def test_headings_of_several_meters_are_known(heading: str, tmp_path: Path) -> None:
    heading = heading.replace("Timestamp;no", "timestamp")
    if "(s)" in heading:
        heading = heading.replace("Time (s)", "time_s")
    (tmp_path / "m.csv").write_text(heading + "\n" + "".join(f"{i / 10},{i}\n" for i in range(20)))
    log = read_csv(tmp_path / "m.csv")
    assert log.watts == tuple(range(20))


def test_volts_and_amperes_are_multiplied_and_broken_lines_left_out(tmp_path: Path) -> None:
    lines = [f"{i},5.0,{i}" for i in range(12)] + ["x,5,1", "13,nan,2", "14", ""]
    (tmp_path / "m.csv").write_text("time,voltage,current\n" + "\n".join(reversed(lines)))
    log = read_csv(tmp_path / "m.csv")
    assert log.times == tuple(range(12))
    assert log.watts == tuple(5.0 * i for i in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs columns time and power"),
        ("time,volts\n1,2\n", "needs columns time and power"),
        ("time,power\n1,2\n", "ten readings or more: .* has 1"),
        ("time,power\n" + "a\0b,2\n", "ten readings"),
    ],
)
def test_a_file_that_is_no_log_is_the_users_error(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_csv(tmp_path / "m.csv")
    with pytest.raises(UserError, match="readable CSV"):
        read_csv(tmp_path / "absent.csv")


def wait_for(source: PowerSource, value: float) -> None:
    deadline = time.monotonic() + 5
    while source.read()[0] != value and time.monotonic() < deadline:
        time.sleep(0.005)
    assert source.read() == (value,)


def test_a_serial_meter_is_read_line_by_line() -> None:
    master, slave = os.openpty()
    source = serial(Path(os.ttyname(slave)))
    os.write(master, b"5.0,1.5\nrub")
    wait_for(source, 7.5)
    os.write(master, b"bish\n4.25\n")
    wait_for(source, 4.25)
    source.close()
    with pytest.raises(SensorError, match="ended"):
        source.read()
    os.close(master)
    os.close(slave)


def test_a_serial_line_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("5\n")
    for name in ("file", "absent"):
        with pytest.raises(SensorError, match="cannot be read"):
            serial(tmp_path / name)
    with pytest.raises(UserError, match="got 12345"):
        serial(tmp_path / "file", baud=12345)


def fake(tmp_path: Path, pieces: list[bytes]) -> list[str]:
    (tmp_path / "stream").write_bytes(b"\0".join(pieces))
    code = (
        "import sys, time; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read()); sys.stdout.flush(); time.sleep(60)"
    )
    return [sys.executable, "-c", code, str(tmp_path / "stream")]


def test_powermetrics_is_an_estimate(tmp_path: Path) -> None:
    sample = plistlib.dumps({"processor": {"combined_power": 4321.0}})
    source = powermetrics(fake(tmp_path, [sample, sample, b"half a pie"]))
    assert isinstance(source, Source)
    assert source.kind == "estimated"
    wait_for(source, 4.321)
    source.close()


def test_powermetrics_that_is_absent_or_silent_says_so(tmp_path: Path) -> None:
    assert "part of macOS" in str(powermetrics(["no-such-command-here"]))
    assert "needs sudo" in str(powermetrics([sys.executable, "-c", "pass"]))
