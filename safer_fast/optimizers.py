"""Optimizers on a flat vector: clip, weight decay, momentum and step in one pass, nothing written if g is not finite.

Legend: P elements. State is a dict of tensors, so that a checkpoint is one too.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import ops

State = dict[str, Tensor]
Parts = Mapping[str, slice]  # layer: its part of the vector
IMPLS = ("fused", "torch", "apex")


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD's update; momentum 0.9 and weight decay 1e-4 are the protocol's (0.5 for Swin).

    impl: "fused" (ours: one kernel, no host read), "torch" (torch.optim) or "apex" (NVIDIA apex, where installed).
    The last two read the learning rate on the host, so a step with them is not captured.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    impl: str = "fused"
    name: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        _check_impl(self.impl)
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
        if self.impl != "fused":
            return _foreign_step(self._foreign, w_P, g_P, {"momentum_buffer": state["momentum"]}, lr, norm, clip, copy)
        ops.sgd_update(
            w_P, state["momentum"], copy, g_P, norm, lr, clip, self.momentum, self.weight_decay, self.nesterov
        )
        return None

    def _foreign(self, param: Tensor, lr: float) -> torch.optim.Optimizer:
        kind = torch.optim.SGD if self.impl == "torch" else _apex("FusedSGD")
        return kind([param], lr=lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov)


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW's update. impl: as for SGD."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    impl: str = "fused"
    name: ClassVar[str] = "adamw"

    def __post_init__(self) -> None:
        _check_impl(self.impl)
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
            if self.impl != "fused":
                self._foreign_update(w_P[part], g_P[part], state, i, part, lr, norm, clip, copy)
                continue
            ops.adamw_update(
                w_P[part], state["exp_avg"][part], state["exp_avg_sq"][part], None if copy is None else copy[part],
                g_P[part], norm, state["step"][i],
                lr, clip, self.beta1, self.beta2, self.eps, self.weight_decay,
            )  # fmt: skip

    def _foreign_update(
        self, w_P: Tensor, g_P: Tensor, state: State, i: int, part: slice, lr: Tensor, norm: Tensor, clip: float,
        copy: Tensor | None,
    ) -> None:  # fmt: skip
        # The step was counted up already; these optimizers count themselves.
        moments = {name: state[name][part] for name in ("exp_avg", "exp_avg_sq")} | {
            "step": (state["step"][i] - 1).clamp(min=0)
        }
        _foreign_step(self._foreign, w_P, g_P, moments, lr, norm, clip, None if copy is None else copy[part])

    def _foreign(self, param: Tensor, lr: float) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.impl == "torch" else _apex("FusedAdam")  # apex's default is AdamW
        return kind([param], lr=lr, betas=(self.beta1, self.beta2), eps=self.eps, weight_decay=self.weight_decay)


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


def _foreign_step(
    make: Callable[[Tensor, float], torch.optim.Optimizer], w_P: Tensor, g_P: Tensor, state: State, lr: Tensor,
    norm: Tensor, clip: float, copy: Tensor | None,
) -> None:  # fmt: skip
    """The same update by an optimizer of torch's interface, on our state; nothing is written if norm is not finite."""
    before = {name: t.clone() for name, t in {"w": w_P, **state}.items()}
    param = torch.nn.Parameter(w_P)  # shares its storage
    param.grad = g_P * (clip / (norm + 1e-6)).clamp(max=1) if clip else g_P
    optimizer = make(param, float(lr))
    optimizer.state[param].update(state)
    if "step" in state:
        optimizer.param_groups[0]["step"] = int(state["step"])  # where apex keeps it
    optimizer.step()
    after = optimizer.state[param]
    with torch.no_grad():
        for name, old in before.items():
            if name == "step":
                continue
            target = w_P if name == "w" else state[name]
            target.copy_(torch.where(torch.isfinite(norm), w_P if name == "w" else after[name], old))
        if copy is not None:
            copy.copy_(w_P)


def _apex(name: str) -> Any:
    try:
        return getattr(importlib.import_module("apex.optimizers"), name)
    except (ImportError, AttributeError):
        raise ValueError(
            f"impl=apex: apex.optimizers.{name} cannot be imported (the package of that name on PyPI is another one); "
            "install NVIDIA's apex from its source, or use impl=fused"
        ) from None


def _check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r}: choose one of {', '.join(IMPLS)}")
    if impl == "apex":
        _apex("FusedSGD")
