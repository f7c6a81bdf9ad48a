"""Train and eval modes, and requires_grad flags, set for a while and given back one by one."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module, *, training: Iterable[str] = ()) -> Iterator[None]:
    """Every module in eval mode, except those named in `training` with all inside them; afterwards each has its own
    mode again (`model.train()` would lose a BatchNorm that was frozen)."""
    before = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for name in training:
            model.get_submodule(name).train()
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def only_grad(model: nn.Module, params: Iterable[nn.Parameter]) -> Iterator[None]:
    """requires_grad for these parameters alone; afterwards each has its own flag again."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in params:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def has_dropout(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether a named module, or one inside it, would draw random numbers in train mode."""
    modules = (m for name in names for m in model.get_submodule(name).modules())
    return any(getattr(m, p, 0) for m in modules if "Drop" in type(m).__name__ for p in ("p", "drop_prob", "prob"))
