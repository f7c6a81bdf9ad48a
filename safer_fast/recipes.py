"""Named runs. Each function returns a complete Recipe; its docstring says what it needs and what it gives."""

import difflib
from collections.abc import Callable

from .attacks import PGD
from .data import Augment
from .optimizers import AdamW
from .recipe import Data, Model, Recipe
from .schedule import Schedule
from .selection import Selection


def quickstart() -> Recipe:
    """A small ViT on scikit-learn's 8×8 handwritten digits, L∞ eps 0.1: all of SAFER in minutes on two CPU cores.

    Needs nothing but the package. A start from random weights needs AdamW and a long clean warm-up; a shift by one of
    eight pixels is too much augmentation.
    """
    return Recipe(
        name="quickstart",
        model=Model(
            "vit_tiny_patch16_224", img_size=8, patch_size=4, args={"embed_dim": 64, "depth": 4, "num_heads": 4}
        ),
        data=Data("digits", augment=Augment(pad=0, flip=False)),
        attack=PGD(eps=0.1),
        optimizer=AdamW(lr=1e-3),
        selection=Selection(k=2),
        epochs=30,
        warmup_epochs=15,
        finetune_lr=5e-4,
        batch_size=32,
        schedule=Schedule(warmup_steps=0),
    )


def cifar10_deit_tiny() -> Recipe:
    """DeiT-Ti on CIFAR-10 at 32 px with patch 4, L∞ 8/255: the paper's setting (protocol of Mo et al., 2022).

    Needs --data-dir (CIFAR-10, official binary layout) and --weights (ImageNet DeiT-Ti, safetensors).
    """
    return Recipe(
        name="cifar10-deit-tiny",
        model=Model("deit_tiny_patch16_224", img_size=32, patch_size=4),
        data=Data("cifar10"),
        selection=Selection(k=2),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "quickstart": quickstart,
    "cifar10-deit-tiny": cifar10_deit_tiny,
}


def named(name: str) -> Recipe:
    """The recipe of that name. Raises ValueError with the nearest names."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4) or list(RECIPES)
        raise ValueError(f"no recipe {name!r}; did you mean {', '.join(near)}? `safer-fast recipes` lists all")
    return RECIPES[name]()
