"""Attacks: the budget in float64, keyed draws, closed forms, and what they leave alone."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from safer_fast.attacks import L2, OBJECTIVES, PGD, Linf, margin, threat
from safer_fast.attacks.threat import TOLERANCE

EXACT = 1e-6  # float32 closed forms: sums of 64 terms


class Linear(nn.Module):
    """Two or more classes on 8×8 images, linear: the worst case has a closed form."""

    def __init__(self, classes=2, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(x.flatten(1))


def sizes(x_adv, x, norm):
    delta = (x_adv.double() - x.double()).flatten(1)
    return delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)


BUDGETS = st.one_of(st.just(0.0), st.floats(1e-6, 2.0), st.sampled_from([1 / 255, 4 / 255, 8 / 255, 0.5]))


@settings(max_examples=60)
@given(
    eps=BUDGETS,
    steps=st.integers(0, 4),
    seed=st.integers(0, 2**62),
    norm=st.sampled_from(["Linf", "L2"]),
    start=st.sampled_from(["uniform", "gaussian", "none"]),
    objective=st.sampled_from(["ce", "margin", "kl"]),
    factor=st.sampled_from([0.25, 1.0, 2.0]),
    flat=st.sampled_from([None, 0.0, 0.5, 1.0]),
)
@example(eps=1e-4, steps=0, seed=0, norm="L2", start="gaussian", objective="ce", factor=0.25, flat=0.5)
@example(eps=1e-4, steps=0, seed=0, norm="Linf", start="gaussian", objective="ce", factor=0.25, flat=0.5)
@example(eps=8 / 255, steps=4, seed=1, norm="Linf", start="uniform", objective="ce", factor=2.0, flat=1.0)
def test_the_budget_holds_and_pixels_stay_in_range(eps, steps, seed, norm, start, objective, factor, flat):
    model = Linear(3)
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4, 1, 8, 8, generator=generator)
    x[0] = 0.0 if flat is None else flat  # every pixel of a flat image rounds alike
    y = torch.tensor([0, 1, 2, 0])
    attack = PGD(eps=eps, alpha=factor * eps or None, steps=steps, norm=norm, start=start, objective=objective)
    x_adv = attack(model, x, y, seed=seed)
    assert float(sizes(x_adv, x, norm).max()) <= eps + TOLERANCE
    assert float(x_adv.min()) >= 0
    assert float(x_adv.max()) <= 1
    assert x_adv.dtype == x.dtype
    assert attack.threat.excess(x_adv, x) <= TOLERANCE
    if eps == 0:
        assert torch.equal(x_adv, x)


def test_a_zero_budget_of_one_call_changes_nothing(vit, images):
    x, y = images(4)
    for norm in ("Linf", "L2"):
        for start in ("uniform", "gaussian", "none"):
            assert torch.equal(PGD(eps=0.1, norm=norm, start=start)(vit(), x, y, eps=0.0), x)


def test_excess_sees_budget_and_range(images):
    x, _ = images(2)
    outside = x.clone()
    outside[1, 0, 3, 3] = x[1, 0, 3, 3] - 0.25
    x[:] = outside + 0.0
    x[1, 0, 3, 3] += 0.25
    assert Linf(0.1).excess(outside, x) == pytest.approx(0.15, abs=1e-6)
    assert L2(0.1).excess(outside, x) == pytest.approx(0.15, abs=1e-6)
    assert Linf(0.3).excess(outside.clamp(0, 1), x) == 0
    x[0, 0, 0, 0], outside[0, 0, 0, 0] = 1.0, 1.02
    assert Linf(0.3).excess(outside.clamp_min(0), x) == pytest.approx(0.02, abs=1e-6)


ALL = [
    PGD(eps=0.1, steps=2),
    PGD(eps=0.5, steps=2, norm="L2"),
    PGD(eps=0.1, steps=2, restarts=3, objective="margin"),
    PGD(eps=0.1, steps=2, start="gaussian", objective="kl"),
    PGD(eps=0.5, steps=2, norm="L2", start="gaussian"),
]


@pytest.mark.parametrize("attack", ALL, ids=str)
def test_draws_depend_on_seed_id_and_restart_alone(vit, images, attack):
    model = vit()
    x, y = images(8)
    ids = torch.tensor([3, 99, 5, 2**40, 7, 0, 11, 12])
    x_adv = attack(model, x, y, ids, seed=5)
    assert torch.equal(x_adv, attack(model, x, y, ids, seed=5))
    order = torch.tensor([4, 7, 0, 2, 6, 1, 3, 5])
    assert torch.equal(attack(model, x[order], y[order], ids[order], seed=5), x_adv[order])
    assert not torch.equal(x_adv, attack(model, x, y, ids, seed=6))
    assert not torch.equal(x_adv, attack(model, x, y, ids + 1, seed=5))
    torch.manual_seed(123)  # the global generator has no say
    assert torch.equal(x_adv, attack(model, x, y, ids, seed=torch.tensor(5)))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_a_part_of_the_batch_gets_the_same_start(vit, images, norm, start):
    x, y = images(8)
    ids = torch.arange(100, 108)
    attack = PGD(eps=0.3, steps=0, norm=norm, start=start)
    whole = attack(vit(), x, y, ids, seed=2)
    part = attack(vit(), x[3:6], y[3:6], ids[3:6], seed=2)
    assert torch.equal(part, whole[3:6])


def test_starts_have_their_distributions():
    x = torch.full((400, 1, 8, 8), 0.5)
    y = torch.zeros(400, dtype=torch.long)
    delta = PGD(eps=0.2, steps=0)(nn.Identity(), x, y) - x
    assert delta.std().item() == pytest.approx(0.2 / math.sqrt(3), rel=0.02)
    assert abs(delta.mean().item()) < 0.003
    assert delta.abs().max() > 0.199
    delta = PGD(eps=0.2, steps=0, start="gaussian")(nn.Identity(), x, y) - x
    assert delta.std().item() == pytest.approx(0.001, rel=0.02)
    assert (delta.abs() > 0.003).float().mean().item() == pytest.approx(0.0027, abs=0.001)
    size = sizes(PGD(eps=0.4, steps=0, norm="L2")(nn.Identity(), x[:, :, :1, :2], y), x[:, :, :1, :2], "L2")
    # Uniform in a disc: the squared radius is uniform in [0, eps²].
    assert (size**2).mean().item() == pytest.approx(0.08, rel=0.1)
    assert size.max() > 0.39


def test_different_restarts_draw_differently_from_different_streams(vit, images):
    """Each restart alone, by the attack's own selection of the worst, explains the result of all."""
    model = vit()
    x, y = images(6)
    starts = []

    class Spy(nn.Module):
        def forward(self, z):
            if z.requires_grad:
                starts.append(z.detach().clone())
            return model(z)

    PGD(eps=0.1, steps=1, restarts=3)(Spy(), x, y)
    assert len(starts) == 3
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize("objective", ["ce", "margin"])
@pytest.mark.parametrize("eps", [0.01, 0.1, 0.6])
def test_linf_on_two_linear_classes_is_the_exact_worst_case(objective, eps):
    """z_1 − z_0 falls fastest at x + eps·sign, clipped to the box pixel by pixel: nothing is worse."""
    model = Linear().double()
    x = torch.rand(50, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(50) % 2
    w = (model.head.weight[1] - model.head.weight[0]).detach().view(1, 1, 8, 8)
    towards = torch.where(y == 1, -1.0, 1.0).view(-1, 1, 1, 1)  # the attack lowers the right class
    exact = (x + eps * (towards * w).sign()).clamp(0, 1)
    x_adv = PGD(eps=eps, steps=10, objective=objective)(model, x, y)
    assert torch.allclose(x_adv, exact, rtol=0, atol=1e-15)
    worst = margin(model(exact), y)
    assert (margin(model(x_adv), y) <= worst + 1e-12).all()
    assert torch.allclose(margin(model(x_adv), y), worst, rtol=0, atol=1e-12)


def test_l2_on_two_linear_classes_is_the_exact_worst_case_inside_the_box():
    model = Linear().double()
    x = 0.4 + 0.2 * torch.rand(50, 1, 8, 8, dtype=torch.float64)  # far from the box
    y = torch.arange(50) % 2
    w = (model.head.weight[1] - model.head.weight[0]).detach()
    eps = 0.2
    exact = margin(model(x), y) + eps * w.norm()
    x_adv = PGD(eps=eps, steps=40, norm="L2", alpha=0.1, start="none")(model, x, y)
    found = margin(model(x_adv), y)
    assert (found <= exact + 1e-12).all()
    assert torch.allclose(found, exact, rtol=0, atol=EXACT)


def test_the_margin_says_what_is_misclassified(images):
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 5.0, 2.0]])
    y = torch.tensor([0, 1, 1])
    assert margin(logits, y).tolist() == [-1.0, 2.0, -3.0]


def test_objectives_are_their_formulas():
    torch.manual_seed(0)
    logits, clean, y = torch.randn(4, 3).double(), torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 1])
    p, q = logits.softmax(1), clean.softmax(1)
    rows = torch.arange(4)
    assert torch.allclose(OBJECTIVES["ce"](logits, y, None), -p[rows, y].log())
    by_hand = (q * (q / p).log()).sum(1)  # KL(p(x) ‖ p(x'))
    assert torch.allclose(OBJECTIVES["kl"](logits, y, clean.log_softmax(1)), by_hand)


def test_more_restarts_are_never_weaker(vit, images):
    model = vit()
    x, y = images(32)
    for objective in ("ce", "margin"):
        found = [
            margin(model(PGD(eps=0.05, steps=2, restarts=r, objective=objective)(model, x, y)), y) for r in (1, 2, 4)
        ]
        assert (found[0] <= found[1]).all()
        assert (found[1] <= found[2]).all()
        assert (found[0] < found[2]).any()


def test_more_steps_raise_the_loss(vit, images):
    model = vit()
    x, y = images(32)
    losses = [F.cross_entropy(model(PGD(eps=0.1, steps=s)(model, x, y)), y).item() for s in (0, 2, 10)]
    assert F.cross_entropy(model(x), y).item() < losses[1] < losses[2]
    assert losses[0] < losses[1]


def test_pgd_against_a_loop_by_hand(vit, images):
    """L∞ and L2, cross-entropy, float64, from the clean image."""
    model = vit(dtype=torch.float64)
    x, y = images(6, dtype=torch.float64)
    for norm, eps, alpha in (("Linf", 0.1, 0.04), ("L2", 0.6, 0.25)):
        by_hand = x.clone()
        for _ in range(5):
            z = by_hand.clone().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
            if norm == "Linf":
                delta = (by_hand + alpha * g.sign() - x).clamp(-eps, eps)
            else:
                delta = by_hand + alpha * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - x
                delta = delta * (eps / delta.flatten(1).norm(dim=1)).clamp(max=1).view(-1, 1, 1, 1)
            by_hand = (x + delta).clamp(0, 1)
        x_adv = PGD(eps=eps, alpha=alpha, steps=5, norm=norm, start="none")(model, x, y)
        assert torch.allclose(x_adv, by_hand, rtol=0, atol=1e-12 if norm == "Linf" else EXACT)


def test_trades_attack_against_a_loop_by_hand(vit, images):
    """KL(p(x) ‖ p(x')) from x + 0.001·N(0, 1): the start is read off, the ascent is written out."""
    model = vit(dtype=torch.float64)
    x, y = images(6, dtype=torch.float64)
    attack = PGD(eps=0.1, steps=0, objective="kl", start="gaussian")
    by_hand = attack(model, x, y, seed=3)
    assert 0 < (by_hand - x).abs().max() < 0.006
    target = model(x).softmax(1).detach()
    for _ in range(4):
        z = by_hand.clone().requires_grad_()
        value = F.kl_div(F.log_softmax(model(z), 1), target, reduction="sum")
        (g,) = torch.autograd.grad(value, z)
        by_hand = torch.min(torch.max(by_hand + 0.025 * g.sign(), x - 0.1), x + 0.1).clamp(0, 1)
    x_adv = dataclasses.replace(attack, steps=4)(model, x, y, seed=3)
    assert torch.allclose(x_adv, by_hand, rtol=0, atol=1e-12)
    # From x itself the KL term has no gradient, hence the noise.
    from_x = dataclasses.replace(attack, steps=1, start="none")(model, x, y)
    assert not torch.allclose(from_x, dataclasses.replace(attack, steps=1)(model, x, y, seed=3))


def test_soft_labels(vit, images):
    """One-hot soft labels are hard labels; mixed ones follow the gradient of the mixed loss."""
    model = vit(dtype=torch.float64)
    x, y = images(6, dtype=torch.float64)
    attack = PGD(eps=0.1, steps=3, restarts=2)
    assert torch.equal(attack(model, x, F.one_hot(y, 5).double()), attack(model, x, y))
    soft = torch.rand(6, 5, dtype=torch.float64).softmax(1)
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(-(soft * model(z).log_softmax(1)).sum(), z)
    x_adv = PGD(eps=0.1, alpha=0.1, steps=1, start="none")(model, x, soft)
    assert torch.allclose(x_adv, (x + 0.1 * g.sign()).clamp(0, 1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("attack", ALL, ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(vit, images, bits, differing, attack, fails):
    model = vit(proj_drop_rate=0.5).train()
    model.blocks[1].eval()
    model.blocks[1].mlp.train()
    model.norm.bias.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = bits(model)
    calls = []

    def watch(module, args, output):
        calls.append(any(m.training for m in module.modules()))
        if fails and len(calls) == 2:
            raise RuntimeError("no more")

    handle = model.register_forward_hook(watch)
    x, y = images(4)
    if fails:
        with pytest.raises(RuntimeError, match="no more"):
            attack(model, x, y)
    else:
        attack(model, x, y)
    handle.remove()
    assert differing(before, bits(model)) == []
    assert not any(calls)
    assert not x.requires_grad


def test_attack_in_no_grad_and_on_images_that_require_grad(vit, images):
    model = vit()
    x, y = images(4)
    expected = PGD(eps=0.1, steps=2)(model, x, y)
    with torch.no_grad():
        assert torch.equal(PGD(eps=0.1, steps=2)(model, x, y), expected)
    z = x.clone().requires_grad_()
    x_adv = PGD(eps=0.1, steps=2)(model, z, y)
    assert torch.equal(x_adv, expected)
    assert not x_adv.requires_grad
    assert z.grad is None


def test_the_budget_of_a_call_scales_the_step(vit, images):
    model = vit(dtype=torch.float64)
    x, y = images(4, dtype=torch.float64)
    a = PGD(eps=0.2, alpha=0.1, steps=3)(model, x, y, eps=0.1)
    b = PGD(eps=0.1, alpha=0.05, steps=3)(model, x, y)
    assert torch.allclose(a, b, rtol=0, atol=1e-15)


def test_alpha_defaults_to_a_quarter_of_eps(vit, images):
    x, y = images(4)
    assert torch.equal(PGD(eps=0.1)(vit(), x, y), PGD(eps=0.1, alpha=0.1 / 4)(vit(), x, y))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"eps": 0.1, "alpha": 0.2001}, "at most 2 eps"),
        ({"eps": 0.1, "alpha": 0.0}, "more than 0"),
        ({"eps": 0.1, "alpha": -0.1}, "more than 0"),
        ({"eps": -0.1}, "0 or more"),
        ({"eps": float("nan")}, "0 or more"),
        ({"eps": float("inf")}, "0 or more"),
        ({"steps": -1}, "steps=-1"),
        ({"restarts": 0}, "restarts=0"),
        ({"norm": "L1"}, "choose one of Linf, L2"),
        ({"start": "zero"}, "choose one of uniform, gaussian, none"),
        ({"objective": "dlr"}, "choose one of ce, margin, kl"),
    ],
)
def test_values_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        PGD(**options)


def test_legal_edges():
    assert PGD(eps=0.1, alpha=0.2).step_size == 0.2
    assert PGD(eps=0.0, alpha=5.0).eps == 0  # eps = 0 is legal whatever the step
    assert threat("L2", 0.5) == L2(0.5) != Linf(0.5)
    with pytest.raises(ValueError, match="choose one of Linf, L2"):
        threat("L0", 1.0)
