"""What an attack maximises, an image at a time: objective(logits [B, K], y, reference) -> [B].

y: class indices [B], or soft labels [B, K] for cross-entropy. reference: log-probabilities on the clean images
[B, K], for "kl" alone.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def cross_entropy(logits: Tensor, y: Tensor, reference: Tensor | None = None) -> Tensor:
    """−log p_y (Madry et al. 2018)."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Tensor, y: Tensor, reference: Tensor | None = None) -> Tensor:
    """max_{j≠y} z_j − z_y (Carlini and Wagner 2017): positive exactly where the image is misclassified."""
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return others - logits.gather(1, y[:, None]).squeeze(1)


def kl(logits: Tensor, y: Tensor, reference: Tensor | None = None) -> Tensor:
    """KL(p(x) ‖ p(x')) (TRADES, Zhang et al. 2019)."""
    assert reference is not None
    return F.kl_div(logits.log_softmax(1), reference, reduction="none", log_target=True).sum(1)


OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin, "kl": kl}
