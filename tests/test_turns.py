"""Turns: the order of work, what a block gives, and processes that die."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_reference import tiny_checkpoint

from edgekit.errors import DeviceError, UserError
from edgekit.export.export import export
from edgekit.export.targets import TARGETS
from edgekit.profile.turns import serve, take_turns


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
    print(json.dumps([rate * shared, rate * shared * (1 + 0.01 * (seed % 3)), 1e3 / rate / shared]), flush=True)
"""


def fake(log: Path, rate: float) -> list[str]:
    return [sys.executable, "-S", "-c", FAKE, str(log), str(rate)]


def test_turns_reverse_and_processes_are_new_in_each_block(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    told: list[tuple[int, int]] = []
    take_turns(
        [bundle, bundle], blocks=6, turns=2, commands=[fake(log, 1), fake(log, 2)], on_block=lambda *at: told.append(at)
    )
    words = log.read_text().split("\n")
    assert words.count("start 1") == words.count("start 2") == 6
    asked = [word for word in words if word and not word.startswith("start")]
    assert asked[:12] == list("122112211221")
    assert told == [(index, 6) for index in range(7)]


def test_what_both_share_cancels_and_what_differs_is_told(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contest = take_turns(
        [bundle, bundle, bundle], blocks=6, turns=1, commands=[fake(log, 10), fake(log, 9), fake(log, 10)]
    )
    verdicts = contest.against(0, 1)
    assert [verdict.verdict for verdict in verdicts] == ["slower"] * 3
    assert [verdict.ratio for verdict in verdicts] == pytest.approx([0.9, 0.9, 1 / 0.9])
    assert [verdict.verdict for verdict in contest.against(0, 2)] == ["cannot tell"] * 3
    assert contest.names == ("tiny",) * 3


def test_a_process_that_ends_is_named_by_its_last_words(bundle: Path) -> None:
    dying = [sys.executable, "-S", "-c", "import sys; sys.exit('error: it broke')"]
    with pytest.raises(DeviceError, match="the process of a bundle ended: error: it broke"):
        take_turns([bundle, bundle], blocks=6, commands=[dying, dying])


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {}, "two bundles or more: got 1"),
        (2, {"blocks": 5}, "--blocks must be at least 6: got 5"),
        (2, {"prompt_tokens": 256}, "must be from 1 to 255: got 256 and 32"),
        (2, {"generate_tokens": -3}, "must be from 1 to 255: got 64 and -3"),
    ],
)
def test_what_cannot_be(count: int, options: dict[str, int], message: str, bundle: Path) -> None:
    with pytest.raises(UserError, match=message):
        take_turns([bundle] * count, **options)  # type: ignore[arg-type]


def test_the_loop_of_a_process_answers_with_three_figures(bundle: Path) -> None:
    answers = list(serve(bundle, context=64, threads=1, requests=iter(["[8, 4, 0]\n", "[16, 2, 1]\n"])))
    for answer in answers:
        assert all(figure > 0 for figure in json.loads(answer))
    assert len(answers) == 2


@pytest.mark.slow
def test_real_processes(bundle: Path) -> None:
    contest = take_turns([bundle, bundle], blocks=6, turns=1, threads=1)
    assert all(len(values) == 6 for one in contest.samples for values in one.values())
