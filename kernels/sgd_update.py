"""One SGD step on flat buffers, in place, gradient clipping included.

    clip = min(1, max_norm / (norm + 1e-6)), or 1 if max_norm = 0;   d = clip g + weight_decay w
    m <- momentum m + d;   w <- w - lr (d + momentum m if nesterov else m);   copy <- w

w, m [P] float32 or float64; copy [P] of any float dtype (the bf16 weights a layer computes with) or None; g
[P] of any float dtype; norm 0-D, the norm of g before clipping; lr 0-D. If norm is not finite, nothing is
written at all. Equals torch.optim.SGD (dampening 0, its momentum buffer starting at 0) after
clip_grad_norm_. Reads w, m, g, writes w, m, copy: 22 bytes an element with a bf16 copy and a float32
gradient; memory-bound.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, alike, attach, cdiv, contiguous, readable, refuse, tl, triton, written


def _check(w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor) -> None:
    written("sgd_update", w=w, m=m)
    refuse(m.dtype != w.dtype, f"sgd_update: m is {m.dtype} and w {w.dtype}; give both one dtype")
    if copy is None:
        alike("sgd_update", w=w, m=m, g=g)
    else:
        alike("sgd_update", w=w, m=m, g=g, copy=copy)
        contiguous("sgd_update", "copy", copy)


def reference(
    w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, lr: Tensor,
    max_norm: float, momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """See the top of the file. ValueError: shapes or dtypes differ, or a written tensor is not contiguous."""
    _check(w, m, copy, g)
    lr, norm = lr.to(w.dtype), norm.to(w.dtype)
    finite = norm.isfinite()
    d = g.to(w.dtype)
    if max_norm > 0:  # the reciprocal first, as clip_grad_norm_ has it
        d = d * ((norm + 1e-6).reciprocal() * max_norm).clamp(max=1)
    d = d + weight_decay * w
    m_new = momentum * m + d
    w_new = w - lr * (d + momentum * m_new if nesterov else m_new)
    if copy is not None:
        copy.copy_(torch.where(finite, w_new.to(copy.dtype), copy))
    w.copy_(torch.where(finite, w_new, w))
    m.copy_(torch.where(finite, m_new, m))


sgd_update = torch.library.custom_op("safer_fast::sgd_update", reference, mutates_args=("w", "m", "copy"))


@sgd_update.register_fake
def _fake(
    w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, lr: Tensor,
    max_norm: float, momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    _check(w, m, copy, g)


@triton.jit
def _kernel(
    p_w, p_m, p_copy, p_g, p_norm, p_lr, n, max_norm, momentum, weight_decay,
    CLIP: tl.constexpr, NESTEROV: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = tl.load(p_norm).to(tl.float32)  # []
    lr = tl.load(p_lr).to(tl.float32)  # []
    o_ = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_ = o_ < tl.where(tl.abs(norm) < float("inf"), n, 0)  # nothing for NaN and infinity
    b_w = tl.load(p_w + o_, mask=m_)  # [BLOCK]
    b_m = tl.load(p_m + o_, mask=m_)  # [BLOCK]
    b_d = tl.load(p_g + o_, mask=m_).to(tl.float32)  # [BLOCK]
    if CLIP:
        b_d = b_d * tl.minimum(tl.math.div_rn(1.0, norm + 1e-6) * max_norm, 1.0)
    b_d = b_d + weight_decay * b_w
    b_m = momentum * b_m + b_d
    b_w = b_w - lr * (b_d + momentum * b_m if NESTEROV else b_m)
    tl.store(p_m + o_, b_m, mask=m_)
    tl.store(p_w + o_, b_w, mask=m_)
    if COPY:
        tl.store(p_copy + o_, b_w.to(p_copy.dtype.element_ty), mask=m_)


def launch(
    w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, lr: Tensor,
    max_norm: float, momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """The reference in one Triton kernel. ValueError: as the reference, or float64."""
    _check(w, m, copy, g)
    g, norm, lr = (readable(w, t) for t in (g, norm, lr))
    n, block = w.numel(), 1024
    if n:
        _kernel[(cdiv(n, block),)](
            w, m, w if copy is None else copy, g, norm, lr, n, max_norm, momentum, weight_decay,
            CLIP=max_norm > 0, NESTEROV=nesterov, COPY=copy is not None, BLOCK=block, num_warps=4, **ROUNDED,
        )  # fmt: skip


attach(sgd_update, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    lr = torch.tensor(0.1, device=device)
    for n, max_norm, nesterov in ((1, 0.0, False), (1027, 1.0, True), (5000, 1e9, False), (0, 1.0, False)):
        w, m, g = torch.randn(3, n, generator=random).to(device, dtype).unbind()
        norm = g.norm()
        half = torch.full_like(w, 7.0, dtype=torch.bfloat16)
        yield w.clone(), m.clone(), None, g, norm, lr, max_norm, 0.9, 1e-4, nesterov
        yield w.clone(), m.clone(), half, g.bfloat16(), norm, lr.double(), max_norm, 0.5, 0.0, nesterov
        yield w.clone(), m.clone(), half.to(dtype), g, norm * float("nan"), lr, max_norm, 0.9, 1e-4, nesterov
    w, m, g = torch.randn(3, 2002, generator=random).to(device, dtype).unbind()
    yield w[::2].contiguous(), m[1001:], None, g[::2], g[::2].norm(), lr, 1.0, 0.9, 0.0, False


def bytes_moved(w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor, *_: Any) -> int:
    return 2 * w.nbytes + 2 * m.nbytes + g.nbytes + (0 if copy is None else copy.nbytes)


OP = Op("sgd_update", sgd_update, reference, launch, samples, bytes_moved)
