import math

import pytest
import torch

from snkernels.models.distillation import distillation_loss


def test_two_classes_by_hand() -> None:
    # Odds of 3:1 against 1:1 and 1:3: KL = ln 2 - H(1/4), and ln 3 / 2.
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3.0)]], [[math.log(3.0), 0.0]]])
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    expected = (math.log(2) - entropy, math.log(3) / 2, 0.0)
    for route, value in zip(logits, expected, strict=True):
        assert distillation_loss(route, teacher).item() == pytest.approx(value, abs=1e-6)
    assert distillation_loss(logits, teacher).item() == pytest.approx(sum(expected) / 3)


def test_temperature() -> None:
    logits, teacher = torch.randn(2, 3, 5), torch.randn(3, 5)
    soft = distillation_loss(logits, teacher, 4.0)
    torch.testing.assert_close(soft, 16 * distillation_loss(logits / 4, teacher / 4))


def test_routes_learn_and_the_teacher_does_not() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(logits, teacher)
    loss.backward()
    assert teacher.grad is None
    # d KL / d logits is the difference of the probabilities.
    expected = (logits.softmax(-1) - teacher.softmax(-1)) / 6
    torch.testing.assert_close(logits.grad, expected.detach())


def test_half_precision_is_computed_in_single() -> None:
    logits, teacher = torch.randn(2, 3, 5).half(), torch.randn(3, 5).half()
    loss = distillation_loss(logits, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(logits.float(), teacher.float()))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\) and \(2, 5\)"):
        distillation_loss(torch.zeros(2, 3, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\) and \(2, 3, 5\)"):
        distillation_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            distillation_loss(torch.zeros(3, 5), torch.zeros(3, 5), temperature)
