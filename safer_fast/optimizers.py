"""Optimizers on a flat vector: clip, weight decay, momentum and step in one pass, nothing written if g is not finite.

Legend: P elements. State is a dict of tensors, so that a checkpoint is one too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import ops

State = dict[str, Tensor]
Parts = Mapping[str, slice]  # layer: its part of the vector


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD's update; momentum 0.9 and weight decay 1e-4 are the protocol's (0.5 for Swin)."""

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    name: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, momentum=self.momentum)

    def init(self, w_P: Tensor) -> State:
        """A fresh state."""
        return {"momentum": torch.zeros_like(w_P)}

    def carry(self, old: State, parts: Parts, w_P: Tensor, new_parts: Parts) -> State:
        """The state after a re-selection: layers chosen again keep theirs, the others start fresh."""
        return {"momentum": _carry(old["momentum"], parts, w_P, new_parts)}

    def update_(
        self,
        w_P: Tensor,
        g_P: Tensor,
        state: State,
        *,
        lr: Tensor,
        norm: Tensor,
        clip: float,
        copy: Tensor | None = None,
    ) -> None:
        """w ← w − lr · (momentum of clip(g) + weight decay · w). lr, norm (of g): 0-D tensors; clip 0: none.

        copy: a second tensor of another dtype that gets the new w.
        """
        ops.sgd_update(
            w_P, state["momentum"], copy, g_P, norm, lr, clip, self.momentum, self.weight_decay, self.nesterov
        )


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW's update."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    name: ClassVar[str] = "adamw"

    def __post_init__(self) -> None:
        _check(self.lr, self.weight_decay, beta1=self.beta1, beta2=self.beta2)
        if not self.eps > 0:
            raise ValueError(f"eps={self.eps}: AdamW's denominator offset is more than 0; 1e-8 is usual")

    def init(self, w_P: Tensor) -> State:
        """A fresh state. `step` counts the updates of each part, `bounds` says where the parts begin and end: one
        part at first, one a layer once a re-selection has mixed old and fresh ones."""
        state = {name: torch.zeros_like(w_P) for name in ("exp_avg", "exp_avg_sq")}
        return state | {"step": w_P.new_zeros(1), "bounds": torch.tensor([0, len(w_P)])}

    def carry(self, old: State, parts: Parts, w_P: Tensor, new_parts: Parts) -> State:
        """The state after a re-selection: layers chosen again keep theirs, the others start fresh."""
        state = {name: _carry(old[name], parts, w_P, new_parts) for name in ("exp_avg", "exp_avg_sq")}
        old_step = {layer: old["step"][int((old["bounds"] <= part.start).sum()) - 1] for layer, part in parts.items()}
        fresh = w_P.new_zeros(())
        step = torch.stack([old_step.get(layer, fresh) for layer in new_parts])
        bounds = torch.tensor([0, *(part.stop for part in new_parts.values())])
        return state | {"step": step, "bounds": bounds}

    def update_(
        self,
        w_P: Tensor,
        g_P: Tensor,
        state: State,
        *,
        lr: Tensor,
        norm: Tensor,
        clip: float,
        copy: Tensor | None = None,
    ) -> None:
        """One AdamW update; arguments as in `SGD.update_`."""
        state["step"].add_(torch.isfinite(norm))
        bounds = state["bounds"].tolist()  # lies on the CPU: no synchronisation
        for i, part in enumerate(map(slice, bounds, bounds[1:])):
            ops.adamw_update(
                w_P[part], state["exp_avg"][part], state["exp_avg_sq"][part], None if copy is None else copy[part],
                g_P[part], norm, state["step"][i],
                lr, clip, self.beta1, self.beta2, self.eps, self.weight_decay,
            )  # fmt: skip


Optimizer = SGD | AdamW
OPTIMIZERS: dict[str, type[Optimizer]] = {kind.name: kind for kind in (SGD, AdamW)}


def _carry(old_P: Tensor, parts: Parts, w_P: Tensor, new_parts: Parts) -> Tensor:
    new_P = torch.zeros_like(w_P)
    for layer, part in new_parts.items():
        if layer in parts:
            new_P[part] = old_P[parts[layer]]
    return new_P


def _check(lr: float, weight_decay: float, **factors: float) -> None:
    if not lr > 0:
        raise ValueError(f"lr={lr}: a learning rate is more than 0")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay}: it is 0 or more; 0 turns it off")
    for name, value in factors.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: it lies in [0, 1)")
