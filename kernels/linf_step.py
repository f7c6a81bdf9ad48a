"""One L∞ step of PGD, in place: x_adv <- clip(clip(x_adv + alpha sign(grad), x - eps, x + eps), 0, 1).

x_adv, x [B, ...] float32 or float64 of one shape, x_adv contiguous; grad of that shape in any float dtype
(bf16 halves its traffic); alpha, eps 0-D. sign(NaN) = 0: a NaN gradient moves nothing. Reads x_adv, grad,
x, writes x_adv: 16 bytes a float32 pixel (14 with a bf16 gradient); memory-bound.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, alike, attach, cdiv, readable, refuse, tl, triton, written


def _check(x_adv: Tensor, grad: Tensor, x: Tensor) -> None:
    written("linf_step", x_adv=x_adv)
    alike("linf_step", x_adv=x_adv, grad=grad, x=x)
    refuse(x.dtype != x_adv.dtype, f"linf_step: x is {x.dtype} and x_adv {x_adv.dtype}; give both one dtype")


def reference(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    """See the top of the file. ValueError: shapes or dtypes differ, or x_adv is not contiguous."""
    _check(x_adv, grad, x)
    alpha, eps = alpha.to(x.dtype), eps.to(x.dtype)
    moved = x_adv + alpha * grad.sign().to(x.dtype)  # torch.sign(NaN) is 0, on CPU and GPU
    x_adv.copy_(moved.clamp(x - eps, x + eps).clamp(0, 1))


linf_step = torch.library.custom_op("safer_fast::linf_step", reference, mutates_args=("x_adv",))


@linf_step.register_fake
def _fake(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    _check(x_adv, grad, x)


@triton.jit
def _kernel(p_adv, p_grad, p_x, p_alpha, p_eps, n, BLOCK: tl.constexpr):
    o_ = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_ = o_ < n
    alpha = tl.load(p_alpha).to(tl.float32)  # []
    eps = tl.load(p_eps).to(tl.float32)  # []
    b_adv = tl.load(p_adv + o_, mask=m_)  # [BLOCK]
    b_grad = tl.load(p_grad + o_, mask=m_).to(tl.float32)  # [BLOCK]
    b_x = tl.load(p_x + o_, mask=m_)  # [BLOCK]
    b_sign = tl.where(b_grad > 0, 1.0, tl.where(b_grad < 0, -1.0, 0.0))
    # NaN pixels stay NaN, as in PyTorch; by default the hardware's min and max would drop them.
    b_moved = tl.maximum(b_adv + alpha * b_sign, b_x - eps, propagate_nan=tl.PropagateNan.ALL)
    b_moved = tl.minimum(b_moved, b_x + eps, propagate_nan=tl.PropagateNan.ALL)
    b_moved = tl.maximum(b_moved, 0.0, propagate_nan=tl.PropagateNan.ALL)
    b_moved = tl.minimum(b_moved, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_adv + o_, b_moved, mask=m_)


def launch(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    """The reference in one Triton kernel. ValueError: as the reference, or float64."""
    _check(x_adv, grad, x)
    reads = [readable(x_adv, t) for t in (grad, x, alpha, eps)]
    n, block = x_adv.numel(), 1024
    if n:
        _kernel[(cdiv(n, block),)](x_adv, *reads, n, BLOCK=block, num_warps=4, **ROUNDED)


attach(linf_step, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    alpha, eps = torch.tensor(2 / 255, device=device), torch.tensor(8 / 255, device=device)
    for shape in ((3, 3, 7, 5), (2, 3, 32, 32), (1, 1), (0, 3, 4, 4)):
        x = torch.rand(shape, generator=random).to(device, dtype)
        x_adv = (x + 8 / 255 * (2 * torch.rand(shape, generator=random).to(device, dtype) - 1)).clamp(0, 1)
        grad = torch.randn(shape, generator=random).to(device, dtype)
        grad.view(-1)[::5] = 0
        grad.view(-1)[:1] = float("nan")
        yield x_adv, grad, x, alpha, eps
        yield x_adv.clone(), grad.bfloat16(), x, alpha, eps.double()
    strided = torch.randn(5, 4, 3, generator=random).to(device, dtype).transpose(0, 2)
    yield strided.sigmoid().contiguous(), strided, strided.sigmoid(), alpha, eps


def bytes_moved(x_adv: Tensor, grad: Tensor, x: Tensor, *_: Any) -> int:
    return 2 * x_adv.nbytes + grad.nbytes + x.nbytes


OP = Op("linf_step", linf_step, reference, launch, samples, bytes_moved)
