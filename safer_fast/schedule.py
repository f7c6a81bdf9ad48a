"""Learning-rate and eps schedules, as functions of progress: the fraction in [0, 1] of a stage that is done."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The factor on the learning rate.

    kind: "step" multiplies by gamma at each milestone (fractions of the stage; 7/8 and 19/20 are epochs 35 and 38 of
    40, the protocol of Mo et al., NeurIPS 2022), "cosine" falls to 0, "constant" stays 1.
    warmup: fraction of the stage over which the rate rises linearly from 0.
    """

    kind: str = "step"
    milestones: tuple[float, ...] = (7 / 8, 19 / 20)
    gamma: float = 0.1
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("step", "cosine", "constant"):
            raise ValueError(f"schedule kind {self.kind!r}: choose one of step, cosine, constant")
        if any(not 0 < m <= 1 for m in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={self.milestones}: give rising fractions of the stage in (0, 1]")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: the factor at a milestone lies in (0, 1]")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"schedule warmup={self.warmup}: give a fraction of the stage in [0, 1); 0 turns it off")

    def factor(self, progress: float) -> float:
        """The factor at this progress, 0 at the start of a stage and 1 at its end."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        passed = sum(progress >= m for m in self.milestones) if self.kind == "step" else 0
        return self.gamma**passed


def eps_factor(epoch: float, warmup_epochs: float) -> float:
    """The share of eps in force at a (fractional) epoch: 0 for two thirds of the warm-up, then rising to 1 linearly.

    Adversarial training from random or freshly resampled weights collapses to one class; hence the clean start.
    """
    if epoch >= warmup_epochs:
        return 1.0
    return max(0.0, 3 * epoch / warmup_epochs - 2)
