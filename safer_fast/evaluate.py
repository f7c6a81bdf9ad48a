"""Clean and robust accuracy: numbers that do not depend on batch size, order, or what ran before.

Legend: N images. The model always sees chunks of CHUNK images, the last one filled up: the rounding of a matrix
product depends on its shape, and a robust accuracy must not.
"""

import hashlib
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .attacks import PGD, Threat
from .attacks.threat import TOLERANCE
from .engine import fast_linear
from .modes import eval_mode
from .progress import track

CHUNK = 64
_NAMED = re.compile(r"(pgd|cw)-(\d+)$")


@dataclass(frozen=True)
class Report:
    """What was measured, on what, and how sure it is. Accuracies are fractions of n; robust is the worst case over
    all attacks, image by image; interval is Wilson's, 95 %.

    verdict: "invalid" where logits were not finite (they count as wrong), else "unchecked": tests for gradient
    masking are not part of this version.
    """

    clean: float
    robust: float
    by_attack: dict[str, float]
    n: int
    interval: tuple[float, float]
    invalid: int
    verdict: str
    checks: dict[str, Any]
    attack: str
    eps: float
    norm: str
    seed: int
    precision: str
    ids_sha256: str
    seconds: float = field(compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self.__dict__, "interval": list(self.interval)}


def attack_named(name: str, at: Threat) -> PGD | None:
    """ "clean" (None), "pgd-<steps>" (cross-entropy) or "cw-<steps>" (margin), alpha eps/4, in a threat model.

    Raises ValueError for another name.
    """
    if name == "clean":
        return None
    found = _NAMED.match(name)
    if not found:
        raise ValueError(f"no attack {name!r}: choose clean, pgd-<steps> or cw-<steps>, pgd-20 for example")
    objective = "ce" if found[1] == "pgd" else "margin"
    return PGD(eps=at.eps, norm=at.norm, steps=int(found[2]), objective=objective)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    threat: Threat,
    attacks: str | PGD | Sequence[str | PGD] = "pgd-20",
    ids: Tensor | None = None,
    batch_size: int = 512,
    seed: int = 0,
    label: str = "evaluate",
    save: Callable[[Tensor, Tensor], None] | None = None,
) -> Report:
    """Accuracy of a model on images [N, C, H, W] float in [0, 1] with labels int64 [N], clean and under attack.

    attacks: names (see `attack_named`, comma-separated works) or PGD objects; each attacks what the former left.
    ids: int64 [N], the draws' keys (default: places in the list). batch_size: images queued at a time; it changes
    memory, not results. save: called with (ids, adversarial images) of each queue.
    The model may lie on any device; images are moved there. Raises ValueError for pixels, labels or shapes that
    make no sense, one sentence each.
    """
    device = _device_of(model)
    ids = torch.arange(len(images)) if ids is None else ids
    _check(images, labels, ids, batch_size)
    chosen = _attacks(attacks, threat)
    start = time.perf_counter()
    left, tallies, invalid = [], dict.fromkeys(chosen, 0), 0
    with eval_mode(model), fast_linear(device), track(label, len(images)) as advance:
        for rows in torch.arange(len(images)).split(batch_size):
            x, y, i = (t[rows].to(device) for t in (images, labels, ids))
            queue = _Queue(model, x, y, i, seed, threat)
            right = queue.clean()
            left.append(right.clone())
            for name, attack in chosen.items():
                right = queue.survive(attack, right, name)
                tallies[name] += int(right.sum())  # synchronises, once a queue and attack
            invalid += queue.invalid
            if save:
                save(i, queue.x_adv)
            advance(len(rows))
    n, robust = len(images), list(tallies.values())[-1]
    return Report(
        clean=int(torch.cat(left).sum()) / n, robust=robust / n, by_attack={k: v / n for k, v in tallies.items()},
        n=n, interval=wilson(robust, n), invalid=invalid, verdict="invalid" if invalid else "unchecked",
        checks={"finite_logits": invalid == 0}, attack=",".join(chosen), eps=threat.eps, norm=threat.norm, seed=seed,
        precision=_precision(device), ids_sha256=hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest(),
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def wilson(hits: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval for a proportion, 95 % by default (Wilson 1927)."""
    p = hits / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


class _Queue:
    """Some images on the device, attacked in chunks of one shape; remembers the worst image found for each."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, ids: Tensor, seed: int, at: Threat) -> None:
        self.model, self.x, self.y, self.ids, self.seed, self.at = model, x, y, ids, seed, at
        self.x_adv = x.clone()
        self.bad = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    @property
    def invalid(self) -> int:
        """Images for which some logits were not finite, clean or attacked."""
        return int(self.bad.sum())

    def clean(self) -> Tensor:
        """[B] bool: classified rightly, with finite logits."""
        return self._right(torch.arange(len(self.x), device=self.x.device), self.x)

    def survive(self, attack: PGD | None, right: Tensor, name: str) -> Tensor:
        """[B] bool: still right after this attack, which sees only the images that were."""
        if attack is None:
            return right
        right = right.clone()
        for rows in right.nonzero().squeeze(1).split(CHUNK):
            if not len(rows):  # split() of nothing is one empty chunk
                break
            full = _filled(rows)
            x = self.x[full]
            x_adv = attack(self.model, x, self.y[full], self.ids[full], seed=self.seed)[: len(rows)]
            excess = self.at.excess(x_adv, x[: len(rows)])
            if excess > TOLERANCE:
                raise AssertionError(f"{name} left the threat model by {excess:.2e}: this is a bug of the attack")
            ok = self._right(rows, x_adv)
            self.x_adv[rows[~ok]] = x_adv[~ok]
            right[rows] = ok
        return right

    def _right(self, rows: Tensor, x: Tensor) -> Tensor:
        results = []
        for part, images in zip(rows.split(CHUNK), x.split(CHUNK), strict=True):
            with torch.no_grad():
                logits = self.model(images[_filled(torch.arange(len(part), device=part.device))])[: len(part)]
            _check_logits(logits, self.y)
            finite = torch.isfinite(logits).all(1)
            self.bad[part] |= ~finite
            results.append(finite & (logits.argmax(1) == self.y[part]))
        return torch.cat(results) if results else torch.zeros(0, dtype=torch.bool, device=x.device)


def _filled(rows: Tensor) -> Tensor:
    """CHUNK places: these, and the first one again until the chunk is full."""
    return torch.cat([rows, rows[:1].expand(CHUNK - len(rows))])


def _attacks(attacks: str | PGD | Sequence[str | PGD], at: Threat) -> dict[str, PGD | None]:
    given = attacks.split(",") if isinstance(attacks, str) else [attacks] if isinstance(attacks, PGD) else attacks
    chosen: dict[str, PGD | None] = {}
    for attack in given:
        if isinstance(attack, str):
            chosen[attack.strip()] = attack_named(attack.strip(), at)
        elif (attack.norm, attack.eps) != (at.norm, at.eps):
            raise ValueError(f"{attack} is not an attack for {at}: give both the same norm and eps")
        else:
            name = f"pgd-{attack.steps}-{attack.objective}"
            chosen[f"{name}-{len(chosen) + 1}" if name in chosen else name] = attack
    if not chosen:
        raise ValueError("no attacks given: name one, pgd-20 for example, or clean")
    return chosen


def _check(images: Tensor, labels: Tensor, ids: Tensor, batch_size: int) -> None:
    if images.ndim != 4 or not images.is_floating_point():
        raise ValueError(f"images {list(images.shape)} {images.dtype}: give floats of shape [N, C, H, W]")
    if len(images) == 0:
        raise ValueError("no images to evaluate on: the set is empty")
    if not len(images) == len(labels) == len(ids):
        raise ValueError(f"{len(images)} images, {len(labels)} labels and {len(ids)} ids: give one of each an image")
    if labels.ndim != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels {list(labels.shape)} {labels.dtype}: give class indices, int64 of shape [N]")
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"pixels lie in [{low:.4g}, {high:.4g}]: give [0, 1]; normalisation belongs inside the model")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: queue at least one image")


def _check_logits(logits: Tensor, y: Tensor) -> None:
    if logits.ndim != 2:
        raise ValueError(f"the model returns {list(logits.shape)}: logits of shape [B, classes] are expected")
    if int(y.min()) < 0 or int(y.max()) >= logits.shape[1]:
        raise ValueError(f"labels lie in [{int(y.min())}, {int(y.max())}] and the model has {logits.shape[1]} classes")


def _device_of(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return first.device if first is not None else torch.device("cpu")


def _precision(device: torch.device) -> str:
    tf32 = device.type == "cuda" and (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    return "tf32" if tf32 else "fp32"
