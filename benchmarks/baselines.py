"""The step as users write it, in plain PyTorch: what safer_fast is measured against. None is crippled.

plain    eager; bf16 autocast on a GPU, fp32 on a CPU; PGD by loss.backward(); a two-step SAM optimizer; frozen layers
         have requires_grad=False
full     the same with every layer trained: PGD-AT (SAM), what the paper's baseline costs
strong   what a good engineer makes of plain within an hour: input gradient only, torch.compile, fused optimizer

Nothing here uses safer_fast. Images [B, C, H, W] in [0, 1]; the model normalises inside.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TwoStepSAM:
    """Sharpness-aware minimisation around an optimizer: climb to w + e, come back, step (Foret et al. 2021)."""

    def __init__(self, params: Iterable[nn.Parameter], rho: float, *, lr: float, momentum: float, fused: bool) -> None:
        self.params, self.rho = list(params), rho
        self.inner = torch.optim.SGD(self.params, lr=lr, momentum=momentum, weight_decay=1e-4, fused=fused)

    @torch.no_grad()
    def climb(self) -> None:
        """To w + rho g/‖g‖."""
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        scale = self.rho / (norm + 1e-12)
        self.before = [p.clone() for p in self.params]
        for p in self.params:
            if p.grad is not None:
                p.add_(p.grad * scale)
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        """Back to w, then the optimizer's step with the clipped gradient."""
        for p, old in zip(self.params, self.before, strict=True):
            p.copy_(old)
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.inner.step()
        self.inner.zero_grad()


class PlainStep:
    """PGD adversarial training with SAM, eager."""

    def __init__(
        self, model: nn.Module, layers: Iterable[str] | None, *, eps: float, alpha: float, steps: int, rho: float,
        lr: float, momentum: float = 0.9,
    ) -> None:  # fmt: skip
        self.model, self.eps, self.alpha, self.steps = model, eps, alpha, steps
        model.requires_grad_(layers is None)
        for name in layers or ():
            model.get_submodule(name).requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = TwoStepSAM(trained, rho, lr=lr, momentum=momentum, fused=self.fused)
        self.device = next(model.parameters()).device

    fused = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits under the precision that a user would take."""
        with self.precision():
            return self.model(x)

    def precision(self) -> AbstractContextManager[object]:
        """bf16 autocast on a GPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()

    def attack(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """PGD, the image's gradient by loss.backward()."""
        self.model.eval()
        x_adv = (x + noise).clamp(0, 1)
        for _ in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            F.cross_entropy(self.forward(x_adv), y).backward()
            with torch.no_grad():
                assert x_adv.grad is not None
                x_adv = x_adv + self.alpha * x_adv.grad.sign()
                x_adv = torch.min(torch.max(x_adv, x - self.eps), x + self.eps).clamp(0, 1)
        self.optimizer.inner.zero_grad()
        return x_adv.detach()

    def __call__(self, x: Tensor, y: Tensor, noise: Tensor | None = None) -> Tensor:
        """One step; noise: the attack's start, drawn here unless given."""
        noise = torch.empty_like(x).uniform_(-self.eps, self.eps) if noise is None else noise
        x_adv = self.attack(x, y, noise)
        loss = F.cross_entropy(self.forward(x_adv), y)
        loss.backward()
        self.optimizer.climb()
        F.cross_entropy(self.forward(x_adv), y).backward()
        self.optimizer.step()
        return loss.detach()


class StrongStep(PlainStep):
    """Compiled model, input gradient only, fused optimizer. mode: torch.compile's."""

    fused = True

    def __init__(
        self, model: nn.Module, layers: Iterable[str] | None, *, mode: str = "default", **options: float
    ) -> None:
        super().__init__(model, layers, **options)  # type: ignore[arg-type]
        self.trained = self.optimizer.params
        self.compiled = torch.compile(model, mode=mode, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the compiled model."""
        with self.precision():
            return self.compiled(x)

    def attack(self, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """PGD by autograd.grad with all weights frozen, since a compiled model computes their gradients otherwise."""
        self.model.eval()
        for p in self.trained:
            p.requires_grad_(False)
        x_adv = (x + noise).clamp(0, 1)
        for _ in range(self.steps):
            torch.compiler.cudagraph_mark_step_begin()
            x_adv = x_adv.detach().requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(self.forward(x_adv), y), x_adv)
            with torch.no_grad():
                x_adv = x_adv + self.alpha * g.sign()
                x_adv = torch.min(torch.max(x_adv, x - self.eps), x + self.eps).clamp(0, 1)
        for p in self.trained:
            p.requires_grad_(True)
        return x_adv.detach()
