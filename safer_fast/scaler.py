"""Dynamic loss scaling for fp16, on the device: no value is ever read by the host.

The rule of torch.amp.GradScaler: halve after a non-finite gradient, double after 2,000 good steps in a row.
"""

import torch
from torch import Tensor

GROWTH_INTERVAL = 2000


class LossScaler:
    """`scale` multiplies the loss; `update` adapts it. bf16 and fp32 need none."""

    def __init__(self, device: torch.device, *, initial: float = 2.0**16, interval: int = GROWTH_INTERVAL) -> None:
        self.interval = interval
        self.state = {
            "scale": torch.tensor(initial, device=device),
            "good": torch.zeros((), dtype=torch.int32, device=device),
        }

    @property
    def scale(self) -> Tensor:
        """The factor in force, a 0-D tensor."""
        return self.state["scale"]

    def update(self, finite: Tensor) -> None:
        """finite: 0-D bool, whether this step's gradients were."""
        good = torch.where(finite, self.state["good"] + 1, 0)
        grow = good >= self.interval
        self.state["scale"].mul_(torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)).clamp_(max=2.0**127)
        self.state["good"].copy_(torch.where(grow, 0, good))
