"""Threat models: how far an image may move."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

NORMS = ("Linf", "L2")
TOLERANCE = 1e-7  # rounding of x + δ in fp32 near 1 is 3e-8


@dataclass(frozen=True)
class Threat:
    """All images of [0, 1] within `eps` of the clean one in the norm of the class."""

    eps: float
    norm: ClassVar[str]

    def __post_init__(self) -> None:
        check_eps(self.eps)

    def excess(self, x_adv: Tensor, x: Tensor) -> float:
        """How far the batch leaves the threat model at most, counted in float64: budget or pixel range; 0 if inside."""
        delta = (x_adv.double() - x.double()).flatten(1)
        size = delta.abs().amax(1) if self.norm == "Linf" else delta.norm(dim=1)
        outside = max(float(-x_adv.min()), float(x_adv.max()) - 1)
        return max(0.0, float(size.max()) - self.eps, outside)


@dataclass(frozen=True)
class Linf(Threat):
    """‖δ‖∞ ≤ eps; 8/255 on CIFAR and Imagenette, 4/255 on ImageNet."""

    norm: ClassVar[str] = "Linf"


@dataclass(frozen=True)
class L2(Threat):
    """‖δ‖₂ ≤ eps; 0.5 on CIFAR."""

    norm: ClassVar[str] = "L2"


def threat(norm: str, eps: float) -> Threat:
    """The threat model of that name. Raises ValueError for an unknown one."""
    check_norm(norm)
    return Linf(eps) if norm == "Linf" else L2(eps)


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r}: choose one of {', '.join(NORMS)}")


def check_eps(eps: float) -> None:
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps={eps}: a perturbation budget is 0 or more, in pixels of [0, 1]; 8/255 is usual")
