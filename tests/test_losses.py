"""Losses against their papers' formulas, written out in probabilities and float64."""

import pytest
import torch
from torch import nn

from safer_fast.losses import LOSSES, MART, TRADES, CrossEntropy

F64 = 1e-12


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).double()
    x = torch.rand(7, 1, 8, 8, dtype=torch.float64)
    x_adv = (x + 0.3 * torch.randn_like(x)).clamp(0, 1)
    y = torch.randint(0, 5, (7,))
    return model, x_adv, x, y, model(x_adv).softmax(1), model(x).softmax(1)


def one_by_one(p, q, y):
    """Rows of (p_adv, p_clean, y) as plain Python numbers."""
    return zip(p.tolist(), q.tolist(), y.tolist(), strict=True)


def kl(a, b):
    return sum(u * torch.tensor(u / v, dtype=torch.float64).log().item() for u, v in zip(a, b, strict=True))


def log(v):
    return torch.tensor(v, dtype=torch.float64).log().item()


def test_cross_entropy(setting):
    model, x_adv, x, y, p, q = setting
    loss, logits = CrossEntropy()(model, x_adv, x, y)
    by_hand = sum(-log(p_i[k]) for p_i, _, k in one_by_one(p, q, y)) / 7
    assert loss.item() == pytest.approx(by_hand, abs=F64)
    assert torch.equal(logits, model(x_adv))


def test_cross_entropy_with_soft_labels_and_smoothing(setting):
    model, x_adv, x, y, p, _ = setting
    soft = torch.rand(7, 5, dtype=torch.float64).softmax(1)
    by_hand = -(soft * p.log()).sum() / 7
    assert CrossEntropy()(model, x_adv, x, soft)[0].item() == pytest.approx(by_hand.item(), abs=F64)
    smooth = 0.8 * torch.eye(5, dtype=torch.float64)[y] + 0.2 / 5
    by_hand = -(smooth * p.log()).sum() / 7
    assert CrossEntropy(label_smoothing=0.2)(model, x_adv, x, y)[0].item() == pytest.approx(by_hand.item(), abs=F64)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades(setting, beta):
    model, x_adv, x, y, p, q = setting
    loss, logits = TRADES(beta)(model, x_adv, x, y)
    by_hand = sum(-log(q_i[k]) + beta * kl(q_i, p_i) for p_i, q_i, k in one_by_one(p, q, y)) / 7
    assert loss.item() == pytest.approx(by_hand, abs=F64)
    assert torch.equal(logits, model(x_adv))


@pytest.mark.parametrize("beta", [0.0, 5.0, 6.0])
def test_mart(setting, beta):
    model, x_adv, x, y, p, q = setting
    loss, logits = MART(beta)(model, x_adv, x, y)
    by_hand = 0.0
    for p_i, q_i, k in one_by_one(p, q, y):
        wrong = max(v for j, v in enumerate(p_i) if j != k)
        by_hand += -log(p_i[k]) - log(1 - wrong) + beta * kl(q_i, p_i) * (1 - q_i[k])
    assert loss.item() == pytest.approx(by_hand / 7, abs=F64)
    assert torch.equal(logits, model(x_adv))


def test_mart_is_finite_with_a_finite_gradient_where_a_wrong_class_is_certain():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss, _ = MART()(lambda x: logits, logits, logits, torch.tensor([1]))
    (g,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(g).all()


@pytest.mark.parametrize("kind", [TRADES, MART])
def test_gradients_flow_through_both_terms(setting, kind):
    """The KL term is not detached on either side: the gradient is that of central differences."""
    model, x_adv, x, y, *_ = setting
    w = model[1].weight
    loss, _ = kind()(model, x_adv, x, y)
    (g,) = torch.autograd.grad(loss, w)
    direction = torch.randn_like(w)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            w.add_(sign * 1e-5 * direction)
            values.append(kind()(model, x_adv, x, y)[0].item())
            w.sub_(sign * 1e-5 * direction)
    assert (values[0] - values[1]) / 2e-5 == pytest.approx((g * direction).sum().item(), rel=1e-7)


def test_refusals():
    for kind in (TRADES, MART):
        with pytest.raises(ValueError, match="beta=-1"):
            kind(beta=-1)
    with pytest.raises(ValueError, match="label_smoothing=1"):
        CrossEntropy(label_smoothing=1)
    assert list(LOSSES) == ["ce", "trades", "mart"]
