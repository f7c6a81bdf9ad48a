"""Sharpness-aware minimisation (Foret et al. 2021) on a flat vector of selected parameters.

Legend: P selected elements, L layers. METHOD: ε̂ = ρ g / (‖g‖ + 1e-12), gradient there, w back bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops


@dataclass(frozen=True)
class SAM:
    """The radius of the perturbation and how it is measured.

    rho: radius; None means 0.05, or 0.5 if adaptive. 0 turns SAM off: the step is then plain adversarial training.
    per_layer: each layer moves by rho along its own normalised gradient, instead of one norm over all of them.
    adaptive: ASAM (Kwon et al. 2021): ε̂ = ρ T²g/‖Tg‖ with T = |w| + eta.
    """

    rho: float | None = None
    per_layer: bool = False
    adaptive: bool = False
    eta: float = 0.01

    def __post_init__(self) -> None:
        if self.rho is not None and not 0 <= self.rho < float("inf"):
            raise ValueError(f"rho={self.rho}: a perturbation radius is 0 or more; 0 turns SAM off")
        if self.eta < 0:
            raise ValueError(f"eta={self.eta}: ASAM's offset is 0 or more; its paper uses 0.01")

    @property
    def radius(self) -> float:
        """rho, or its default."""
        return self.rho if self.rho is not None else (0.5 if self.adaptive else 0.05)

    def norms(self, g_P: Tensor, w_P: Tensor, offsets: Tensor) -> Tensor:
        """[L] or [1]: the norms that the perturbation divides by."""
        scaled = g_P * (w_P.abs() + self.eta) if self.adaptive else g_P
        return ops.layer_norms(scaled, self.bounds(offsets))

    def perturb_(self, e_P: Tensor, g_P: Tensor, w_P: Tensor, offsets: Tensor, rho: Tensor) -> Tensor:
        """Writes ε̂ into e_P (0 where a norm is not finite) and returns the norms. rho: 0-D tensor."""
        norms = self.norms(g_P, w_P, offsets)
        ops.sam_perturb(e_P, g_P, w_P, norms, self.bounds(offsets), rho, self.adaptive, self.eta)
        return norms

    def bounds(self, offsets: Tensor) -> Tensor:
        """The segments that share a norm: the layers [L+1], or the whole vector [2]."""
        return offsets if self.per_layer else offsets[:: len(offsets) - 1]


@contextmanager
def moved(w_P: Tensor, e_P: Tensor) -> Iterator[None]:
    """w + ε̂ inside, w again afterwards: a copy is put back, since (w + ε) − ε is not w in floating point."""
    before = w_P.clone()
    try:
        w_P.add_(e_P)
        yield
    finally:
        with torch.no_grad():
            w_P.copy_(before)
