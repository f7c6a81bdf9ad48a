"""Counted work of a SAFER step, so that a measured time can be stated as a share of what the hardware allows."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from safer_fast.models import segment_of, segments


class Cost(NamedTuple):
    """Floating-point operations of one step (a multiply-add counts two)."""

    flops: int
    attack: int
    passes: int


def forward_flops(model: nn.Module, batch: int, img_size: int) -> int:
    """FLOPs of a forward pass: GEMMs, convolutions and attention, counted by torch on meta tensors."""
    counter = FlopCounterMode(display=False)
    x = torch.zeros(batch, 3, img_size, img_size, device=next(model.parameters()).device)
    with counter, torch.no_grad():
        model.eval()(x)
    return int(counter.get_total_flops())


def step_cost(model: nn.Module, batch: int, img_size: int, layers: Sequence[str], *, attack_steps: int) -> Cost:
    """PGD (a forward and an input-gradient pass an iteration, each as dear as a forward) and SAM's two passes: a
    forward shared up to the first selected segment, then forward and backward twice. Weight gradients of a few layers
    are left out: at most some percent of the passes."""
    forward = forward_flops(model, batch, img_size)
    pieces = segments(model)
    first = min(segment_of(pieces, name) for name in layers) / len(pieces)
    attack = attack_steps * 2 * forward
    passes = round(forward * (first + 4 * (1 - first)))
    return Cost(attack + passes, attack, passes)
