"""Linear and Conv2d layers that add a perturbation of their weight at the output: x·Wᵀ + x·Eᵀ.

A bf16 weight cannot hold SAM's perturbation: rho = 0.05 spread over a million elements is 4e-5 each, below bf16's
spacing at 0.02. Kept apart, E keeps its own exponents, and there is nothing to restore afterwards.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class PerturbedLinear(nn.Linear):
    """A Linear whose class was swapped by `perturbable`; `e_weight`, `e_bias` hold E, `moved` says whether it counts."""

    moved: bool
    e_weight: Tensor
    e_bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return linear_rows(self, x, slice(None))


class PerturbedConv2d(nn.Conv2d):
    """As PerturbedLinear."""

    moved: bool
    e_weight: Tensor
    e_bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, out, H', W']."""
        y = self._conv_forward(x, self.weight, self.bias)
        return y + self._conv_forward(x, self.e_weight, self.e_bias) if self.moved else y


_SWAPS: dict[type, type] = {nn.Linear: PerturbedLinear, nn.Conv2d: PerturbedConv2d}


def is_perturbable(module: nn.Module) -> bool:
    """Whether this is exactly a Linear or Conv2d."""
    return type(module) in _SWAPS


def perturbable(module: Any, e_weight: Tensor, e_bias: Tensor | None) -> Any:
    """Makes the module one of the classes above, in place, with these tensors as E; not moved at first."""
    module.__class__ = _SWAPS[type(module)]
    module.e_weight, module.e_bias, module.moved = e_weight, e_bias, False
    return module


@contextmanager
def moved(modules: Iterable[Any]) -> Iterator[None]:
    """E counts inside."""
    modules = list(modules)
    try:
        for module in modules:
            module.moved = True
        yield
    finally:
        for module in modules:
            module.moved = False


def linear_rows(linear: nn.Linear, x: Tensor, rows: slice) -> Tensor:
    """x times some rows (outputs) of a Linear's weight, with their bias and, where it counts, their perturbation."""
    y = F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])
    if not getattr(linear, "moved", False):
        return y
    e_bias: Any = linear.e_bias
    e_weight: Any = linear.e_weight
    return y + F.linear(x, e_weight[rows], None if e_bias is None else e_bias[rows])
