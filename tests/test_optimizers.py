"""The three implementations of an optimizer are one: ours, torch's, and apex's where it is installed."""

import sys
import types

import pytest
import torch

from safer_fast.optimizers import SGD, AdamW


class FusedAdam(torch.optim.AdamW):
    """As apex's: the step count lives in the group, not in the state."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["step"] = torch.tensor(float(group["step"]))
        return super().step(closure)


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> None:
    package, optimizers = types.ModuleType("apex"), types.ModuleType("apex.optimizers")
    optimizers.FusedSGD, optimizers.FusedAdam = torch.optim.SGD, FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def run(optimizer, *, steps: int = 5, poison: int | None = None):
    """Weights, copy and state after some steps; one gradient may be NaN."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, generator=generator, dtype=torch.float64)
    copy, state = w.float(), optimizer.init(w)
    for i in range(steps):
        g = torch.randn(40, generator=generator, dtype=torch.float64) * 3
        if i == poison:
            g[3] = torch.nan
        optimizer.update_(w, g, state, lr=torch.tensor(0.1 / (i + 1)), norm=g.norm(), clip=1.0, copy=copy)
    return {"w": w, "copy": copy, **state}


@pytest.mark.parametrize("impl", ["torch", "apex"])
@pytest.mark.parametrize("make", [SGD, AdamW])
@pytest.mark.parametrize("poison", [None, 0, 2])
def test_every_implementation_is_the_same_update(apex, make, impl: str, poison) -> None:
    ours, theirs = run(make(), poison=poison), run(make(impl=impl), poison=poison)
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-6, atol=1e-7)


def test_apex_that_is_not_there_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(ValueError, match="install NVIDIA's apex from its source"):
        SGD(impl="apex")


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of fused, torch, apex"):
        AdamW(impl="fast")
