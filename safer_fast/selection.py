"""Which layers are trained: the sharpest ones, or the controls that reviewers ask for."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .layers import EVERYTHING, Layers, candidate_layers

RULES = ("top", "bottom", "random", "last", "all", EVERYTHING)
SHARE = 0.05  # of the layers, where k is not given


@dataclass(frozen=True)
class Selection:
    """How layers are chosen, and how often.

    by: "top" (the sharpest), "bottom", "random" (seeded), "last" (in model order), "all" candidates, or "everything":
    every parameter, norms, tokens and positions too. k: how many; None means max(1, round(5 % of the candidates)).
    layers: an explicit list; `by` and `k` are then not used. every: epochs between re-selections, 0 for never.
    granularity, include, exclude: the candidates, see `candidate_layers`.
    """

    by: str = "top"
    k: int | None = None
    layers: tuple[str, ...] = ()
    every: int = 10
    granularity: str = "layer"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check_rule(self.by)
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k}: select at least one layer, or leave k out for 5 % of them")
        if self.every < 0:
            raise ValueError(f"every={self.every}: epochs between re-selections are 0 (never) or more")

    @property
    def needs_scores(self) -> bool:
        """Whether sharpness has to be measured for it."""
        return not self.layers and self.by in ("top", "bottom")

    def candidates(self, model: nn.Module) -> Layers:
        """The layers to choose from."""
        return candidate_layers(model, granularity=self.granularity, include=self.include, exclude=self.exclude)

    def choose(self, scores: Mapping[str, float] | Sequence[str]) -> list[str] | str:
        """The chosen layers, in model order, or "everything"."""
        if self.layers:
            return list(self.layers)
        if self.by == EVERYTHING:
            return EVERYTHING
        return select_layers(scores, k=self.k, by=self.by, seed=self.seed)


def select_layers(
    scores: Mapping[str, float] | Sequence[str], *, k: int | None = None, by: str = "top", seed: int = 0
) -> list[str]:
    """k layers out of {layer: score} (or out of plain names for "random", "last", "all"), in model order.

    Ties go to the layer that comes first in the model. Raises ValueError for k out of range or an unknown rule.
    """
    _check_rule(by)
    names = list(scores)
    k = max(1, round(SHARE * len(names))) if k is None else k
    if not 1 <= k <= len(names):
        raise ValueError(f"k={k}: this model has {len(names)} layers to choose from; give 1 to {len(names)}")
    if by == "all":
        return names
    if by == "last":
        return names[-k:]
    if by == "random":
        chosen = set(random.Random(seed).sample(names, k))
        return [name for name in names if name in chosen]
    if not isinstance(scores, Mapping):
        raise ValueError(f"by={by!r} needs a score for each layer: give the result of layer_sharpness")
    sign = -1 if by == "top" else 1
    order = sorted(range(len(names)), key=lambda i: (sign * scores[names[i]], i))
    return [names[i] for i in sorted(order[:k])]


def _check_rule(by: str) -> None:
    if by not in RULES:
        raise ValueError(f"select by {by!r}: choose one of {', '.join(RULES)}, or list the layers")
