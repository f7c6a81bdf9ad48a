"""One SAFER step in eager PyTorch: the specification that every faster way must equal (METHOD, section 4).

    x'  = PGD(x; w)                             eval mode, input gradient only
    g   = ∇_{w_S} L(f(x'; w), y)                pass 1
    ε̂   = ρ g / (‖g‖ + 1e-12)
    g'  = ∇_{w_S} L(f(x'; w + ε̂), y)            pass 2: the same x', the same dropout draw
    w   ← w exactly as it was
    w   ← optimizer(w, clip(g'))

Legend: B images, P selected elements (flat, see store), w_S the selected parameters.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .attacks import PGD
from .layers import EVERYTHING, resolve_layers
from .losses import CrossEntropy, Loss
from .modes import eval_mode, only_grad
from .optimizers import SGD, Optimizer
from .profiling import phase
from .sam import SAM, moved
from .scaler import LossScaler
from .seeds import mix
from .store import Store

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MicroBatch(NamedTuple):
    """A part of the batch with its adversarial images and its share of the mean."""

    x_adv: Tensor
    x: Tensor
    y: Tensor
    share: float


class Step:
    """A training step as a callable: loss = step(images, labels).

    model: takes pixels in [0, 1]. layers: see `resolve_layers`. attack None trains on clean images.
    clip: largest gradient norm, 0 for none. accumulate: micro-batches a step. precision: "fp32", or autocast to
    "bf16" or "fp16" (with loss scaling). The selected parameters become views of one vector (`store`); everything
    else stays bit for bit as it is, modes and requires_grad flags included.
    After a call, `accuracy` is the share of x' classified rightly in pass 1, and `skipped` counts the steps so far
    that changed nothing because a gradient was not finite; both 0-D tensors.
    """

    mode, reason = "eager", "the specification"

    def __init__(
        self,
        model: nn.Module,
        layers: str | Iterable[str],
        *,
        attack: PGD | None = PGD(),
        sam: SAM = SAM(),
        optimizer: Optimizer = SGD(),
        loss: Loss = CrossEntropy(),
        clip: float = 1.0,
        accumulate: int = 1,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        if clip < 0 or accumulate < 1:
            raise ValueError(f"clip={clip}, accumulate={accumulate}: give clip ≥ 0 (0: none) and accumulate ≥ 1")
        if precision not in DTYPES:
            raise ValueError(f"precision={precision!r}: choose one of {', '.join(DTYPES)}")
        self.model, self.attack, self.sam, self.optimizer, self.loss = model, attack, sam, optimizer, loss
        self.compute: nn.Module
        self.params: list[nn.Parameter]
        self.forward: Callable[[Tensor], Tensor]
        self.copy_P: Tensor | None
        self.clip, self.accumulate, self.precision, self.seed = clip, accumulate, precision, seed
        self._use(layers)
        self.state = optimizer.init(self.store.w_P)
        self.device = self.store.w_P.device
        self.scaler = LossScaler(self.device) if precision == "fp16" else None
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.accuracy = torch.zeros((), device=self.device)
        # What a schedule changes lies on the device, so that nothing is compiled or captured anew for it.
        self._lr, self._rho, self._eps = map(self._scalar, (optimizer.lr, sam.radius, attack.eps if attack else 0.0))
        self._seed = torch.zeros((), dtype=torch.int64, device=self.device)
        self._count = 0

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        ids: Tensor | None = None,
        *,
        lr: float | None = None,
        eps: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """One step on images [B, C, H, W] in [0, 1] and labels; the loss of pass 1, a 0-D tensor.

        ids: int64 [B], seed: the attack's draw is keyed by both; by default each call draws afresh.
        lr, eps: the schedule's values for this step; eps 0 trains on clean images.
        """
        self._count += 1
        if lr is not None:
            self._lr.fill_(lr)
        if self.attack is not None:
            self._eps.fill_(self.attack.eps if eps is None else eps)
        self._seed.fill_(mix(self.seed, "step", self._count) if seed is None else seed)
        ids = torch.arange(len(images), device=self.device) if ids is None else ids
        attacked = self.attack is not None and eps != 0
        return self._run(images, labels, ids, attacked=attacked)

    def _run(self, images: Tensor, labels: Tensor, ids: Tensor, *, attacked: bool) -> Tensor:
        with phase("attack"):
            batch = self._craft(images, labels, ids, attacked=attacked)
        with eval_mode(self.compute, training=self._training), only_grad(self.compute, self.params):
            draw = self._dropout_draw()
            with phase("pass1"):
                loss, g_P = self._gradient(batch, measure=True)
            with phase("perturb"):
                norms = self.sam.perturb_(self._e_P, g_P, self.store.w_P, self.store.offsets_L1, self._rho)
            if self.sam.radius > 0:
                self._repeat_dropout(draw)
                with phase("pass2"), self._moved():
                    _, g_P = self._gradient(batch)
        with phase("update"):
            self._update(g_P, norms)
        return loss

    def select(self, layers: str | Iterable[str]) -> None:
        """Re-selection: other layers from now on; those chosen again keep their optimizer state."""
        layers = layers if isinstance(layers, str) else list(layers)
        resolve_layers(self.model, layers)  # raises for a wrong name while everything is as it was
        parts = self.store.parts
        self.store.release()
        self._use(layers)
        self.state = self.optimizer.carry(self.state, parts, self.store.w_P, self.store.parts)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything besides the model's own weights that the next step depends on."""
        state = {f"optimizer.{name}": t for name, t in self.state.items()}
        state |= {"skipped": self.skipped, "lr": self._lr, "count": torch.tensor(self._count)}
        if self.scaler:
            state |= {f"scaler.{name}": t for name, t in self.scaler.state.items()}
        return state

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state_tensors` gave, for the same selection."""
        self.state = {
            name.removeprefix("optimizer."): t.to(self.device if "bounds" not in name else "cpu", copy=True)
            for name, t in tensors.items()
            if name.startswith("optimizer.")
        }
        self.skipped.copy_(tensors["skipped"])
        self._lr.copy_(tensors["lr"])
        self._count = int(tensors["count"])
        if self.scaler:
            for name, t in self.scaler.state.items():
                t.copy_(tensors[f"scaler.{name}"])

    def _use(self, layers: str | Iterable[str]) -> None:
        resolved = resolve_layers(self.model, layers)
        self.store = Store(self.model, resolved)
        self._training = [""] if layers == EVERYTHING else list(resolved)
        self._e_P = torch.zeros_like(self.store.w_P)
        # The seams that engine fills: what computes, its parameters, and a copy of w in another dtype.
        self.compute, self.params, self.copy_P = self.model, self.store.params, None
        self.forward = self.compute

    def _craft(self, images: Tensor, labels: Tensor, ids: Tensor, *, attacked: bool) -> list[MicroBatch]:
        size = -(-len(images) // self.accumulate)
        parts = zip(images.split(size), labels.split(size), ids.split(size), strict=True)
        return [MicroBatch(self._attack(x, y, i) if attacked else x, x, y, len(x) / len(images)) for x, y, i in parts]

    def _attack(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        assert self.attack is not None
        with only_grad(self.compute, ()), self._autocast():
            return self.attack(self.compute, x, y, ids, seed=self._seed, eps=self._eps)

    def _gradient(self, batch: list[MicroBatch], *, measure: bool = False) -> tuple[Tensor, Tensor]:
        """The loss and its gradient [P], summed over the micro-batches, the gradient still scaled in fp16."""
        loss = torch.zeros((), dtype=self.store.w_P.dtype, device=self.device)
        g_P = torch.zeros_like(self.store.w_P)
        correct = torch.zeros((), device=self.device)
        for part in batch:
            with self._autocast():
                value, logits = self.loss(self.forward, part.x_adv, part.x, part.y)
            value = value * part.share
            scaled = value if self.scaler is None else value * self.scaler.scale
            g_P += self.store.flatten(torch.autograd.grad(scaled, self.params, allow_unused=True))
            loss += value.detach()
            correct += _hits(logits, part.y)
        if measure:
            self.accuracy = correct / sum(len(part.y) for part in batch)
        return loss, g_P

    def _update(self, g_P: Tensor, norms: Tensor) -> None:
        if self.scaler:
            g_P = g_P / self.scaler.scale
        # 0 · norms carries a non-finite pass 1 into the norm that the optimizer looks at; otherwise it adds nothing.
        norm = ops.global_norm(g_P) + 0 * norms.sum()
        finite = torch.isfinite(norm)
        self.skipped += ~finite
        self.optimizer.update_(
            self.store.w_P, g_P, self.state, lr=self._lr, norm=norm, clip=self.clip, copy=self.copy_P
        )
        if self.scaler:
            self.scaler.update(finite)

    def _moved(self) -> AbstractContextManager[None]:
        return moved(self.store.w_P, self._e_P)

    def _dropout_draw(self) -> Tensor | None:
        cuda = self.device.type == "cuda"
        return torch.cuda.get_rng_state(self.device) if cuda else torch.get_rng_state()

    def _repeat_dropout(self, draw: Tensor | None) -> None:
        if draw is None:
            return
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(draw, self.device)
        else:
            torch.set_rng_state(draw)

    def _autocast(self) -> AbstractContextManager[object]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.precision])

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=self.store.w_P.dtype, device=self.device)


def _hits(logits: Tensor, y: Tensor) -> Tensor:
    return (logits.detach().argmax(1) == (y if y.ndim == 1 else y.argmax(1))).sum()
