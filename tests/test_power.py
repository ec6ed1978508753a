"""Every power source through every trouble, on fake trees of /sys and fake commands, on a clock of our own."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edgekit.errors import UserError
from edgekit.profile.power import Energy, PowerLog, PowerSource, SensorError, Source, estimated, integrate
from edgekit.profile.sensors import ESTIMATES, SOURCES, Found, find_power


@dataclass
class Machine:
    """A fake machine: files below a root, and what vcgencmd says."""

    root: Path
    adc: str = ""
    written: dict[str, object] = field(default_factory=dict)

    def write(self, files: dict[str, object]) -> None:
        for name, text in files.items():
            path = self.root / "sys" / name
            if self.written.get(name) == text:
                continue
            self.written[name] = text
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    def command(self, words: object) -> str:
        return self.adc if list(words) == ["vcgencmd", "pmic_read_adc"] else ""  # type: ignore[call-overload]

    def find(self, wanted: str = "auto") -> Found:
        return find_power(wanted, root=self.root, command=self.command)

    def source(self, wanted: str = "auto") -> PowerSource:
        found = self.find(wanted)
        assert found.source is not None, found.reason
        return found.source


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


RAPL = "class/powercap/intel-rapl:0"
HWMON = "class/hwmon/hwmon3"
JETSON = "bus/i2c/drivers/ina3221x/1-0040/hwmon/hwmon1"
BATTERY = "class/power_supply/BAT0"


# How to give each source a power of so many watts at a time in seconds; counters start near their wrap.
def set_rapl(machine: Machine, watts: float, at: float) -> None:
    machine.write({f"{RAPL}/name": "package-0", f"{RAPL}/max_energy_range_uj": 262_143_328_850,
                   f"{RAPL}/energy_uj": int(261e9 + watts * at * 1e6) % 262_143_328_850})  # fmt: skip


def set_pmic(machine: Machine, watts: float, at: float) -> None:
    machine.adc = (
        f"  VDD_CORE_A current(7)={watts / 2 / 0.8:.8f}A\n  3V3_SYS_A current(1)={watts / 2 / 3.3:.8f}A\n"
        "  VDD_CORE_V volt(15)=0.80000000V\n  3V3_SYS_V volt(9)=3.30000000V\n"
        "  EXT5V_V volt(24)=5.12000000V\n  BATT_V volt(25)=0.00000000V\n"
    )


def set_jetson(machine: Machine, watts: float, at: float) -> None:
    machine.write({f"{JETSON}/in1_label": "VDD_IN", f"{JETSON}/in1_input": 5000,
                   f"{JETSON}/curr1_input": watts * 200,
                   f"{JETSON}/in2_label": "VDD_CPU", f"{JETSON}/in2_input": 5000,
                   f"{JETSON}/curr2_input": 400})  # fmt: skip


def set_hwmon(machine: Machine, watts: float, at: float) -> None:
    machine.write({f"{HWMON}/name": "ina226", f"{HWMON}/power1_label": "VIN", f"{HWMON}/power1_input": watts * 1e6,
                   f"{HWMON}/temp1_input": 40000})  # fmt: skip


def set_battery(machine: Machine, watts: float, at: float) -> None:
    machine.write({f"{BATTERY}/type": "Battery", f"{BATTERY}/status": "Discharging",
                   f"{BATTERY}/voltage_now": 12_000_000, f"{BATTERY}/current_now": watts / 12 * 1e6})  # fmt: skip


SET: dict[str, Callable[[Machine, float, float], None]] = {
    "rapl": set_rapl, "pmic": set_pmic, "jetson": set_jetson, "hwmon": set_hwmon, "battery": set_battery,
}  # fmt: skip


def watch(machine: Machine, name: str, power: Callable[[float], float], *, seconds: float = 5, step: float = 0.1,
          trouble: Callable[[float], None] = lambda at: None) -> PowerLog:  # fmt: skip
    """A log of a source whose machine draws `power(t)`; `trouble` may change the machine before each reading."""
    SET[name](machine, power(0), 0)
    moment = [0.0]
    log = PowerLog(machine.source(name), clock=lambda: moment[0])
    log._lock = __import__("threading").Lock()  # as entering does, but without its thread
    while moment[0] <= seconds + 1e-9:
        SET[name](machine, power(moment[0]), moment[0])
        trouble(moment[0])
        log.mark()
        moment[0] += step
    return log


def wobbling(at: float) -> float:
    """8 W on average over each fifth of a second, and never the same twice in a row."""
    return 8.0 + (0.5 if round(at * 10) % 2 else -0.5)


@pytest.mark.parametrize("name", SET)
def test_each_source_measures_what_flows(name: str, machine: Machine) -> None:
    flow = (lambda at: 8.0) if name == "rapl" else wobbling
    found = watch(machine, name, flow).energy([(1.0, 4.0)])
    assert found.joules == pytest.approx(24, rel=0.02)
    assert found.watts == pytest.approx(8, rel=0.02)
    assert found.updates >= 20
    assert found.reason == ""


def test_every_source_is_in_the_tables_above() -> None:
    assert set(SET) == set(SOURCES)
    assert set(ESTIMATES) == {"pmic-board", "powermetrics"}


@pytest.mark.parametrize("name", ["jetson", "hwmon", "battery", "rapl"])
def test_a_file_that_vanishes_ends_the_energy_with_a_reason(name: str, machine: Machine) -> None:
    def vanish(at: float) -> None:
        if at > 2.5:
            shutil.rmtree(machine.root / "sys")

    log = watch(machine, name, wobbling if name != "rapl" else lambda at: 8.0, trouble=vanish)
    found = log.energy([(1.0, 4.0)])
    assert found.joules is None
    assert "vanished" in found.reason
    early = log.energy([(0.5, 2.0)])
    assert early.joules == pytest.approx(12, rel=0.05), "what was measured before stands"


def test_rails_that_vanish_from_the_pmic_end_the_energy(machine: Machine) -> None:
    def vanish(at: float) -> None:
        if at > 2.5:
            machine.adc = ""

    found = watch(machine, "pmic", wobbling, trouble=vanish).energy([(1.0, 4.0)])
    assert found.joules is None
    assert "0 rails of 2 during the run" in found.reason


def spoil(machine: Machine, name: str, value: str) -> None:
    """Give the source a reading that is no power."""
    if name == "pmic":
        machine.adc = machine.adc.replace("VDD_CORE_A current(7)=", f"VDD_CORE_A current(7)={value}A\n#")
        return
    file = {
        "rapl": f"{RAPL}/energy_uj", "jetson": f"{JETSON}/curr1_input", "hwmon": f"{HWMON}/power1_input",
        "battery": f"{BATTERY}/current_now",
    }[name]  # fmt: skip
    machine.write({file: value})


@pytest.mark.parametrize("name", SET)
@pytest.mark.parametrize("value", ["nan", "", "-99999999"])
def test_one_bad_reading_is_left_out_and_many_give_no_energy(name: str, value: str, machine: Machine) -> None:
    if name == "battery" and value == "-99999999":
        pytest.skip("the sign of a battery's current is dropped")
    if name == "pmic" and value != "nan":
        value = "nan" if value == "" else "-999.5"
    flow = (lambda at: 8.0) if name == "rapl" else wobbling
    once = watch(machine, name, flow, trouble=lambda at: spoil(machine, name, value) if at == 2.5 else None)
    assert once.energy([(1.0, 4.0)]).joules == pytest.approx(24, rel=0.03)
    often = watch(
        machine, name, flow, trouble=lambda at: spoil(machine, name, value) if round(at * 10) % 3 == 1 else None
    )
    found = often.energy([(1.0, 4.0)])
    assert found.joules is None
    assert "were no power: not a number, or below zero" in found.reason


def test_the_sign_of_a_batterys_current_does_not_matter(machine: Machine) -> None:
    found = watch(machine, "battery", lambda at: -wobbling(at)).energy([(1.0, 4.0)])
    assert found.joules == pytest.approx(24, rel=0.02)


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", ""])
def test_a_battery_counts_only_while_it_discharges(status: str, machine: Machine) -> None:
    set_battery(machine, 8, 0)
    machine.write({f"{BATTERY}/status": status})
    assert machine.find().source is None
    assert "unplug the machine" in machine.find().reason
    log = watch(machine, "battery", wobbling,
                trouble=lambda at: machine.write({f"{BATTERY}/status": status}) if at > 2 else None)  # fmt: skip
    assert "stopped discharging" in log.energy([(1, 4)]).reason


def test_a_battery_with_a_power_gauge_is_read_by_it(machine: Machine) -> None:
    set_battery(machine, 8, 0)
    machine.write({f"{BATTERY}/power_now": 6_500_000})
    assert machine.source().read() == (6.5,)


# --- RAPL -------------------------------------------------------------------------------------------------------------


def test_a_counter_that_wraps_goes_on(machine: Machine) -> None:
    found = watch(machine, "rapl", lambda at: 500.0).energy([(1.0, 4.0)])  # wraps at 2.3 s
    assert found.joules == pytest.approx(1500, rel=0.001)


def test_a_counter_that_wraps_without_telling_its_range_loses_no_more_than_a_step(machine: Machine) -> None:
    def no_range(at: float) -> None:
        machine.write({f"{RAPL}/max_energy_range_uj": ""})

    log = watch(machine, "rapl", lambda at: 500.0)
    source = Source("rapl", ("package-0",), "", lambda: (0.0,), wraps=(math.inf,))
    found = integrate(source, log.times, log.values, [(1.0, 4.0)])
    assert found.joules == pytest.approx(1500, rel=0.05)


def test_domains_that_lie_in_others_are_never_added(machine: Machine) -> None:
    set_rapl(machine, 10, 0)
    for zone, name in (("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram"), ("intel-rapl:1", "psys"),
                       ("intel-rapl-mmio:0", "package-0")):  # fmt: skip
        machine.write({f"class/powercap/{zone}/name": name, f"class/powercap/{zone}/energy_uj": 5,
                       f"class/powercap/{zone}/max_energy_range_uj": 1000})  # fmt: skip
    source = machine.source()
    assert source.rails == ("package-0",)
    assert "which contain core, dram" in source.coverage
    assert len(source.read()) == 1


def test_two_packages_are_added_and_wrap_by_themselves(machine: Machine) -> None:
    def second(at: float) -> None:
        machine.write({"class/powercap/intel-rapl:1/name": "package-1",
                       "class/powercap/intel-rapl:1/max_energy_range_uj": 65_000_000,
                       "class/powercap/intel-rapl:1/energy_uj": int(20e6 * at) % 65_000_000})  # fmt: skip

    second(0)
    found = watch(machine, "rapl", lambda at: 10.0, trouble=second).energy([(1.0, 4.0)])
    assert found.joules == pytest.approx(90, rel=0.001)


def test_no_permission_is_not_no_sensor(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    set_rapl(machine, 10, 0)
    read = Path.read_text

    def denied(path: Path, *words: object, **options: object) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", denied)
    found = machine.find()
    assert found.source is None
    assert "sudo chmod a+r /sys/class/powercap" in found.reason


@pytest.mark.parametrize("name", ["jetson", "hwmon", "battery"])
def test_no_permission_for_other_files_says_so(name: str, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    SET[name](machine, 8, 0)
    read = Path.read_text

    def denied(path: Path, *words: object, **options: object) -> str:
        if path.name in ("curr1_input", "power1_input", "current_now"):
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *words, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "read_text", denied)
    found = machine.find(name)
    assert found.source is None
    assert "may not be read: sudo chmod a+r" in found.reason


# --- the others -------------------------------------------------------------------------------------------------------


def test_the_pmic_leaves_out_rails_without_a_current(machine: Machine) -> None:
    set_pmic(machine, 4, 0)
    source = machine.source()
    assert source.rails == ("VDD_CORE", "3V3_SYS")
    assert sum(source.read()) == pytest.approx(4)
    assert "no USB" in source.coverage


def test_the_whole_boards_estimate_is_only_made_when_asked_for(machine: Machine) -> None:
    set_pmic(machine, 4, 0)
    assert machine.source().name == "pmic"
    source = machine.source("pmic-board")
    assert source.kind == "estimated"
    assert source.read() == (pytest.approx(1.1451 * 4 + 0.5879),)


def test_a_jetsons_input_contains_its_other_rails(machine: Machine) -> None:
    set_jetson(machine, 9, 0)
    source = machine.source()
    assert source.rails == ("VDD_IN",)
    assert source.read() == (pytest.approx(9),)
    (machine.root / "sys" / JETSON / "in1_label").unlink()
    assert len(machine.source().rails) == 2


def test_of_several_hwmon_inputs_the_largest_is_taken_and_named(machine: Machine) -> None:
    set_hwmon(machine, 3, 0)
    machine.write({"class/hwmon/hwmon4/name": "whole", "class/hwmon/hwmon4/power2_input": 9e6,
                   "class/hwmon/hwmon5/power1_input": "nan"})  # fmt: skip
    source = machine.source("hwmon")
    assert source.rails == ("whole power2",)
    assert source.read() == (9.0,)


def test_a_machine_without_sensors_gives_a_reason_for_each(machine: Machine) -> None:
    found = machine.find()
    assert found.source is None
    assert found.reason.startswith("no sensor: ")
    for name in SOURCES:
        assert f"{name} (" in found.reason
    assert "--power none" in machine.find("none").reason


def test_an_unknown_source_is_the_users_error(machine: Machine) -> None:
    with pytest.raises(UserError, match=r"--power must be auto.*did you mean 'rapl'"):
        machine.find("rappl")


# --- reckoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [1.0, 60.0])
def test_a_slow_sensor_gives_no_joules(period: float, machine: Machine) -> None:
    """A battery's gauge that refreshes each second, or minute, under a work of three seconds."""
    log = watch(machine, "battery", lambda at: 8.0 + math.floor(at / period) % 2)
    found = log.energy([(1.0, 4.0)])
    assert found.joules is None
    assert "too slow a sensor" in found.reason
    assert found.updates < 10
    if period == 1.0:
        longer = watch(machine, "battery", lambda at: 8.0 + math.floor(at / period) % 2, seconds=20, step=0.25)
        assert longer.energy([(1.0, 19.0)]).joules == pytest.approx(18 * 8.5, rel=0.05)


def gauge(kind: str = "measured") -> Source:
    return Source("fake", ("a",), "", lambda: (1.0,), kind=kind)  # type: ignore[arg-type]


def test_several_spans_add_up_and_leave_out_what_lies_between() -> None:
    times = [index / 10 for index in range(101)]
    values = [(100.0 if 3 < at < 6 else 5.0 + 0.01 * (round(at * 10) % 2),) for at in times]
    found = integrate(gauge(), times, values, [(1.0, 2.9), (6.1, 8.0)])
    assert found.joules == pytest.approx(5 * 3.8, rel=0.01)
    assert found.seconds == pytest.approx(3.8)


@pytest.mark.parametrize(
    ("times", "spans", "reason"),
    [
        ([], [(0.0, 1.0)], "no readings around the run"),
        ([0.5, 0.7], [(0.0, 1.0)], "no readings around the run"),
        ([0.0, 1.0], [], "nothing was timed"),
        ([0.0, 1.0], [(0.5, 0.5)], "nothing was timed"),
    ],
)
def test_what_cannot_be_reckoned_says_why(times: list[float], spans: list[tuple[float, float]], reason: str) -> None:
    found = integrate(gauge(), times, [(1.0,)] * len(times), spans)
    assert (found.joules, found.watts) == (None, None)
    assert reason in found.reason


def test_an_estimate_is_constant_and_needs_no_updates() -> None:
    source = estimated(6.0, 2.0)
    assert source.kind == "estimated"
    found = integrate(source, [0.0, 9.0], [source.read(), source.read()], [(1.0, 3.0)])
    assert found == Energy(12.0, 6.0, 2.0, 0, 0.0)


def test_a_log_reads_in_a_thread_and_closes_its_source() -> None:
    closed: list[bool] = []
    source = Source("fake", ("a",), "", lambda: (3.0,), closer=lambda: closed.append(True))
    with PowerLog(source, hz=500) as log:
        while len(log.times) < 5:
            pass
    assert closed == [True]
    assert log.watts()[1] == [3.0] * len(log.times)


def test_a_log_of_a_source_that_is_gone_at_once_has_nothing() -> None:
    def gone() -> tuple[float, ...]:
        raise SensorError("energy_uj vanished")

    with PowerLog(Source("fake", ("a",), "", gone)) as log:
        pass
    assert log.energy([(0.0, 1.0)]).reason == "fake: energy_uj vanished"
    assert log.watts() == ([], [])


def test_a_counters_watts_over_time_are_its_steps(machine: Machine) -> None:
    times, watts = watch(machine, "rapl", lambda at: 500.0).watts()
    assert len(times) == 50
    assert watts == pytest.approx([500.0] * 50, rel=0.001)
