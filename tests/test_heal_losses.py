"""The losses against their definitions in float64."""

from __future__ import annotations

import pytest

from edgekit.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_its_definition(temperature):
    from edgekit.heal.losses import kl

    student, teacher = torch.randn(5, 40).double() * 3, torch.randn(5, 40).double() * 3
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum()
    assert float(kl(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)


def test_kl_over_the_top_is_below_the_full_one_and_grows_with_it():
    from edgekit.heal.losses import kl, kl_top

    student, teacher = torch.randn(5, 40) * 3, torch.randn(5, 40) * 3
    found = [float(kl_top(student, teacher, top)) for top in (1, 4, 16, 40)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(float(kl(student, teacher)), rel=1e-5)
    assert float(kl_top(teacher, teacher, 4)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["kl", "kl_top", "lm", "hidden"])
def test_pieces_give_the_sum_and_gradient_of_the_whole(kind):
    from edgekit.heal.losses import Loss, total_loss

    targets = torch.randint(0, 40, (11,))
    teacher = torch.randn(11, 8), torch.randn(40, 8)
    found = []
    for piece in (3, 100):
        torch.manual_seed(0)
        h, W = torch.randn(11, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
        total = total_loss((h, W), teacher, targets, Loss(kind, top=5), piece=piece)
        total.backward()
        found.append((total.detach(), h.grad))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "mse"}, "loss must be"),
        ({"temperature": 0}, "temperature"),
        ({"top": 0}, "top"),
        ({"hidden_weight": -1}, "hidden"),
    ],
)
def test_what_cannot_be_a_loss_is_refused(arguments, message):
    from edgekit.heal.losses import Loss

    with pytest.raises(UserError, match=message):
        Loss(**arguments)
