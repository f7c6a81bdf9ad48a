"""The loss scale against torch.amp.GradScaler."""

import random

import torch

from safer_fast.scaler import GROWTH_INTERVAL, LossScaler


def test_the_rule_is_that_of_grad_scaler():
    w = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], 0.1)
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    ours = LossScaler(torch.device("cpu"), initial=8.0, interval=3)
    draw = random.Random(0)
    scales = []
    for _ in range(200):
        finite = draw.random() < 0.8
        optimizer.zero_grad()
        theirs.scale((w * (1.0 if finite else float("inf"))).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(finite))
        assert float(ours.scale) == theirs.get_scale()
        assert int(ours.state["good"]) == theirs._get_growth_tracker()
        scales.append(float(ours.scale))
    assert len(set(scales)) > 5  # it went up and down


def test_the_scale_stays_finite_when_it_can_double_for_ever():
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1)
    ours = LossScaler(torch.device("cpu"), initial=2.0**126, interval=1)
    w = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        theirs.scale(0 * w.sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(True))
        assert float(ours.scale) == theirs.get_scale()


def test_defaults_are_those_of_grad_scaler():
    theirs = torch.amp.GradScaler("cpu")
    assert float(LossScaler(torch.device("cpu")).scale) == theirs._init_scale
    assert theirs.get_growth_interval() == GROWTH_INTERVAL
