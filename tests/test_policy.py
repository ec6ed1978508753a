"""Policies: which reports keep to them, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekit.errors import UserError
from edgekit.evaluate.policy import load_policy
from edgekit.report import Measurement, Report

REPORT = Report(
    "eval",
    (
        Measurement("accuracy difference, a", -1.0, "points", n=100, spread=0.8),
        Measurement("accuracy difference, b", 0.5, "points", n=100, spread=0.2),
        Measurement("energy", None, "J", note="no sensor"),
    ),
)


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ('measure = "accuracy difference, *"\nat_least = -1.5', 0),
        ('measure = "accuracy difference, *"\nat_least = -1.5\nuse = "worst"', 1),
        ('measure = "accuracy difference, *"\nat_least = -0.9', 1),
        ('measure = "accuracy difference, *"\nat_most = -2', 2),
        ('measure = "accuracy difference, ?"\nat_most = 0.5', 0),
        ('measure = "accuracy difference, b"\nat_most = 0.5\nuse = "worst"', 1),
        ('measure = "nothing like it"\nat_most = 1', 1),
        ('measure = "energy"\nat_most = 1', 1),
    ],
)
def test_rules(rule: str, broken: int, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(f"[[rule]]\n{rule}\n")
    assert len(load_policy(tmp_path / "policy.toml").broken(REPORT)) == broken


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the key 'rule' is missing"),
        ("rule = []", "at least one"),
        ('[[rule]]\nmeasure = "x"', "at_least or at_most"),
        ('[[rule]]\nmeasure = "x"\nat_lest = 1', "did you mean 'at_least'"),
        ("[[rule", "readable TOML"),
    ],
)
def test_files_that_are_no_policy(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "policy.toml")
    with pytest.raises(UserError, match="readable TOML"):
        load_policy(tmp_path / "absent.toml")
