"""One L2 step of PGD, in place, one image at a time:

    d = x_adv - x + alpha grad / ||grad||;   d <- d min(1, eps / ||d||);   x_adv <- clip(x + d, 0, 1)

x_adv, x [B, ...] float32 or float64 of one shape, x_adv contiguous; grad of that shape in any float dtype; alpha, eps
0-D. An image whose gradient is zero, or holds NaN or an infinity, keeps its x_adv bit for bit. Reads x_adv, grad, x
twice and writes x_adv once (28 bytes a float32 pixel, the second reading often from cache); memory-bound.

Norms add up squares in float64, so gradients of 1e-30 and 1e30 neither vanish nor overflow, and the step does not
depend on the gradient's scale: there is no 1e-12 beside the norm, which would swallow a gradient of 1e-30.

The budget holds in exact arithmetic: ||x_adv - x|| <= eps. x + d rounds to the nearest float, which on a flat image
rounds every pixel outwards alike, so a sum that landed further from x than d says is moved back by one float, and eps
is taken smaller by 2.4e-7 of itself, which covers the rounding of d.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import Op, attach, refuse, writable

MARGIN = 1 - 2.0**-22  # four half-ulps of float32: norm, factor, product, comparison


def _check(x_adv: Tensor, grad: Tensor, x: Tensor) -> None:
    writable("l2_step", x_adv=x_adv)
    refuse(
        not x_adv.shape == grad.shape == x.shape or x.dtype != x_adv.dtype or not grad.is_floating_point(),
        f"l2_step: x_adv, grad and x must have one shape, and x the dtype of x_adv; they are {list(x_adv.shape)} "
        f"{x_adv.dtype}, {list(grad.shape)} {grad.dtype}, {list(x.shape)} {x.dtype}",
    )
    refuse(x.ndim < 1, "l2_step: the first dimension counts images; a 0-D tensor has none")


def _norm(v: Tensor) -> Tensor:
    """[B, ...] -> float64 norms that broadcast against it."""
    return torch.linalg.vector_norm(v.double().flatten(1), dim=1).view(-1, *[1] * (v.ndim - 1))


def reference(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    """See the top of the file. ValueError: shapes or dtypes differ, or x_adv is not contiguous."""
    _check(x_adv, grad, x)
    if x.ndim == 1:
        x_adv, grad, x = x_adv[:, None], grad[:, None], x[:, None]
    size = _norm(grad)
    moves = (size > 0) & size.isfinite()
    d = x_adv - x + (grad.double() * (alpha.double() / size)).to(x.dtype)
    d = d * (eps.double() * MARGIN / _norm(d)).clamp(max=1).to(x.dtype)
    moved = x + d
    moved = torch.where((moved - x).abs() > d.abs(), moved.nextafter(x), moved)
    x_adv.copy_(torch.where(moves, moved.clamp(0, 1), x_adv))


l2_step = torch.library.custom_op("safer_fast::l2_step", reference, mutates_args=("x_adv",))


@l2_step.register_fake
def _fake(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    _check(x_adv, grad, x)


def launch(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    raise NotImplementedError


attach(l2_step, reference, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    alpha, eps = torch.tensor(0.1, device=device), torch.tensor(0.5, device=device)
    for shape, scale in (((3, 3, 7, 5), 1.0), ((2, 3, 32, 32), 1e-30), ((4, 3, 40, 41), 1e30), ((1, 1), 1.0)):
        x = torch.rand(shape, generator=random).to(device, dtype)
        x_adv = (x + 0.02 * torch.randn(shape, generator=random).to(device, dtype)).clamp(0, 1)
        grad = torch.randn(shape, generator=random).to(device, dtype) * scale
        if len(grad) > 2:
            grad[0].view(-1)[1], grad[1] = float("nan"), 0
        yield x_adv, grad, x, alpha, eps
        yield x_adv.clone(), grad.bfloat16(), x, alpha * 10, eps.double()
    strided = torch.rand(5, 4, 3, generator=random).to(device, dtype).transpose(0, 2)
    yield strided.contiguous(), strided, strided, alpha, eps


def bytes_moved(x_adv: Tensor, grad: Tensor, x: Tensor, *_: Any) -> int:
    return 3 * x_adv.nbytes + 2 * grad.nbytes + 2 * x.nbytes


OP = Op("l2_step", l2_step, reference, launch, samples, bytes_moved)
