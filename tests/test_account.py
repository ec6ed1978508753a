"""Accounts: by hand, and profiles that have no joules."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import ek, ok

from edgekit.account import GENERATED, PROMPT, Use, account
from edgekit.errors import UserError
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
