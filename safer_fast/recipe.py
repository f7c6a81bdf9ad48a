"""A recipe: all that a run is, as one frozen object; to YAML and back, with every key checked."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from .attacks import PGD
from .data import Augment
from .losses import LOSSES, CrossEntropy, Loss
from .optimizers import OPTIMIZERS, SGD, Optimizer
from .sam import SAM
from .schedule import Schedule
from .selection import Selection
from .sharpness import Sharpness

FINETUNE_SHARE = 5  # stage 2 is a quarter of stage 1, so a fifth of both


@dataclass(frozen=True)
class Model:
    """A timm model. Number of classes and channels come from the data. args go to timm (embed_dim, depth, …)."""

    name: str = "deit_tiny_patch16_224"
    img_size: int | None = None
    patch_size: int | None = None
    weights: str | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """A data set, where it lies, a class-balanced part of it, held-out training images, augmentation."""

    name: str = "digits"
    dir: str | None = None
    limit: int | None = None
    holdout: int = 1000
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        if self.holdout < 1:
            raise ValueError(
                f"holdout={self.holdout}: at least one training image chooses the best epoch; 1000 is usual"
            )


@dataclass(frozen=True)
class Recipe:
    """A run: stage 1 (clean start, rising eps, adversarial training of all layers), then stage 2 (SAFER).

    epochs: both stages together. warmup_epochs: the part of stage 1 that is clean (two thirds) or at rising eps.
    finetune_epochs: stage 2; None means a fifth of epochs. start: a robust checkpoint to begin stage 2 from instead.
    optimizer.lr is stage 1's, finetune_lr stage 2's; schedule.milestones are fractions of each stage.
    precision, mode: how the step is computed, see `engine.compile_step`.
    select_by, score_by: attacks that choose the best epoch (on held-out training images) and score (on test images).
    """

    name: str = "custom"
    model: Model = Model()
    data: Data = Data()
    attack: PGD = PGD()
    loss: Loss = CrossEntropy()
    sam: SAM = SAM()
    sharpness: Sharpness = Sharpness()
    selection: Selection = Selection()
    optimizer: Optimizer = SGD()
    schedule: Schedule = Schedule()
    epochs: int = 50
    warmup_epochs: int = 0
    finetune_epochs: int | None = None
    finetune_lr: float = 0.01
    start: str | None = None
    batch_size: int = 64
    accumulate: int = 1
    clip: float = 1.0
    precision: str = "auto"
    mode: str = "auto"
    select_by: str = "pgd-10"
    score_by: str = "pgd-20"
    eval_batch_size: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < (1 if self.start else 2):
            raise ValueError(f"epochs={self.epochs}: give at least 2, one for each stage; with --from 1 is enough")
        if self.finetune_epochs is not None and not 1 <= self.finetune_epochs <= self.epochs:
            raise ValueError(f"finetune_epochs={self.finetune_epochs}: it is a part of the {self.epochs} epochs")
        if not 0 <= self.warmup_epochs <= self.stage1_epochs and not self.start:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs}: it is a part of stage 1, which has {self.stage1_epochs} of the "
                f"{self.epochs} epochs"
            )
        if self.batch_size < 1 or self.accumulate < 1 or self.eval_batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}, accumulate={self.accumulate}: each is 1 or more")
        if not self.clip >= 0:
            raise ValueError(f"clip={self.clip}: the largest gradient norm is 0 (no clipping) or more")
        if not self.finetune_lr > 0:
            raise ValueError(f"finetune_lr={self.finetune_lr}: a learning rate is more than 0")

    @property
    def stage2_epochs(self) -> int:
        """Epochs of SAFER."""
        given = self.finetune_epochs
        return max(1, round(self.epochs / FINETUNE_SHARE)) if given is None else given

    @property
    def stage1_epochs(self) -> int:
        """Epochs of adversarial training before it; 0 when it starts from a checkpoint."""
        return 0 if self.start else self.epochs - self.stage2_epochs

    def replace(self, overrides: Mapping[str, Any]) -> "Recipe":
        """A copy with fields changed, given by dotted names ("sam.rho") or the short names of ALIASES.

        Values are checked and converted as in YAML. Raises ValueError for an unknown name, with the nearest one.
        """
        tree = to_dict(self)
        for key, value in sorted(overrides.items(), key=lambda item: ALIASES.get(item[0], item[0]).count(".")):
            _set(tree, ALIASES.get(key, key).split("."), key, value)
        return from_dict(tree)


ALIASES = {
    "model": "model.name",
    "data": "data.name",
    "data_dir": "data.dir",
    "weights": "model.weights",
    "img_size": "model.img_size",
    "patch_size": "model.patch_size",
    "limit": "data.limit",
    "eps": "attack.eps",
    "alpha": "attack.alpha",
    "rho": "sam.rho",
    "k": "selection.k",
    "layers": "selection.layers",
    "select": "selection.by",
    "lr": "optimizer.lr",
    "optimizer.name": "optimizer",
    "loss.name": "loss",
}


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain values, nested; a loss or optimizer says which it is by `name`."""
    tree: dict[str, Any] = {}
    if hasattr(type(recipe), "name") and "name" not in {f.name for f in dataclasses.fields(recipe)}:
        tree["name"] = recipe.name
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        tree[f.name] = to_dict(value) if dataclasses.is_dataclass(value) else _plain(value)
    return tree


def from_dict(tree: Mapping[str, Any]) -> Recipe:
    """The recipe of a nested mapping; what is left out has its default. Raises ValueError naming the field."""
    return _build(Recipe, tree, "")


def dump(recipe: Recipe) -> str:
    """YAML, complete and re-runnable; multiples of 1/255 are written as such."""
    return yaml.safe_dump(_fractions(to_dict(recipe)), sort_keys=False, allow_unicode=True)


def load(path: str | Path) -> Recipe:
    """A recipe from a YAML file. Raises FileNotFoundError, or ValueError with file and field."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe file {path}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no recipe: expected `field: value` lines, as `safer-fast show` prints them")
    try:
        return from_dict(tree)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def number(text: str) -> float:
    """A float, also written as a fraction: "8/255". Raises ValueError."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number; 0.05 or 8/255 is") from None


def _build(kind: Any, tree: Any, where: str) -> Any:
    if not isinstance(tree, Mapping):
        group = where.rstrip(".")
        raise ValueError(f"{group or 'recipe'}={tree!r}: it has fields of its own; write {where}<field>")
    tree = dict(tree)
    names = {f.name for f in dataclasses.fields(kind)}
    if kind in (*LOSSES.values(), *OPTIMIZERS.values()):
        tree.pop("name", None)
    hints = typing.get_type_hints(kind)
    for key in tree:
        if key not in names:
            raise ValueError(_unknown(f"{where}{key}", [f"{where}{n}" for n in sorted(names)]))
    values = {key: _convert(hints[key], value, f"{where}{key}") for key, value in tree.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where.rstrip('.')}: {error}" if where else str(error)) from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint in (Loss, Optimizer):
        return _build(_variant(LOSSES if hint == Loss else OPTIMIZERS, value, where), value, f"{where}.")
    if isinstance(hint, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{where}.")
    if typing.get_origin(hint) is tuple:
        return _tuple(typing.get_args(hint)[0], value, where)
    if typing.get_origin(hint) is dict:
        pairs = yaml.safe_load(value) if isinstance(value, str) else value
        if not isinstance(pairs, Mapping):
            raise ValueError(f"{where}={value!r}: expected pairs, {{depth: 6, embed_dim: 64}} for example")
        return {str(k): v for k, v in pairs.items()}
    return _scalar(hint, value, where)


def _scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return number(str(value)) if isinstance(value, str) else float(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if hint is int and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"{where}={value!r} is not a whole number") from None
    if hint is bool and (isinstance(value, bool) or str(value).lower() in ("true", "false")):
        return str(value).lower() == "true"
    if hint is str and isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{where}={value!r}: expected {_KINDS[hint]}")


_KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}


def _tuple(item: Any, value: Any, where: str) -> tuple[Any, ...]:
    parts = [p.strip() for p in value.split(",") if p.strip()] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"{where}={value!r}: expected a list")
    return tuple(_scalar(item, p, where) for p in parts)


def _variant(kinds: Mapping[str, Any], value: Any, where: str) -> Any:
    name = value.get("name") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{where}.name={name!r}: choose one of {', '.join(kinds)}")
    return kinds[name]


def _set(tree: dict[str, Any], path: list[str], key: str, value: Any) -> None:
    """Puts a value into nested fields; that the last one exists is checked when the recipe is built."""
    for part in path[:-1]:
        tree = tree.get(part)  # type: ignore[assignment]
        if not isinstance(tree, dict):
            raise ValueError(_unknown(key, _names()))
    if path in (["loss"], ["optimizer"]) and isinstance(value, str):
        tree[path[-1]] = {"name": value}  # --loss trades, --optimizer adamw: with the defaults of that kind
    else:
        tree[path[-1]] = value


def _names(kind: Any = None, where: str = "") -> list[str]:
    """Every dotted name of a recipe, and the short ones."""
    found = [] if kind else list(ALIASES)
    hints = typing.get_type_hints(kind or Recipe)
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            found += _names(hint, f"{where}{name}.")
        found.append(f"{where}{name}")
    return found


def _unknown(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    return f"no field {key!r} in a recipe" + (f"; did you mean {', '.join(near)}?" if near else "")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else dict(value) if isinstance(value, Mapping) else value


def _fractions(value: Any) -> Any:
    """8/255 instead of 0.03137254901960784, where that is exactly the same number."""
    if isinstance(value, dict):
        return {k: v if k == "args" else _fractions(v) for k, v in value.items()}  # args are timm's, as they are
    if isinstance(value, float) and 0 < value < 1:
        for n in range(1, 33):
            if value == n / 255:
                return f"{n}/255"
    return value
