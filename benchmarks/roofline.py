"""Counted work of a SAFER step, so that a measured time can be stated as a share of what the hardware allows.

FLOPs of any model are counted by torch. For a ViT or DeiT the step is also written as a list of kernels, each with its
FLOPs and its bytes to and from memory, at five levels, each containing those before it:

    eager        bf16 autocast as PyTorch runs it: residual stream and LayerNorm in fp32, a cast before every product,
                 every element-wise op on its own
    compiled     bf16, element-wise ops fused between the products, input gradient only, blocks before the first
                 selected one computed once for both SAM passes
    class-token  the last block computed for the class token alone
    epilogues    GELU, its gradient and the residual adds inside the products
    fused        LayerNorm inside the product after it, the MLP one kernel each way, its backward by recomputation

`bound` is then Σ max(FLOPs / peak, bytes / bandwidth). Weights are left out (read once a batch, a percent at 128
images), caches too; a count made independently of this one agrees within 2 % for the levels compiled, class-token and
epilogues of DeiT-Ti to ViT-B, is up to 9 % lower for eager and 10 % higher for fused. Of any other model (Swin) only
the FLOPs are counted.

Legend, an image: N tokens, D width, M hidden width of the MLP, r = M/D; bytes in multiples of N·D.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from safer_fast.models import reads_class_token, segment_of, segments

TRAINED = frozenset({"qkv", "proj", "fc1", "fc2", "norm"})
Selected = dict[int, frozenset[str]]  # {block: what is trained in it}
LEVELS = ("eager", "compiled", "class-token", "epilogues", "fused")
TFLOPS, GB_PER_S = 790.0, 4300.0  # measured on an H200 with PyTorch: a bf16 product of random matrices, a copy


class Cost(NamedTuple):
    """Floating-point operations of one step (a multiply-add counts two)."""

    flops: int
    attack: int
    passes: int


class Kernel(NamedTuple):
    """Work of one kernel for one image."""

    name: str
    flops: float
    bytes: float

    def times(self, n: float) -> "Kernel":
        """n of them."""
        return Kernel(self.name, self.flops * n, self.bytes * n)


class Vit(NamedTuple):
    """What the counting needs to know of a ViT."""

    tokens: int
    width: int
    hidden: int
    depth: int
    pixels: int
    class_token: bool


def forward_flops(model: nn.Module, batch: int, img_size: int) -> int:
    """FLOPs of a forward pass: GEMMs, convolutions and attention, counted by torch.

    With attention as plain products: torch 2.11 does not count the fused one of CPUs.
    """
    counter = FlopCounterMode(display=False)
    channels = int(getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "in_channels", 3))
    x = torch.zeros(batch, channels, img_size, img_size, device=next(model.parameters()).device)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(x)
    return int(counter.get_total_flops())


def step_cost(model: nn.Module, batch: int, img_size: int, layers: Sequence[str], *, attack_steps: int) -> Cost:
    """PGD (a forward and an input-gradient pass an iteration, each as dear as a forward) and SAM's two passes: a
    forward shared up to the first selected segment, then forward and backward twice. Weight gradients of a few layers
    are left out: at most some percent of the passes."""
    forward = forward_flops(model, 1, img_size) * batch
    pieces = segments(model)
    first = min(segment_of(pieces, name) for name in layers) / len(pieces)
    attack = attack_steps * 2 * forward
    passes = round(forward * (first + 4 * (1 - first)))
    return Cost(attack + passes, attack, passes)


def step_kernels(
    model: nn.Module, img_size: int, layers: Sequence[str] | None, level: str, *, attack_steps: int
) -> list[Kernel] | None:
    """One step of this model as kernels for one image; None for what is not a plain ViT. layers None: all trained."""
    vit = vit_of(model, img_size)
    if vit is None:
        return None
    selected = everything(vit) if layers is None else {}
    for layer in layers or ():
        block = min(max(segment_of(segments(model), layer) - 1, 0), vit.depth - 1)
        selected[block] = selected.get(block, frozenset()) | {p for p in TRAINED if f".{p}" in layer} or TRAINED
    return count_step(vit, level, selected, attack_steps=attack_steps)


def everything(vit: Vit) -> Selected:
    """All weights of all blocks."""
    return dict.fromkeys(range(vit.depth), TRAINED)


def vit_of(model: Any, img_size: int) -> Vit | None:
    """The shape of a plain ViT of timm."""
    names = [piece.name for piece in segments(model)]
    if not hasattr(model, "pos_embed") or names[1:-1] != [f"blocks.{i}" for i in range(len(names) - 2)]:
        return None
    tokens, width = model.pos_embed.shape[1:]
    pixels = model.patch_embed.proj.in_channels * img_size**2
    hidden = model.blocks[0].mlp.fc1.out_features
    return Vit(tokens, width, hidden, len(names) - 2, pixels, reads_class_token(model))


def bound(kernels: Iterable[Kernel], *, tflops: float = TFLOPS, gb_per_s: float = GB_PER_S) -> float:
    """Images/s at which every kernel runs at the ceiling that it hits first."""
    return 1 / sum(max(k.flops / (tflops * 1e12), k.bytes / (gb_per_s * 1e9)) for k in kernels)


def flop_bound(kernels: Iterable[Kernel], *, tflops: float = TFLOPS) -> float:
    """Images/s if bytes cost nothing."""
    return tflops * 1e12 / sum(k.flops for k in kernels)


def count_step(vit: Vit, level: str, selected: Selected, *, attack_steps: int = 10) -> list[Kernel]:
    """The step as kernels, for one image; both passes begin at the first selected block.

    eager: the attack calls loss.backward(), so it computes the gradients of selected weights too and throws them away.
    """
    if level not in LEVELS:
        raise ValueError(f"level={level!r}: choose one of {', '.join(LEVELS)}")
    eager, first = level == "eager", min(selected)
    trained_in_attack: Selected = selected if eager else {}
    attack = [*_embed(vit, level), *_pass(vit, level, range(vit.depth), trained_in_attack), *_pixels(vit, level)]
    prefix = [*_embed(vit, level), *(k for i in range(first) for k in _block(vit, level, i, backward=False))]
    suffix = _pass(vit, level, range(first, vit.depth), selected)
    passes = [*prefix, *suffix, *suffix, *(prefix if eager else ())]
    return [*(k.times(attack_steps) for k in attack), *passes]


def _pass(vit: Vit, level: str, blocks: Iterable[int], selected: Selected) -> list[Kernel]:
    """Forward and backward of these blocks; weight gradients of the selected ones."""
    blocks = list(blocks)
    both = [k for i in blocks for backward in (False, True) for k in _block(vit, level, i, backward=backward)]
    return [*both, *(k for i in blocks for k in _weight_gradients(vit, selected.get(i, frozenset())))]


def _block(vit: Vit, level: str, index: int, *, backward: bool) -> list[Kernel]:
    short = level not in ("eager", "compiled") and vit.class_token and index == vit.depth - 1
    if short:
        return _class_token_block(vit, backward=backward)
    table = (_BACKWARD if backward else _FORWARD)[level if level != "class-token" else "compiled"]
    r = vit.hidden / vit.width
    return [
        _kernel(vit, name, products + products_r * r, attention, size + size_r * r)
        for name, products, products_r, attention, size, size_r in table
    ]


def _kernel(vit: Vit, name: str, products: float, attention: float, size: float) -> Kernel:
    """products: of N·D×D each; attention: of N×N·D each; size: in bytes of N·D elements."""
    n, d = vit.tokens, vit.width
    return Kernel(name, 2 * n * d * d * products + 2 * n * n * d * attention, n * d * size)


# name, products [N, D]·[D, D], the same times r, products over tokens; bytes of N·D elements, the same times r.
# A bf16 element has 2 bytes, an fp32 one 4; attention's backward computes q kᵀ again.
_Row = tuple[str, float, float, float, float, float]
_FORWARD: dict[str, list[_Row]] = {
    "eager": [
        ("norm", 0, 0, 0, 8, 0), ("cast", 0, 0, 0, 6, 0), ("qkv", 3, 0, 0, 8, 0), ("attention", 0, 0, 2, 8, 0),
        ("proj", 1, 0, 0, 4, 0), ("add", 0, 0, 0, 10, 0),
        ("norm", 0, 0, 0, 8, 0), ("cast", 0, 0, 0, 6, 0), ("fc1", 0, 1, 0, 2, 2), ("gelu", 0, 0, 0, 0, 4),
        ("fc2", 0, 1, 0, 2, 2), ("add", 0, 0, 0, 10, 0),
    ],
    "compiled": [
        ("add norm", 0, 0, 0, 8, 0), ("qkv", 3, 0, 0, 8, 0), ("attention", 0, 0, 2, 8, 0), ("proj", 1, 0, 0, 4, 0),
        ("add norm", 0, 0, 0, 8, 0), ("fc1", 0, 1, 0, 2, 2), ("gelu", 0, 0, 0, 0, 4), ("fc2", 0, 1, 0, 2, 2),
    ],
    "epilogues": [
        ("norm", 0, 0, 0, 4, 0), ("qkv", 3, 0, 0, 8, 0), ("attention", 0, 0, 2, 8, 0), ("proj add", 1, 0, 0, 6, 0),
        ("norm", 0, 0, 0, 4, 0), ("fc1 gelu", 0, 1, 0, 2, 4), ("fc2 add", 0, 1, 0, 4, 2),
    ],
    "fused": [
        ("norm qkv", 3, 0, 0, 8, 0), ("attention", 0, 0, 2, 8, 0), ("proj add", 1, 0, 0, 6, 0),
        ("norm mlp add", 0, 2, 0, 4, 0),
    ],
}  # fmt: skip
_BACKWARD: dict[str, list[_Row]] = {
    "eager": [
        ("cast", 0, 0, 0, 6, 0), ("fc2", 0, 1, 0, 2, 2), ("gelu", 0, 0, 0, 0, 6), ("fc1", 0, 1, 0, 2, 2),
        ("cast", 0, 0, 0, 6, 0), ("norm", 0, 0, 0, 12, 0), ("add", 0, 0, 0, 12, 0),
        ("cast", 0, 0, 0, 6, 0), ("proj", 1, 0, 0, 4, 0), ("attention", 0, 0, 5, 16, 0), ("stack", 0, 0, 0, 12, 0),
        ("qkv", 3, 0, 0, 8, 0), ("cast", 0, 0, 0, 6, 0), ("norm", 0, 0, 0, 12, 0), ("add", 0, 0, 0, 12, 0),
    ],
    "compiled": [
        ("fc2", 0, 1, 0, 2, 2), ("gelu", 0, 0, 0, 0, 6), ("fc1", 0, 1, 0, 2, 2), ("norm add", 0, 0, 0, 8, 0),
        ("proj", 1, 0, 0, 4, 0), ("attention", 0, 0, 5, 16, 0), ("qkv", 3, 0, 0, 8, 0), ("norm add", 0, 0, 0, 8, 0),
    ],
    "epilogues": [
        ("fc2 gelu", 0, 1, 0, 2, 4), ("fc1", 0, 1, 0, 2, 2), ("norm add", 0, 0, 0, 8, 0), ("proj", 1, 0, 0, 4, 0),
        ("attention", 0, 0, 5, 16, 0), ("qkv", 3, 0, 0, 8, 0), ("norm add", 0, 0, 0, 8, 0),
    ],
    "fused": [
        ("norm mlp add", 0, 3, 0, 6, 0), ("proj", 1, 0, 0, 4, 0), ("attention", 0, 0, 5, 16, 0),
        ("qkv norm add", 3, 0, 0, 12, 0),
    ],
}  # fmt: skip


def _class_token_block(vit: Vit, *, backward: bool) -> list[Kernel]:
    """Keys and values of all tokens; everything else is one token and counts nothing."""
    if backward:
        return [_kernel(vit, "kv", 2, 0, 6), _kernel(vit, "attention", 0, 0, 8), _kernel(vit, "norm", 0, 0, 6)]
    return [_kernel(vit, "norm", 0, 0, 8), _kernel(vit, "kv", 2, 0, 6), _kernel(vit, "attention", 0, 0, 4)]


def _weight_gradients(vit: Vit, trained: frozenset[str]) -> list[Kernel]:
    """A product's weight reads its input and its output's gradient, its bias the latter; both norms both."""
    r = vit.hidden / vit.width
    sizes = {"qkv": (3.0, 14.0), "proj": (1.0, 6.0), "fc1": (r, 2 + 4 * r), "fc2": (r, 4 + 2 * r), "norm": (0.0, 16.0)}
    return [_kernel(vit, f"d{name}", sizes[name][0], 0, sizes[name][1]) for name in sorted(trained)]


def _embed(vit: Vit, level: str) -> list[Kernel]:
    """Normalise (fp32 in, bf16 out), patch product, positions."""
    n, d = vit.tokens, vit.width
    casts = 12.0 if level == "eager" else 0.0  # x − mean, / std and the cast, each on its own
    return [
        Kernel("normalise", 0, vit.pixels * (6 + casts)),
        Kernel("patch", 2 * vit.pixels * d, vit.pixels * 2 + n * d * 2),
        Kernel("positions", 0, n * d * 4),
    ]


def _pixels(vit: Vit, level: str) -> list[Kernel]:
    """The way back to the pixels, and the attack's step on them (a gradient in fp32)."""
    n, d = vit.tokens, vit.width
    update = 60.0 if level == "eager" else 16.0  # sign, product, sum, two bounds, min, max, clamp: 8 passes
    return [
        Kernel("dpatch", 2 * vit.pixels * d, n * d * 2 + vit.pixels * 2),
        Kernel("dnormalise", 0, vit.pixels * 6),
        Kernel("pgd step", 0, vit.pixels * update),
    ]
