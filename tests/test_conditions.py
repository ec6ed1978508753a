from pathlib import Path

import pytest

from edgekit.profile.conditions import (
    Cpu,
    Health,
    conditions,
    other_load,
    read_cpu,
    read_health,
    run_command,
    throttling,
)

CPU = "sys/devices/system/cpu"


def grow(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


def test_health_is_read_or_none(tmp_path):
    assert read_health(tmp_path, command=lambda words: "") == Health(None, None, None, None)
    grow(tmp_path, {
        f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "1500000", f"{CPU}/cpu1/cpufreq/scaling_cur_freq": "2400000",
        f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "3",
        f"{CPU}/cpu1/thermal_throttle/core_throttle_count": "4",
        "sys/class/thermal/thermal_zone0/temp": "51500", "sys/class/thermal/thermal_zone1/temp": "-273000",
        "sys/class/thermal/thermal_zone2/temp": "hot",
    })  # fmt: skip
    found = read_health(tmp_path, command=lambda words: "throttled=0x50005\n")
    assert found == Health(51.5, 1950.0, 7, 0x50005)


def health(count: int | None = None, bits: int | None = None) -> Health:
    return Health(None, None, count, bits)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (health(), health(), ()),
        (health(3), health(3), ()),
        (health(3), health(5), ("the processor throttled 2 times for heat",)),
        (health(bits=0), health(bits=0), ()),
        (health(bits=0x40000), health(bits=0x40000), ()),  # throttled since boot, but not by this run
        (health(bits=0), health(bits=0x40000), ("the board reports: throttled",)),
        (
            health(bits=0x50000),
            health(bits=0x50005),
            ("the board reports: under-voltage", "the board reports: throttled"),
        ),
        (
            health(None, 0),
            health(None, 0xA),
            ("the board reports: clock capped", "the board reports: temperature limit"),
        ),
    ],
)
def test_only_what_this_run_did_is_throttling(before, after, found):
    assert throttling(before, after) == found


def test_the_load_of_others_is_what_is_neither_idle_nor_ours():
    before, after = Cpu(100, 50, 1, 10), Cpu(120, 65, 2, 20)
    assert other_load(before, after) == (pytest.approx(5 / 20), pytest.approx(1 / 20))
    assert other_load(None, after) is None
    assert other_load(after, after) is None
    assert other_load(Cpu(0, 0, 0, 0), Cpu(10, 1, 0, 5)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "known"), [("cpu  100 5 20 800 10 1 2 3 0 0\n", True), ("cpu  1 2\n", False), ("", False)]
)
def test_processor_time_is_read_or_none(text, known, tmp_path):
    grow(tmp_path, {"proc/stat": text})
    found = read_cpu(tmp_path)
    assert (found is not None) == known
    if found:
        assert found.total_s > found.busy_s > found.steal_s


def test_conditions_name_governor_and_limits(tmp_path):
    grow(tmp_path, {
        f"{CPU}/cpu0/cpufreq/scaling_governor": "ondemand", f"{CPU}/cpu1/cpufreq/scaling_governor": "performance",
        f"{CPU}/cpu0/cpufreq/scaling_min_freq": "600000", f"{CPU}/cpu0/cpufreq/scaling_max_freq": "2400000",
    })  # fmt: skip
    found = conditions(tmp_path)
    assert found["governor"] == "ondemand, performance"
    assert found["clock limits"] == "600 to 2400 MHz"
    assert set(conditions(tmp_path / "empty")) == {"kernel"}


def test_commands_that_fail_say_nothing():
    assert run_command(["no-such-command-here"]) == ""
    assert run_command(["false"]) == ""
    assert run_command(["echo", "yes"]) == "yes\n"
