"""Turns: the order of work, what a block gives, and processes that die."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_reference import tiny_checkpoint

from edgekit.errors import DeviceError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile.turns import FIGURES, Block, Contest, block_ratio, serve, take_turns


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "tiny"
    export(tiny_checkpoint(), path, target=TARGETS["portable"])
    return path


# A process that notes when it is asked, and answers with rates of its own and a noise that both share.
FAKE = """
import json, sys
log, rate = sys.argv[1], float(sys.argv[2])
open(log, "a").write(f"start {rate:g}\\n")
for line in sys.stdin:
    prompt, answer, seed = json.loads(line)
    open(log, "a").write(f"{rate:g}\\n")
    shared = 1 + 0.5 * (seed % 7)
    print(json.dumps([rate * shared, rate * shared * (1 + 0.01 * (seed % 3))]), flush=True)
"""


def fake(log: Path, rate: float) -> list[str]:
    return [sys.executable, "-S", "-c", FAKE, str(log), str(rate)]


def test_turns_reverse_and_processes_are_new_in_each_block(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    told: list[tuple[int, int]] = []
    contest = take_turns(
        [bundle, bundle], blocks=7, turns=1, commands=[fake(log, 1), fake(log, 2)], on_block=lambda *at: told.append(at)
    )
    words = log.read_text().split("\n")
    assert words.count("start 1") == words.count("start 2") == 7
    asked = [word for word in words if word and not word.startswith("start")]
    assert asked[:12] == list("121221" + "212112")  # a warm-up one way, then there and back
    assert told == [(index, 7) for index in range(8)]
    assert [len(block) for one in contest.samples for block in one["decode"]] == [2] * 14


def test_what_both_share_cancels_and_what_differs_is_told(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contest = take_turns(
        [bundle, bundle, bundle], blocks=7, turns=1, commands=[fake(log, 10), fake(log, 9), fake(log, 10)]
    )
    verdicts = contest.against(0, 1)
    assert [(verdict.name, verdict.verdict) for verdict in verdicts] == [("prefill", "slower"), ("decode", "slower")]
    assert [verdict.ratio for verdict in verdicts] == pytest.approx([0.9, 0.9])
    assert [verdict.verdict for verdict in contest.against(0, 2)] == ["cannot tell"] * 2
    assert contest.names == ("tiny",) * 3


@given(level=st.floats(0.01, 1e4), slope=st.floats(-0.1, 0.1), truth=st.floats(0.5, 2), turns=st.integers(1, 4))
def test_a_steady_drift_cancels_in_a_block(level: float, slope: float, truth: float, turns: int) -> None:
    """The machine speeds up by a constant factor from turn to turn, in the order a b b a a b b a ..."""
    moment = itertools.count()
    rates: tuple[list[float], list[float]] = ([], [])
    for one, other in [(0, 1), (1, 0)] * turns:
        for which in (one, other):
            rates[which].append(level * (truth if which else 1) * math.exp(slope * next(moment)))
    assert block_ratio(tuple(rates[0]), tuple(rates[1])) == pytest.approx(truth)


def test_one_way_there_and_back_among_three_may_be_spoilt() -> None:
    assert block_ratio((10.0,) * 6, (9.0, 9.0, 2.0, 5.0, 9.0, 9.0)) == pytest.approx(0.9)


def test_a_contest_among_equals_on_a_machine_that_drifts_and_stutters() -> None:
    """Each process has luck of its own; the machine wanders, and other programs halve its speed for several turns."""
    generator = np.random.default_rng(0)

    def rates(truth: float) -> Contest:
        samples: list[dict[str, list[Block]]] = [{name: [] for name in FIGURES} for _ in (0, 1)]
        for _ in range(8):
            luck, pace = generator.normal(scale=0.01, size=2), np.cumsum(generator.normal(scale=0.02, size=8))
            if generator.random() < 0.3:
                begin = generator.integers(8)
                pace[begin : begin + 4] -= 0.7
            for name in FIGURES:
                turns = np.exp(pace + generator.normal(scale=0.03, size=8))
                order = np.array([0, 1, 1, 0, 0, 1, 1, 0])
                for which in (0, 1):
                    values = turns[order == which] * (truth if which else 1) * np.exp(luck[which])
                    samples[which][name].append(tuple(values.tolist()))
        return Contest(("a", "b"), tuple({name: tuple(blocks) for name, blocks in one.items()} for one in samples))

    equal = [{row.verdict for row in rates(1.0).against(0, 1)} for _ in range(200)]
    assert equal.count({"cannot tell"}) >= 190
    slower = [[row.verdict for row in rates(0.9).against(0, 1)].count("slower") for _ in range(200)]
    assert sum(slower) >= 300


def test_a_process_that_ends_is_named_by_its_last_words(bundle: Path) -> None:
    dying = [sys.executable, "-S", "-c", "import sys; sys.exit('error: it broke')"]
    with pytest.raises(DeviceError, match="the process of a bundle ended: error: it broke"):
        take_turns([bundle, bundle], blocks=7, commands=[dying, dying])


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "two bundles or more: got 1"),
        (2, {"blocks": 6}, "--blocks must be at least 7: got 6"),
        (2, {"prompt_tokens": 256}, "must be from 1 to 255: got 256 and 16"),
        (2, {"generate_tokens": -3}, "must be from 1 to 255: got 64 and -3"),
    ],
)
def test_what_cannot_be(count: int, options: dict[str, int], message: str, bundle: Path) -> None:
    with pytest.raises(UserError, match=message):
        take_turns([bundle] * count, **options)  # type: ignore[arg-type]


def test_the_loop_of_a_process_answers_with_both_rates(bundle: Path) -> None:
    answers = list(serve(bundle, context=64, threads=1, requests=iter(["[8, 4, 0]\n", "[16, 2, 1]\n"])))
    assert len(answers) == 2
    for answer in answers:
        assert len(json.loads(answer)) == len(FIGURES)
        assert all(rate > 0 for rate in json.loads(answer))


@pytest.mark.slow
def test_real_processes(bundle: Path) -> None:
    contest = take_turns([bundle, bundle], blocks=7, turns=1, threads=1)
    assert all(len(blocks) == 7 for one in contest.samples for blocks in one.values())
