"""Adversarial sharpness of every layer: how much the adversarial loss rises when that layer alone moves by rho.

S_i = max_{‖ε_i‖₂ ≤ ρ} L(f(x'; w + ε_i), y) − L(f(x'; w), y)          METHOD, section 2
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attacks import PGD
from .layers import Layers, candidate_layers
from .models import Segment, segment_of, segments
from .modes import eval_mode, only_grad
from .progress import Advance

MEASURES = ("step", "grad", "ascent")
SCALES = ("none", "relative")


@dataclass(frozen=True)
class Sharpness:
    """How sharpness is measured.

    measure: "step" (the loss at ε̂ = ρ g/‖g‖, default), "grad" (ρ‖g‖, first order) or "ascent" (`steps` projected
    ascent steps of size 2ρ/steps: the closest to the maximum). scale: "none", or "relative": radius ρ‖w_i‖.
    examples, batch: training images used, and how many at once; the score is the mean over batches.
    """

    measure: str = "step"
    rho: float = 0.05
    scale: str = "none"
    steps: int = 5
    examples: int = 1024
    batch: int = 128

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure={self.measure!r}: choose one of {', '.join(MEASURES)}")
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale!r}: choose one of {', '.join(SCALES)}")
        if not 0 < self.rho < float("inf"):
            raise ValueError(f"sharpness rho={self.rho}: the radius is more than 0; 0.05 is the default")
        if min(self.steps, self.examples, self.batch) < 1:
            raise ValueError(f"steps={self.steps}, examples={self.examples}, batch={self.batch}: each is 1 or more")


@dataclass(frozen=True)
class Scores(Mapping[str, float]):
    """Sharpness of each layer, in model order: a mapping {layer: score}, with its spread over batches."""

    names: tuple[str, ...]
    per_batch: Tensor  # [batches, layers], float64
    how: Sharpness

    def __getitem__(self, layer: str) -> float:
        return float(self.per_batch[:, self.names.index(layer)].mean())

    def __iter__(self) -> Any:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def score(self) -> Tensor:
        """[layers]: the mean over batches."""
        return self.per_batch.mean(0)

    @property
    def std(self) -> Tensor:
        """[layers]: the standard deviation over batches; 0 for a single batch."""
        return self.per_batch.std(0) if len(self.per_batch) > 1 else torch.zeros(len(self.names))

    @property
    def stability(self) -> float:
        """The mean Spearman correlation of the rankings of two batches: 1 where all agree; 1 for a single batch."""
        ranks = self.per_batch.argsort(1).argsort(1).double()
        n = len(ranks)
        if n < 2 or len(self.names) < 2:
            return 1.0
        return float((torch.corrcoef(ranks).sum() - n) / (n * (n - 1)))

    def ranking(self) -> list[str]:
        """Layers from the sharpest on; ties in model order."""
        return [self.names[i] for i in torch.argsort(self.score, descending=True, stable=True)]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = zip(self.names, self.score.tolist(), self.std.tolist(), strict=True)
        layers = {name: {"score": score, "std": std} for name, score, std in rows}
        return {"measure": self.how.measure, "rho": self.how.rho, "scale": self.how.scale,
                "stability": self.stability, "layers": layers}  # fmt: skip


class _Point(NamedTuple):
    """The batch at the current weights: inputs of every segment, the loss there."""

    pieces: list[Segment]
    inputs: list[Tensor]
    y: Tensor
    loss: Tensor


def layer_sharpness(
    model: nn.Module,
    loader: Iterable[Sequence[Tensor]],
    *,
    attack: PGD | None = PGD(),
    how: Sharpness | None = None,
    rho: float | None = None,
    layers: Layers | None = None,
    seed: int = 0,
    advance: Advance | None = None,
) -> Scores:
    """The sharpness of each layer on the batches (x, y) or (x, y, ids) of `loader`.

    x [B, C, H, W] in [0, 1]; attack None measures the clean loss. how: a `Sharpness`; rho overrides its radius.
    layers: {name: parameter names}, default all Linear and Conv2d. The model ends bit for bit as it was.
    advance: called with the number of images of each batch done.
    Raises ValueError when the loader is empty, ArithmeticError when a score is not finite.
    """
    how = how or Sharpness()
    if rho is not None:
        how = Sharpness(how.measure, rho, how.scale, how.steps, how.examples, how.batch)
    layers = candidate_layers(model) if layers is None else layers
    rows, seen = [], 0
    for x, y, *rest in loader:
        ids = rest[0] if rest else torch.arange(seen, seen + len(x), device=x.device)
        seen += len(x)
        with eval_mode(model):
            x_adv = x if attack is None else attack(model, x, y, ids, seed=seed)
            rows.append(_batch_scores(model, layers, x_adv, y, how))
        if advance:
            advance(len(x))
    if not rows:
        raise ValueError("no batches to measure sharpness on: the loader is empty")
    scores = torch.stack(rows).cpu()
    wrong = [name for name, column in zip(layers, scores.T, strict=True) if not bool(torch.isfinite(column).all())]
    if wrong:
        raise ArithmeticError(
            f"the loss is not finite when {', '.join(wrong[:3])} moves: the weights have diverged; lower the learning "
            "rate, or go on from an earlier checkpoint"
        )
    return Scores(tuple(layers), scores, how)


def _batch_scores(model: nn.Module, layers: Layers, x_adv: Tensor, y: Tensor, how: Sharpness) -> Tensor:
    gradients = _gradients(model, layers, x_adv, y)
    point = _point(model, x_adv, y)
    scores = []
    for layer, g in gradients.items():
        params = [model.get_parameter(name) for name in layers[layer]]
        radius = how.rho * (_norm(params) if how.scale == "relative" else 1.0)
        scores.append(_rise(model, layer, params, g, radius, point, how))
    return torch.stack([torch.as_tensor(s, dtype=torch.float64, device=x_adv.device) for s in scores])


def _rise(
    model: nn.Module, layer: str, params: list[nn.Parameter], g: list[Tensor], radius: Tensor | float,
    point: _Point, how: Sharpness,
) -> Tensor:  # fmt: skip
    if how.measure == "grad":
        return radius * _norm(g)
    near = how.measure == "step"
    moves = _scaled(g, radius) if near else _ascend(model, layer, params, g, radius, point, how.steps)
    with torch.no_grad(), _moved(params, moves):
        return _loss_from(layer, point) - point.loss


def _ascend(
    model: nn.Module, layer: str, params: list[nn.Parameter], g: list[Tensor], radius: Tensor | float,
    point: _Point, steps: int,
) -> list[Tensor]:  # fmt: skip
    """Projected ascent on ε from 0; the first gradient is at hand."""
    moves = _projected(_scaled(g, radius * 2 / steps), radius)
    for _ in range(steps - 1):
        with only_grad(model, params), torch.enable_grad(), _moved(params, moves):
            g = list(torch.autograd.grad(_loss_from(layer, point), params))
        step = _scaled(g, radius * 2 / steps)
        moves = _projected([m + s for m, s in zip(moves, step, strict=True)], radius)
    return moves


def _point(model: nn.Module, x_adv: Tensor, y: Tensor) -> _Point:
    pieces, inputs = segments(model), [x_adv]
    with torch.no_grad():
        for piece in pieces:
            inputs.append(piece.forward(inputs[-1]))
        loss = F.cross_entropy(inputs.pop(), y)
    return _Point(pieces, inputs, y, loss)


def _gradients(model: nn.Module, layers: Layers, x_adv: Tensor, y: Tensor) -> dict[str, list[Tensor]]:
    names = [name for names in layers.values() for name in names]
    params = [model.get_parameter(name) for name in names]
    with only_grad(model, params), torch.enable_grad():
        gradients = torch.autograd.grad(F.cross_entropy(model(x_adv), y), params, allow_unused=True)
    by_name = {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, params, gradients, strict=True)}
    return {layer: [by_name[name] for name in own] for layer, own in layers.items()}


def _loss_from(layer: str, point: _Point) -> Tensor:
    """The loss, computed again from the segment of this layer on: what comes before does not change."""
    first = segment_of(point.pieces, layer)
    h = point.inputs[first]
    for piece in point.pieces[first:]:
        h = piece.forward(h)
    return F.cross_entropy(h, point.y)


@contextmanager
def _moved(params: list[nn.Parameter], moves: list[Tensor]) -> Iterator[None]:
    """w + ε inside, the same bits as before afterwards."""
    before = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, move in zip(params, moves, strict=True):
                p.add_(move)
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(params, before, strict=True):
                p.copy_(old)


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.detach()) for t in tensors]))


def _scaled(tensors: list[Tensor], length: Tensor | float) -> list[Tensor]:
    factor = length / (_norm(tensors) + 1e-12)
    return [t * factor for t in tensors]


def _projected(tensors: list[Tensor], radius: Tensor | float) -> list[Tensor]:
    factor = (radius / (_norm(tensors) + 1e-12)).clamp(max=1)
    return [t * factor for t in tensors]
