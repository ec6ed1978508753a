"""Accounts: by hand, and profiles that have no joules."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import ek, ok

from edgekit.account import GENERATED, PROMPT, Use, account
from edgekit.assistant.costs import Logged, read_costs
from edgekit.assistant.records import Entry, Records
from edgekit.errors import ModelError, UserError
from edgekit.report import Measurement, Report


def profile(read: float | None, written: float | None) -> Report:
    rows = (Measurement(PROMPT, read, "J", note="x"), Measurement(GENERATED, written, "J", note="no sensor"))
    return Report("profile", rows, subject="small")


def test_the_sum_is_that_by_hand() -> None:
    use = Use(10, 5, answers=1000, grid_g_per_kwh=360, price_per_kwh=0.36)
    rows = {row.name: row.value for row in account(profile(0.1, 1.0), use, against=profile(0.2, 2.0))}
    assert rows["energy, 1000 answers"] == pytest.approx(6000)
    assert rows["CO2, 1000 answers"] == pytest.approx(0.6)
    assert rows["cost, 1000 answers, uncompressed"] == pytest.approx(0.0012)
    assert rows["energy saved"] == pytest.approx(50)


def test_without_joules_there_is_no_account_but_a_reason() -> None:
    rows = account(profile(None, None), Use(0, 5), against=profile(1, 1))
    assert rows[0].value is None
    assert "no sensor" in rows[0].note
    assert rows[-1].value is None
    with pytest.raises(UserError):
        Use(-1, 5)


def test_the_command(tmp_path: Path) -> None:
    profile(0.1, 1.0).save(tmp_path / "p.json")
    assert "energy, 1000 answers" in ok("account", tmp_path / "p.json", "--grid", "380").out
    assert ek("account", tmp_path / "absent.json").status == 2
    assert ek("account").status == 2


def cost(read: int, cached: int, written: int, joules: float | None) -> dict[str, object]:
    return {"prompt_tokens": read, "reused_tokens": cached, "generated_tokens": written, "joules": joules}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Four answers: two measured, one not, one handed over; and one that was stopped."""
    path = tmp_path / "conversations.db"
    records = Records.open(path, keep_days=0)
    records.add("a", Entry("user", "What is it?"))
    for facts in (
        {"cost": cost(30, 10, 10, 2.0)},
        {"cost": cost(20, 0, 30, 4.0)},
        {"cost": cost(20, 0, 20, None)},
        {"cost": cost(0, 0, 0, None), "route": {"to": "elsewhere"}},
        {"stopped": True},
    ):
        records.add("a", Entry("assistant", "It is.", facts))
    (tmp_path / "export.jsonl").write_text("".join(records.export()))
    records.close()
    return path


def test_a_log_and_its_export_say_the_same(log: Path) -> None:
    found = read_costs(log)
    assert found == read_costs(log.with_name("export.jsonl"))
    assert found == [
        Logged(20, 10, 2.0),
        Logged(20, 30, 4.0),
        Logged(20, 20, None),
        Logged(0, 0, None, elsewhere=True),
    ]


def test_accounts_of_a_log(log: Path, tmp_path: Path) -> None:
    """Measured joules as they are; the uncompressed model by its profile and the log's tokens."""
    profile(0.2, 1.0).save(tmp_path / "before.json")
    words = ("account", "--log", log, "--against", tmp_path / "before.json", "--grid", "360", "--json")
    rows = {row.name: row for row in Report.from_json(ok(*words).out).measurements}
    assert rows["answers in the log"].value == 4
    assert rows["energy, 1000 answers"].value == pytest.approx(3000)
    assert (rows["energy, 1000 answers"].how, rows["energy, 1000 answers"].n) == ("measured", 2)
    assert rows["CO2, 1000 answers"].value == pytest.approx(0.3)
    assert rows["energy, 1000 answers, uncompressed"].value == pytest.approx(1000 * (15 * 0.2 + 15 * 1.0))
    assert rows["energy saved"].value == pytest.approx(100 * (1 - 3 / 18))


def test_a_log_without_joules_takes_the_profile_s(log: Path, tmp_path: Path) -> None:
    lines = log.with_name("export.jsonl").read_text().replace('"joules": 2.0', '"joules": null')
    (tmp_path / "dark.jsonl").write_text(lines.replace('"joules": 4.0', '"joules": null'))
    profile(0.1, 1.0).save(tmp_path / "p.json")
    assert "needs joules" in ek("account", "--log", tmp_path / "dark.jsonl").err
    out = ok("account", tmp_path / "p.json", "--log", tmp_path / "dark.jsonl", "--json").out
    rows = {row.name: row for row in Report.from_json(out).measurements}
    assert rows["energy, 1000 answers"].value == pytest.approx(1000 * (15 * 0.1 + 15 * 1.0))
    assert rows["energy, 1000 answers"].how == "estimated"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", UserError),
        (b"SQLite format 3\0 and nothing of it", UserError),
        (b"\xff\xfe", UserError),
        (b"{", ModelError),
        (b"[1]", ModelError),
        (b'{"entries": [{"role": "assistant", "cost": {"joules": 1}}]}', ModelError),
        (b'{"entries": [{"role": "assistant", "cost": {"joules": "x", "prompt_tokens": "y"}}]}', ModelError),
    ],
)
def test_logs_that_are_none(content: bytes, kind: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(content)
    with pytest.raises(kind, match="a log must"):
        read_costs(tmp_path / "log")
    with pytest.raises(UserError):
        read_costs(tmp_path / "absent")
