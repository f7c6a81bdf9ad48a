"""Training losses. Each is called as loss(model, x_adv, x, y) and returns (loss, adversarial logits).

x, x_adv: [B, C, H, W] pixels in [0, 1]; y: [B] class indices, or [B, K] soft labels where stated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CrossEntropy:
    """Adversarial training (PGD-AT, Madry et al. 2018): CE(f(x'), y). Soft labels are understood."""

    label_smoothing: float = 0.0
    name: ClassVar[str] = "ce"

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing}: give a number in [0, 1); 0 turns it off")

    def __call__(self, model: Forward, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x_adv)
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing), logits


@dataclass(frozen=True)
class TRADES:
    """CE(f(x), y) + β KL(p(x) ‖ p(x')) (Zhang et al. 2019, eq. 5). Its attack maximises the same KL."""

    beta: float = 6.0
    name: ClassVar[str] = "trades"

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, model: Forward, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, adversarial = model(x), model(x_adv)
        kl = F.kl_div(adversarial.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)
        return F.cross_entropy(clean, y) + self.beta * kl, adversarial


@dataclass(frozen=True)
class MART:
    """BCE(f(x'), y) + β KL(p(x) ‖ p(x')) · (1 − p_y(x)) (Wang et al. 2020, eq. 11).

    BCE = −log p_y(x') − log(1 − max_{j≠y} p_j(x')). Its paper uses β = 5.
    """

    beta: float = 6.0
    name: ClassVar[str] = "mart"

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def __call__(self, model: Forward, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        clean, adversarial = model(x).log_softmax(1), model(x_adv)
        log_p = adversarial.log_softmax(1)
        wrong = log_p.scatter(1, y[:, None], -torch.inf).amax(1)
        # 1 - p_j without cancellation: log(1 - exp(a)) = log(-expm1(a)); the floor keeps the log finite at p_j = 1.
        bce = F.nll_loss(log_p, y) - torch.log((-torch.expm1(wrong)).clamp_min(1e-12)).mean()
        kl_B = F.kl_div(log_p, clean, reduction="none", log_target=True).sum(1)
        weight_B = 1 - clean.gather(1, y[:, None]).squeeze(1).exp()
        return bce + self.beta * (kl_B * weight_B).mean(), adversarial


Loss = CrossEntropy | TRADES | MART
LOSSES: dict[str, type[Loss]] = {kind.name: kind for kind in (CrossEntropy, TRADES, MART)}


def _check_beta(beta: float) -> None:
    if not beta >= 0:
        raise ValueError(f"beta={beta}: the weight of the KL term is 0 or more; the papers use 5 and 6")
