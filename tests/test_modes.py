"""Modes and flags are given back one by one, also after an exception."""

import pytest

from safer_fast.modes import eval_mode, only_grad


@pytest.fixture
def mixed(vit):
    model = vit().train()
    model.blocks[0].eval()
    model.blocks[0].mlp.train()
    model.head.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_eval_mode(mixed, bits, differing, fails):
    before = bits(mixed)
    try:
        with eval_mode(mixed, training=["blocks.1"]):
            inside = {n: m.training for n, m in mixed.named_modules()}
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert {n for n, mode in inside.items() if mode} == {n for n in inside if n.startswith("blocks.1")}
    assert differing(before, bits(mixed)) == []


@pytest.mark.parametrize("fails", [False, True])
def test_only_grad(mixed, bits, differing, fails):
    before = bits(mixed)
    try:
        with only_grad(mixed, [mixed.head.weight, mixed.norm.bias]):
            inside = {n for n, p in mixed.named_parameters() if p.requires_grad}
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert inside == {"head.weight", "norm.bias"}
    assert differing(before, bits(mixed)) == []
