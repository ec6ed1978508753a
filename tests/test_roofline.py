import pytest

from edgekit.errors import UserError
from edgekit.profile.roofline import roofline

FIGURES = {
    "bytes_per_token": 100e6, "bandwidth_gbs": 10.0, "prefill_rate": 1000.0, "decode_rate": 80.0, "overhead_s": 0.001,
}  # fmt: skip


def test_the_figures_follow_the_formula():
    found = roofline(**FIGURES)
    assert found.ceiling == pytest.approx(100)
    assert found.memory_s == pytest.approx(0.01)
    assert found.predicted == pytest.approx(1 / 0.011)
    assert found.achieved_gbs == pytest.approx(8)
    assert found.verdict == "bandwidth bound"
    assert "of 12.50 ms a token, reading needs 10.00" in found.reason


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "bandwidth bound"),
        ({"prefill_rate": 85.0}, "compute bound"),
        ({"bandwidth_gbs": 100.0, "overhead_s": 0.009}, "overhead bound"),
        ({"bandwidth_gbs": 100.0}, "none of them"),
    ],
)
def test_the_verdict_turns_with_what_is_slowest(changes, verdict):
    assert roofline(**FIGURES | changes).verdict == verdict


@pytest.mark.parametrize("name", ["bytes_per_token", "bandwidth_gbs", "prefill_rate", "decode_rate"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_figures_must_be_above_zero(name, value):
    with pytest.raises(UserError, match="above zero"):
        roofline(**FIGURES | {name: value})
