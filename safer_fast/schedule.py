"""Learning-rate and eps schedules, as functions of progress: the fraction in [0, 1] of a stage that is done."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The factor on the learning rate.

    kind: "step" multiplies by gamma at each milestone (fractions of the stage; 7/8 and 19/20 are epochs 35 and 38 of
    40, the protocol of Mo et al., NeurIPS 2022), "cosine" falls to 0, "constant" stays 1.
    warmup_steps: steps over which the rate rises linearly once adversarial training begins, after a clean start too:
    at the full rate a clean model collapses to one class when eps rises. A robust start (stage 2) needs none.
    """

    kind: str = "step"
    milestones: tuple[float, ...] = (7 / 8, 19 / 20)
    gamma: float = 0.1
    warmup_steps: int = 300

    def __post_init__(self) -> None:
        if self.kind not in ("step", "cosine", "constant"):
            raise ValueError(f"schedule kind {self.kind!r}: choose one of step, cosine, constant")
        if any(not 0 < m <= 1 for m in self.milestones) or list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={self.milestones}: give rising fractions of the stage in (0, 1]")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: the factor at a milestone lies in (0, 1]")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps}: it is 0 (none) or more; 300 is the default")

    def factor(self, progress: float) -> float:
        """The factor at this progress, 0 at the start of a stage and 1 at its end; the rise is apart (`rise`)."""
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        passed = sum(progress >= m for m in self.milestones) if self.kind == "step" else 0
        return self.gamma**passed

    def rise(self, step: int) -> float:
        """The factor at the step-th adversarial step of stage 1, counted from 0; 1 for the clean ones before it."""
        return min(1.0, (step + 1) / self.warmup_steps) if step >= 0 and self.warmup_steps else 1.0


def clean_epochs(warmup_epochs: float) -> float:
    """The part of the warm-up without an attack."""
    return warmup_epochs * 2 / 3


def eps_factor(epoch: float, warmup_epochs: float) -> float:
    """The share of eps in force at a (fractional) epoch: 0 for two thirds of the warm-up, then rising to 1 linearly.

    Adversarial training from random or freshly resampled weights collapses to one class; hence the clean start.
    """
    if epoch >= warmup_epochs:
        return 1.0
    clean = clean_epochs(warmup_epochs)
    return max(0.0, (epoch - clean) / (warmup_epochs - clean))
