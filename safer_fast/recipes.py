"""Named runs. Each function returns a complete Recipe; its docstring says what it needs and what it gives."""

import difflib
from collections.abc import Callable

from .attacks import PGD
from .data import Augment
from .optimizers import SGD
from .recipe import Data, Model, Recipe
from .selection import Selection


def quickstart() -> Recipe:
    """A small ViT on scikit-learn's 8×8 handwritten digits, eps 0.1: all of SAFER in minutes on two CPU cores.

    Needs nothing but the package.
    """
    return Recipe(
        name="quickstart",
        model=Model(
            "vit_tiny_patch16_224", img_size=8, patch_size=2, args={"embed_dim": 64, "depth": 6, "num_heads": 4}
        ),
        data=Data("digits", augment=Augment(pad=1, flip=False)),
        attack=PGD(eps=0.1),
        optimizer=SGD(lr=0.05),
        selection=Selection(k=2),
        epochs=25,
        warmup_epochs=9,
        finetune_lr=0.01,
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
