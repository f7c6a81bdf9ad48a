"""Small models and images for every test."""

import hypothesis
import pytest
import torch
from torch import nn

from safer_fast.models import create_model

hypothesis.settings.register_profile("safer_fast", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("safer_fast")
torch.set_num_threads(1)

TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.fixture
def vit():
    """vit(seed=0, dtype=float32, **changes): a two-block ViT on 8×8 grey images with 5 classes, in eval mode."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
        torch.manual_seed(seed)
        model = create_model("vit_tiny_patch16_224", **{**TINY, **changes})
        with torch.no_grad():
            for p in model.parameters():  # away from timm's zeros: every tensor gets a gradient and a norm
                p.add_(0.05 * torch.randn_like(p))
        return model.to(dtype).eval()

    return make


@pytest.fixture
def images():
    """images(n, seed=0, dtype=float32): (x [n, 1, 8, 8] in [0, 1], y [n])."""

    def make(n: int, seed: int = 0, dtype: torch.dtype = torch.float32, classes: int = 5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(n, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
        return x, torch.randint(0, classes, (n,), generator=generator)

    return make


@pytest.fixture
def bits():
    """bits(model): everything a model is: parameters, all buffers, modes, flags, gradients."""

    def snapshot(model: nn.Module) -> dict[str, object]:
        found: dict[str, object] = {f"tensor {n}": t.detach().clone() for n, t in model.named_parameters()}
        found |= {f"buffer {n}": t.detach().clone() for n, t in model.named_buffers()}
        found |= {f"mode {n}": m.training for n, m in model.named_modules()}
        found |= {f"flag {n}": p.requires_grad for n, p in model.named_parameters()}
        found |= {f"grad {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        return found

    return snapshot


@pytest.fixture
def differing():
    """differing(a, b): the names under which two such snapshots differ."""

    def names(a: dict[str, object], b: dict[str, object]) -> list[str]:
        def same(u: object, v: object) -> bool:
            return torch.equal(u, v) if isinstance(u, torch.Tensor) and isinstance(v, torch.Tensor) else u is v

        return [n for n in sorted(a.keys() | b.keys()) if not (n in a and n in b and same(a[n], b[n]))]

    return names
