"""safer_fast: fast, trustworthy adversarial finetuning of vision transformers (SAFER).

    import safer_fast as sf
    model  = sf.create_model("deit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4, weights="….safetensors")
    scores = sf.layer_sharpness(model, loader, attack=sf.PGD(eps=8 / 255), rho=0.05)
    layers = sf.select_layers(scores, k=2)
    step   = sf.compile_step(model, layers, attack=sf.PGD(eps=8 / 255), sam=sf.SAM(rho=0.05), optimizer=sf.SGD(lr=0.01))
    loss   = step(images, labels)
    report = sf.evaluate(model, images, labels, threat=sf.Linf(8 / 255), attacks="pgd-20")

Names are loaded on first use: `import safer_fast` alone does not import torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "PGD": "attacks", "Linf": "attacks", "L2": "attacks",
    "CrossEntropy": "losses", "TRADES": "losses", "MART": "losses",
    "SAM": "sam", "SGD": "optimizers", "AdamW": "optimizers", "Schedule": "schedule",
    "create_model": "models", "load_weights": "models", "load_data": "data",
    "layer_sharpness": "sharpness", "Sharpness": "sharpness", "select_layers": "selection", "Selection": "selection",
    "Step": "step", "compile_step": "engine", "compile_attack": "engine", "Recipe": "recipe", "evaluate": "evaluate", "Report": "evaluate", "finetune": "train",
}  # fmt: skip

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from .attacks import L2, PGD, Linf
    from .data import load_data
    from .engine import compile_attack, compile_step
    from .evaluate import Report, evaluate
    from .losses import MART, TRADES, CrossEntropy
    from .models import create_model, load_weights
    from .optimizers import SGD, AdamW
    from .recipe import Recipe
    from .sam import SAM
    from .schedule import Schedule
    from .selection import Selection, select_layers
    from .sharpness import Sharpness, layer_sharpness
    from .step import Step
    from .train import finetune


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'safer_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """`sf.evaluate` stays the function: importing the submodule of that name does not put the module in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
