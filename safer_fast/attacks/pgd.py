"""Projected gradient descent (Madry et al. 2018) in L∞ and L2, on keyed draws.

Legend: B images; x [B, C, H, W] in [0, 1].
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..modes import eval_mode
from .objectives import OBJECTIVES, margin
from .threat import Threat, check_eps, check_norm, threat

# (x_adv, x, y, alpha, eps, reference) -> the next x_adv
Iterate = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]
STARTS = ("uniform", "gaussian", "none")
# Streams of the keyed generator: each restart has its own eight.
_UNIFORM, _RADIUS, _NORMAL_A, _NORMAL_B = range(4)
_STREAMS = 8
_INSIDE = 1 - 2.0**-20  # of the L2 radius: what is drawn stays inside the ball after rounding to float32


@dataclass(frozen=True)
class PGD:
    """Steepest ascent of an objective inside the threat model; algorithm and configuration at once.

    eps, alpha: budget and step in pixels of [0, 1]; alpha None means eps/4. norm: "Linf" or "L2".
    start: "uniform" (in the ball), "gaussian" (x + 0.001 N(0, 1), TRADES) or "none".
    objective: "ce", "margin" (CW), "kl" (TRADES). restarts: the worst of so many runs is kept, image by image.
    eps = 0 is legal and changes nothing. Raises ValueError for values out of range.
    """

    eps: float = 8 / 255
    alpha: float | None = None
    steps: int = 10
    norm: str = "Linf"
    restarts: int = 1
    start: str = "uniform"
    objective: str = "ce"

    def __post_init__(self) -> None:
        check_eps(self.eps)
        check_norm(self.norm)
        if self.alpha is not None and not 0 < self.alpha <= (2 * self.eps or math.inf):
            raise ValueError(
                f"alpha={self.alpha} at eps={self.eps}: a step is more than 0 and at most 2 eps; leave it out for eps/4"
            )
        if self.steps < 0 or self.restarts < 1:
            raise ValueError(f"steps={self.steps}, restarts={self.restarts}: give steps ≥ 0 and restarts ≥ 1")
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r}: choose one of {', '.join(STARTS)}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r}: choose one of {', '.join(OBJECTIVES)}")

    @property
    def step_size(self) -> float:
        """alpha, or eps/4."""
        return self.eps / 4 if self.alpha is None else self.alpha

    @property
    def threat(self) -> Threat:
        """What the attack may do."""
        return threat(self.norm, self.eps)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        ids: Tensor | None = None,
        *,
        seed: int | Tensor = 0,
        eps: float | Tensor | None = None,
        forward: Callable[[Tensor], Tensor] | None = None,
        iterate: Iterate | None = None,
    ) -> Tensor:
        """Adversarial images for x [B, C, H, W] in [0, 1] and labels y.

        ids: int64 [B], the draw of an image depends on (seed, id, restart) alone; default: its place in the batch.
        eps: another budget for this call (a number or 0-D tensor); the step scales with it.
        forward: another way to compute model(x); iterate: a faster way to do what `iterate` does with it.
        The model is in eval mode meanwhile; no parameter's .grad is touched. Returns a new tensor of x's dtype.
        """
        if self.eps == 0:
            return x.clone()
        x = x.detach()
        ids = torch.arange(len(x), device=x.device) if ids is None else ids
        seed = torch.as_tensor(seed, dtype=torch.int64, device=x.device)
        eps = torch.as_tensor(self.eps if eps is None else eps, dtype=x.dtype, device=x.device)
        forward = forward or model
        iterate = iterate or functools.partial(self.iterate, forward)
        with eval_mode(model):
            reference = self._reference(forward, x)
            x_adv = self._run(x, y, ids, seed, eps, reference, iterate, restart=0)
            for restart in range(1, self.restarts):
                other = self._run(x, y, ids, seed, eps, reference, iterate, restart=restart)
                x_adv = _worse(forward, x_adv, other, y)
        return x_adv

    def iterate(
        self, forward: Callable[[Tensor], Tensor], x_adv: Tensor, x: Tensor, y: Tensor, alpha: Tensor, eps: Tensor,
        reference: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """One iteration: the input gradient of the objective, nothing else differentiated, then step and projection."""
        with torch.enable_grad():
            z = x_adv.detach().requires_grad_()
            value = OBJECTIVES[self.objective](forward(z), y, reference).sum()
            (g,) = torch.autograd.grad(value, z)
        return self.move(x_adv, g, x, alpha, eps)

    def move(self, x_adv: Tensor, g: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> Tensor:
        """x_adv a step along g, projected; a new tensor. alpha, eps: 0-D tensors."""
        moved = x_adv.detach().clone()
        (ops.linf_step if self.norm == "Linf" else ops.l2_step)(moved, g, x, alpha, eps)
        return moved

    def _run(
        self, x: Tensor, y: Tensor, ids: Tensor, seed: Tensor, eps: Tensor, reference: Tensor | None,
        iterate: Iterate, *, restart: int,
    ) -> Tensor:  # fmt: skip
        alpha = eps * (self.step_size / self.eps)
        x_adv = self._start(x, ids, seed, eps, restart * _STREAMS)
        for _ in range(self.steps):
            x_adv = iterate(x_adv, x, y, alpha, eps, reference)
        return x_adv

    def _reference(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
        if self.objective != "kl":
            return None
        with torch.no_grad():
            return forward(x).log_softmax(1)

    def _start(self, x: Tensor, ids: Tensor, seed: Tensor, eps: Tensor, stream: int) -> Tensor:
        if self.start == "none":
            return x.clone()
        if self.start == "gaussian":
            noise = 0.001 * _normal(x, ids, seed, stream)
            if self.norm == "Linf":
                noise = noise.clamp(-eps, eps)
            else:
                length = noise.double().flatten(1).norm(dim=1)
                noise = noise * (_INSIDE * eps / length).clamp(max=1).to(x.dtype).view(-1, 1, 1, 1)
            return (x + noise).clamp_(0, 1)
        if self.norm == "Linf":
            return ops.uniform_start(x, ids, seed, eps, stream + _UNIFORM, 0.0, 1.0)
        return self._start_in_ball(x, ids, seed, eps, stream)

    def _start_in_ball(self, x: Tensor, ids: Tensor, seed: Tensor, eps: Tensor, stream: int) -> Tensor:
        """Uniform in the L2 ball: a normal direction, and a radius eps · u^(1/d)."""
        direction = _normal(x, ids, seed, stream).flatten(1)
        u = _uniform(x[:, :1, :1, :1], ids, seed, stream + _RADIUS).flatten(1)
        radius = _INSIDE * eps * u.double() ** (1 / direction.shape[1])
        delta = direction * (radius / direction.double().norm(dim=1, keepdim=True)).to(x.dtype)
        return (x + delta.view_as(x)).clamp_(0, 1)


def _uniform(like: Tensor, ids: Tensor, seed: Tensor, stream: int) -> Tensor:
    """u in [0, 1) of the shape of `like`."""
    one = torch.ones((), dtype=like.dtype, device=like.device)
    return (ops.uniform_start(torch.zeros_like(like), ids, seed, one, stream, -1.0, 1.0) + 1) / 2


def _normal(like: Tensor, ids: Tensor, seed: Tensor, stream: int) -> Tensor:
    """N(0, 1) by Box and Muller."""
    a = _uniform(like, ids, seed, stream + _NORMAL_A)
    b = _uniform(like, ids, seed, stream + _NORMAL_B)
    return (-2 * torch.log1p(-a)).sqrt() * torch.cos(2 * math.pi * b)


def _worse(forward: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """Image by image the one with the larger margin, misclassified first; soft labels count as their largest."""
    labels = y if y.ndim == 1 else y.argmax(1)
    with torch.no_grad():
        better = margin(forward(b), labels) > margin(forward(a), labels)
    return torch.where(better.view(-1, 1, 1, 1), b, a)
