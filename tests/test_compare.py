import dataclasses

import numpy as np
import pytest

from edgekit.errors import UserError
from edgekit.profile.compare import Pairs, compare, judge_pairs, machine_varied
from edgekit.profile.pace import COMPUTING, READING
from edgekit.report import Measurement, Report


def report(numbers, unit: str = "ms", **changes: object) -> Report:
    """A report of one measurement, "x"."""
    row = Measurement("x", float(np.median(numbers)), unit, n=len(numbers))
    machine = {"device": "pi5", "ram": "8.0 GB"}
    return dataclasses.replace(Report("r", (row,), machine, samples={"x": tuple(numbers)}), **changes)


def verdict(a, b, unit: str = "ms") -> str:
    (found,) = compare(report(a, unit), report(b, unit))
    return found.verdict


NOISE = {
    "normal": lambda generator, n: 100 * (1 + 0.02 * generator.normal(size=n)),
    "skewed": lambda generator, n: 100 * np.exp(0.3 * generator.normal(size=n)),
    "outliers": lambda generator, n: np.where(generator.random(n) < 0.15, 150, 100) + generator.normal(size=n),
    "coarse": lambda generator, n: np.round(20 + generator.normal(size=n)),
}


@pytest.mark.parametrize("n", [5, 10])
@pytest.mark.parametrize("noise", NOISE)
def test_two_runs_of_one_thing_cannot_be_told_apart(noise, n):
    generator = np.random.default_rng(n)
    draw = NOISE[noise]
    told = [verdict(draw(generator, n), draw(generator, n)) for _ in range(200)]
    assert told.count("cannot tell") >= 0.95 * len(told)


@pytest.mark.parametrize(("n", "found"), [(4, 0.9), (5, 0.97), (10, 1.0)])
def test_a_slowdown_of_ten_percent_is_found(n, found):
    generator = np.random.default_rng(n)
    draw = NOISE["normal"]
    told = [verdict(draw(generator, n), 1.1 * draw(generator, n)) for _ in range(100)]
    assert told.count("slower") >= found * len(told)
    assert set(told) <= {"slower", "cannot tell"}


FEW, MORE = (10.0, 10.1, 10.2, 10.3, 10.4), (12.0, 12.1, 12.2, 12.3, 12.4)


@pytest.mark.parametrize(
    ("unit", "rose", "fell"),
    [
        *((unit, "faster", "slower") for unit in ("tok/s", "GB/s", "1/s", "pages/min", "Hz")),
        *((unit, "slower", "faster") for unit in ("s", "ms", "µs", "ns", "ms/token", "s/1k tokens")),
        *((unit, "larger", "smaller") for unit in ("B", "MB", "GiB", "J/token", "W", "ppl", "", "%")),
    ],
)
def test_the_word_follows_the_unit(unit, rose, fell):
    assert verdict(FEW, MORE, unit) == rose
    assert verdict(MORE, FEW, unit) == fell


def test_the_numbers_say_b_against_a():
    (found,) = compare(report(FEW), report(MORE))
    assert (found.name, found.unit, found.a, found.b) == ("x", "ms", 10.2, 12.2)
    assert found.ratio == pytest.approx(12.2 / 10.2)
    assert 12.0 / 10.4 <= found.low < found.ratio < found.high <= 12.4 / 10.0
    assert found.p_value == pytest.approx(2 / 252)
    assert found.note == ""


@pytest.mark.parametrize(
    ("a", "b", "note"),
    [
        (FEW[:3], MORE[:3], "3 repetitions are too few"),
        (FEW, MORE[:2], "2 repetitions are too few"),
        (FEW, (10.0, 10.1, 10.2, 10.4, 10.5), "within the noise"),
        (FEW, FEW, "within the noise"),
        # Here only the interval holds 1 (its low end), then only the p-value (0.097) is too high.
        ((9, 9, 10, 10, 10, 12, 12, 13), (11, 11, 12, 12, 13, 14, 14, 14), "within the noise"),
        ((7, 7, 7, 8, 9, 12, 15, 18), (6, 12, 14, 15, 16, 17, 19, 19), "within the noise"),
        ((10.0,) * 9, (10.1,) * 9, "under 2%"),
        ((10.0, 10.0, 10.0, 10.0, 0.0), MORE, "above zero"),
    ],
)
def test_when_one_cannot_tell_the_note_says_why(a, b, note):
    (found,) = compare(report(a), report(b))
    assert found.verdict == "cannot tell"
    assert note in found.note


def test_without_samples_or_with_other_units_one_cannot_tell():
    bare = report(MORE, samples={})
    (found,) = compare(report(FEW), bare)
    assert (found.verdict, found.note, found.ratio) == ("cannot tell", "no raw samples to judge by", None)
    (found,) = compare(report(FEW, "ms"), report(MORE, "s"))
    assert (found.verdict, found.note) == ("cannot tell", "the units differ: ms and s")


def test_only_shared_measurements_are_judged_in_the_order_of_the_first():
    rows = {name: Measurement(name, 1.0, "s") for name in "abc"}
    first = report(FEW, measurements=(rows["c"], rows["a"]), samples={})
    second = report(FEW, measurements=(rows["a"], rows["b"], rows["c"]), samples={})
    assert [found.name for found in compare(first, second)] == ["c", "a"]
    with pytest.raises(UserError, match="'r' has x, 'r' has none"):
        compare(report(FEW), report(FEW, measurements=(), samples={}))


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        ({"device": "pi4", "ram": "8.0 GB"}, "device is 'pi5' in 'r' and 'pi4' in 'r'"),
        ({"device": "pi5"}, "ram is '8.0 GB' in 'r' and 'nothing'"),
        ({"device": "pi5", "ram": "8.0 GB", "cpu limit": "2"}, "cpu limit is 'nothing' in 'r' and '2'"),
    ],
)
def test_reports_of_different_machines_are_refused_unless_forced(machine, message):
    other = report(MORE, machine=machine)
    with pytest.raises(UserError, match=message):
        compare(report(FEW), other)
    (found,) = compare(report(FEW), other, force=True)
    assert found.verdict == "slower"


def test_versions_and_subjects_may_differ():
    (found,) = compare(report(FEW), report(MORE, versions={"edgekit": "9"}, subject="other"))
    assert found.verdict == "slower"


# --- what shifts a whole run ------------------------------------------------------------------------------------------


def run(level: float, generator: np.random.Generator, *, pace: float = 1.0, slope: float = 0.0, n: int = 8) -> Report:
    """A report of a rate on a machine at `pace`, which changes by `slope` within the run."""
    change = np.linspace(-slope / 2, slope / 2, n)
    noise = {name: np.exp(0.01 * generator.normal(size=n) + change) for name in ("pp8", READING, COMPUTING)}
    samples = {
        "pp8": tuple(level * pace * noise["pp8"]),
        READING: tuple(40 * pace * noise[READING]),
        COMPUTING: tuple(2 * noise[COMPUTING]),
    }
    units = {"pp8": "tok/s", READING: "GB/s", COMPUTING: "Gop/s"}
    rows = tuple(Measurement(name, float(np.median(x)), units[name], n=n) for name, x in samples.items())
    return Report("r", rows, samples=samples)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ({}, {"pace": 0.7}, "cannot tell"),  # the machine slowed down, the model did not
        ({"pace": 0.7}, {}, "cannot tell"),
        ({}, {"level": 90.0}, "slower"),  # the model did, on an equal machine
        ({"level": 90.0}, {}, "faster"),
        ({}, {"level": 70.0, "pace": 0.9}, "slower"),  # both did, the model by more
        ({"slope": 0.3}, {"level": 90.0, "slope": 0.3}, "cannot tell"),  # less than what drifts within the runs
        ({"slope": 0.03}, {"level": 85.0, "slope": 0.03}, "slower"),
    ],
)
def test_what_the_machine_did_is_no_verdict_on_the_model(before, after, told):
    generator = np.random.default_rng(3)
    words = []
    for _ in range(20):
        reports = [run(**{"level": 100.0, "generator": generator, **options}) for options in (before, after)]
        words.append(compare(*reports)[0].verdict)
    assert words.count(told) >= 19


def test_how_much_the_machine_varied_is_told():
    generator = np.random.default_rng(0)
    assert machine_varied(run(1.0, generator), run(1.0, generator)) < 0.05
    assert machine_varied(run(1.0, generator), run(1.0, generator, pace=0.5)) == pytest.approx(np.log(2), rel=0.05)
    assert machine_varied(report(FEW), report(MORE)) == 0

    def modes(*paces: float) -> Report:
        return Report("r", (Measurement(COMPUTING, paces[0], "Gop/s"),), samples={COMPUTING: paces})

    assert machine_varied(modes(2, 2, 2, 2, 1), modes(2, 2, 2, 2, 2)) == 0  # one disturbed sample is no mode
    assert machine_varied(modes(2, 2, 2, 1, 1), modes(2, 2, 2, 2, 2)) == pytest.approx(np.log(2))
    assert machine_varied(modes(0, 0, 0), modes(2, 2, 2)) == 0


def pairs(name: str, ratios) -> Pairs:
    return Pairs(name, "tok/s", 100.0, 90.0, tuple(ratios))


@pytest.mark.parametrize("tails", ["normal", "bursts", "one-sided"])
def test_pairs_tell_a_tenth_and_equal_ones_keep_the_level_whatever_the_noise(tails):
    """Two figures that share their noise, of 8 blocks: at most one comparison in twenty has any verdict."""
    generator = np.random.default_rng(1)
    equal = slower = 0
    for _ in range(400):
        noise = generator.normal(scale=0.03, size=8)
        if tails == "bursts":
            noise += np.where(generator.random(8) < 0.1, generator.normal(scale=0.3, size=8), 0)
        if tails == "one-sided":  # each of a pair is only ever slowed down
            noise = generator.exponential(0.03, size=8) - generator.exponential(0.03, size=8)
        other = noise + generator.normal(scale=0.01, size=8)
        same = judge_pairs([pairs("x", np.exp(noise)), pairs("y", np.exp(other))])
        slow = judge_pairs([pairs("x", 0.9 * np.exp(noise)), pairs("y", 0.9 * np.exp(other))])
        equal += all(row.verdict == "cannot tell" for row in same)
        slower += all(row.verdict == "slower" for row in slow)
    assert equal >= 380
    assert slower >= (200 if tails == "bursts" else 380)


def test_figures_are_judged_together():
    """Seven pairs of one sign: 2 / 128 alone, twice that beside another figure; three figures could not be told."""
    up, mixed = [1.1] * 7, [1.1, 0.9, 1.1, 0.9, 1.1, 0.9, 1.1]
    alone, both, three = (judge_pairs([pairs(str(i), x) for i, x in enumerate([up, *more])]) for more in
                          ((), (mixed,), (mixed, mixed)))  # fmt: skip
    assert [rows[0].p_value for rows in (alone, both, three)] == pytest.approx([2 / 128, 4 / 128, 6 / 128])
    assert [rows[0].verdict for rows in (alone, both, three)] == ["faster"] * 3
    assert both[1].verdict == "cannot tell"
    assert (both[0].a, both[0].b, both[0].ratio) == (100.0, 90.0, pytest.approx(1.1))


def test_too_few_pairs_cannot_tell():
    (found,) = judge_pairs([pairs("x", [1.2] * 6)])
    assert (found.verdict, found.note) == ("cannot tell", "6 repetitions are too few, 7 on each side are the least")
