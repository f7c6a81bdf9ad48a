"""One L2 step of PGD, in place, one image at a time:

    d = x_adv - x + alpha grad / ||grad||;   d <- d min(1, eps / ||d||);   x_adv <- clip(x + d, 0, 1)

x_adv, x [B, ...] float32 or float64 of one shape, x_adv contiguous; grad of that shape in any float dtype;
alpha, eps 0-D. An image whose gradient is zero, or holds NaN or an infinity, keeps its x_adv bit for bit.
Reads x_adv, grad, x twice and writes x_adv once (28 bytes a float32 pixel, the second reading often from
cache); memory-bound.

Norms add up squares in float64, so gradients of 1e-30 and 1e30 neither vanish nor overflow, and the step
does not depend on the gradient's scale: there is no 1e-12 beside the norm, which would swallow a gradient
of 1e-30.

The budget holds in exact arithmetic: ||x_adv - x|| <= eps. Two roundings work against it. x + d rounds to
nearest, on a flat image every pixel outwards alike (1.6e-6 at 3·32·32, 1.1e-5 at 3·224·224), so a sum that
landed further from x than d says is moved back by one float; and eps is taken smaller by 4.8e-7 of itself
for the rounding of d.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, alike, attach, cdiv, readable, refuse, tl, triton, written

MARGIN = 1 - 2.0**-21


def _check(x_adv: Tensor, grad: Tensor, x: Tensor) -> None:
    written("l2_step", x_adv=x_adv)
    alike("l2_step", x_adv=x_adv, grad=grad, x=x)
    refuse(x.dtype != x_adv.dtype, f"l2_step: x is {x.dtype} and x_adv {x_adv.dtype}; give both one dtype")
    refuse(x.ndim < 2, f"l2_step: images are [B, ...], and {list(x.shape)} leaves no pixels beside B")


def _norm(v: Tensor) -> Tensor:
    """[B, ...] -> float64 norms that broadcast against it."""
    return torch.linalg.vector_norm(v.double().flatten(1), dim=1).view(-1, *[1] * (v.ndim - 1))


def reference(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    """See the top of the file. ValueError: shapes or dtypes differ, or x_adv is not contiguous."""
    _check(x_adv, grad, x)
    size = _norm(grad)
    moves = (size > 0) & size.isfinite()
    d = x_adv - x + (grad.double() * (alpha.double() / size)).to(x.dtype)
    radius, length = eps.double() * MARGIN, _norm(d)
    d = d * torch.where(length > radius, radius / length, 1).to(x.dtype)  # 0 / 0 stays out
    moved = x + d
    moved = torch.where((moved - x).abs() > d.abs(), moved.nextafter(x), moved)
    x_adv.copy_(torch.where(moves, moved.clamp(0, 1), x_adv))


l2_step = torch.library.custom_op("safer_fast::l2_step", reference, mutates_args=("x_adv",))


@l2_step.register_fake
def _fake(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    _check(x_adv, grad, x)


@triton.jit
def _sums_kernel(p_adv, p_grad, p_x, p_part, D, BLOCK: tl.constexpr):
    """One tile of one image: its share of <δ, δ>, <δ, g> and <g, g>, from which ||δ + a g|| follows for any a."""
    i_image, i_tile = tl.program_id(0), tl.program_id(1)
    o_ = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_ = o_ < D
    o_ = o_ + i_image.to(tl.int64) * D
    b_delta = tl.load(p_adv + o_, mask=m_, other=0.0) - tl.load(p_x + o_, mask=m_, other=0.0)  # [BLOCK]
    b_delta = b_delta.to(tl.float64)
    b_grad = tl.load(p_grad + o_, mask=m_, other=0.0).to(tl.float64)  # [BLOCK]
    p_sum = p_part + (i_image * tl.num_programs(1) + i_tile)
    stride = tl.num_programs(0) * tl.num_programs(1)
    tl.store(p_sum, tl.sum(b_delta * b_delta, axis=0))
    tl.store(p_sum + stride, tl.sum(b_delta * b_grad, axis=0))
    tl.store(p_sum + 2 * stride, tl.sum(b_grad * b_grad, axis=0))


@triton.jit
def _move_kernel(
    p_adv, p_grad, p_x, p_part, p_alpha, p_eps, D, MARGIN: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr
):
    i_image, i_tile = tl.program_id(0), tl.program_id(1)
    o_tile = tl.arange(0, TILES)
    m_tile = o_tile < tl.num_programs(1)
    p_sum = p_part + i_image * tl.num_programs(1) + o_tile
    stride = tl.num_programs(0) * tl.num_programs(1)
    dd = tl.sum(tl.load(p_sum, mask=m_tile, other=0.0), axis=0)  # [TILES] -> []
    dg = tl.sum(tl.load(p_sum + stride, mask=m_tile, other=0.0), axis=0)  # [TILES] -> []
    gg = tl.sum(tl.load(p_sum + 2 * stride, mask=m_tile, other=0.0), axis=0)  # [TILES] -> []
    moves = (gg > 0.0) & (gg < float("inf"))  # both false for NaN
    scale = tl.load(p_alpha).to(tl.float64) / tl.sqrt(tl.where(moves, gg, 1.0))  # []
    size = tl.sqrt(tl.maximum(dd + 2.0 * scale * dg + scale * scale * gg, 0.0))
    radius = tl.load(p_eps).to(tl.float64) * MARGIN  # []
    factor = tl.where(size > radius, radius / tl.where(size > radius, size, 1.0), 1.0).to(tl.float32)

    o_ = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_ = o_ < tl.where(moves, D, 0)
    o_ = o_ + i_image.to(tl.int64) * D
    b_adv = tl.load(p_adv + o_, mask=m_)  # [BLOCK]
    b_grad = tl.load(p_grad + o_, mask=m_).to(tl.float64)  # [BLOCK]
    b_x = tl.load(p_x + o_, mask=m_)  # [BLOCK]
    b_d = (b_adv - b_x + (b_grad * scale).to(tl.float32)) * factor
    b_moved = b_x + b_d
    # The next float towards x. Where this matters the sum is positive (else it is clipped), and the integer
    # that has the same bits is one larger or smaller.
    b_next = b_moved.to(tl.int32, bitcast=True) + tl.where(b_x > b_moved, 1, -1)
    b_next = b_next.to(tl.float32, bitcast=True)
    b_moved = tl.where((tl.abs(b_moved - b_x) > tl.abs(b_d)) & (b_moved > 0.0), b_next, b_moved)
    b_moved = tl.maximum(b_moved, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_adv + o_, tl.minimum(b_moved, 1.0, propagate_nan=tl.PropagateNan.ALL), mask=m_)


def launch(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    """The reference in two Triton kernels. ValueError: as the reference, or float64."""
    _check(x_adv, grad, x)
    grad, x, alpha, eps = (readable(x_adv, t) for t in (grad, x, alpha, eps))
    if not x.numel():
        return
    B, D, block = len(x), x[0].numel(), 2048
    tiles = cdiv(D, block)
    part = torch.empty(3, B, tiles, dtype=torch.float64, device=x.device)
    _sums_kernel[(B, tiles)](x_adv, grad, x, part, D, BLOCK=block, num_warps=8, **ROUNDED)
    power = 1 << (tiles - 1).bit_length()
    _move_kernel[(B, tiles)](
        x_adv, grad, x, part, alpha, eps, D, MARGIN=MARGIN, TILES=power, BLOCK=block, num_warps=8, **ROUNDED
    )


attach(l2_step, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    alpha, eps = torch.tensor(0.1, device=device), torch.tensor(0.5, device=device)
    shapes = (((3, 3, 7, 5), 1.0), ((2, 3, 32, 32), 1e-30), ((4, 3, 40, 41), 1e30), ((1, 1), 1.0), ((0, 3), 1.0))
    for shape, scale in shapes:
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
