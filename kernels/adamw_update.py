"""One AdamW step (Loshchilov & Hutter 2019) on flat buffers, in place, gradient clipping included.

    clip = min(1, max_norm / (norm + 1e-6)), or 1 if max_norm = 0;   g <- clip g
    m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g²;   w <- w (1 - lr weight_decay)
    w <- w - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps);   copy <- w

w, m, v [P] float32 or float64; copy [P] of any float dtype or None; g [P] of any float dtype; norm 0-D, the
norm of g before clipping; step 0-D, already counted up (1 at the first update); lr 0-D. If norm is not
finite, nothing is written at all. Equals torch.optim.AdamW after clip_grad_norm_. Reads w, m, v, g, writes
w, m, v, copy: 30 bytes an element with a bf16 copy and a float32 gradient; memory-bound.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, alike, attach, cdiv, contiguous, readable, refuse, tl, triton, written


def _check(w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor) -> None:
    written("adamw_update", w=w, m=m, v=v)
    refuse(
        not m.dtype == v.dtype == w.dtype,
        f"adamw_update: w, m and v are {w.dtype}, {m.dtype} and {v.dtype}; give them one dtype",
    )
    if copy is None:
        alike("adamw_update", w=w, m=m, v=v, g=g)
    else:
        alike("adamw_update", w=w, m=m, v=v, g=g, copy=copy)
        contiguous("adamw_update", "copy", copy)


def reference(
    w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, step: Tensor, lr: Tensor,
    max_norm: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """See the top of the file. ValueError: shapes or dtypes differ, or a written tensor is not contiguous."""
    _check(w, m, v, copy, g)
    norm, lr, step = norm.to(w.dtype), lr.double(), step.double()
    finite = norm.isfinite()
    # 1 - beta^step in float64: in float32, 1 - 0.999 has lost four digits.
    rate = (lr / (1 - beta1**step)).to(w.dtype)
    root = (1 - beta2**step).sqrt().to(w.dtype)
    g = g.to(w.dtype)
    if max_norm > 0:  # the reciprocal first, as clip_grad_norm_ has it
        g = g * ((norm + 1e-6).reciprocal() * max_norm).clamp(max=1)
    m_new = beta1 * m + (1 - beta1) * g
    v_new = beta2 * v + (1 - beta2) * g * g
    w_new = w * (1 - lr * weight_decay).to(w.dtype) - rate * (m_new / (v_new.sqrt() / root + eps))
    if copy is not None:
        copy.copy_(torch.where(finite, w_new.to(copy.dtype), copy))
    for old, new in ((w, w_new), (m, m_new), (v, v_new)):
        old.copy_(torch.where(finite, new, old))


adamw_update = torch.library.custom_op("safer_fast::adamw_update", reference, mutates_args=("w", "m", "v", "copy"))


@adamw_update.register_fake
def _fake(
    w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, step: Tensor, lr: Tensor,
    max_norm: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    _check(w, m, v, copy, g)


@triton.jit
def _kernel(
    p_w, p_m, p_v, p_copy, p_g, p_norm, p_step, p_lr, n, max_norm,
    beta1, beta2, rest1, rest2, log1, log2, eps, weight_decay,
    CLIP: tl.constexpr, COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    norm = tl.load(p_norm).to(tl.float32)  # []
    step = tl.load(p_step).to(tl.float64)  # []
    lr = tl.load(p_lr).to(tl.float64)  # []
    # beta^step through its logarithm: Triton has no power, and its float arguments are float32, in which the
    # logarithm of 0.999 is as precise as any number but 1 - 0.999 is not.
    rate = (lr / (1.0 - tl.exp(step * log1))).to(tl.float32)
    root = tl.sqrt(1.0 - tl.exp(step * log2)).to(tl.float32)
    keep = (1.0 - lr * weight_decay).to(tl.float32)
    o_ = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_ = o_ < tl.where(tl.abs(norm) < float("inf"), n, 0)  # nothing for NaN and infinity
    b_w = tl.load(p_w + o_, mask=m_)  # [BLOCK]
    b_m = tl.load(p_m + o_, mask=m_)  # [BLOCK]
    b_v = tl.load(p_v + o_, mask=m_)  # [BLOCK]
    b_g = tl.load(p_g + o_, mask=m_).to(tl.float32)  # [BLOCK]
    if CLIP:
        b_g = b_g * tl.minimum(tl.math.div_rn(1.0, norm + 1e-6) * max_norm, 1.0)
    b_m = beta1 * b_m + rest1 * b_g
    b_v = beta2 * b_v + rest2 * b_g * b_g
    b_size = tl.math.div_rn(tl.math.sqrt_rn(b_v), root) + eps
    b_w = b_w * keep - rate * tl.math.div_rn(b_m, b_size)
    tl.store(p_m + o_, b_m, mask=m_)
    tl.store(p_v + o_, b_v, mask=m_)
    tl.store(p_w + o_, b_w, mask=m_)
    if COPY:
        tl.store(p_copy + o_, b_w.to(p_copy.dtype.element_ty), mask=m_)


def launch(
    w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, step: Tensor, lr: Tensor,
    max_norm: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """The reference in one Triton kernel. ValueError: as the reference, or float64."""
    _check(w, m, v, copy, g)
    g, norm, step, lr = (readable(w, t) for t in (g, norm, step, lr))
    # beta = 0 forgets everything: beta^step is 0, as exp of a large negative number is.
    logs = [math.log(beta) if beta > 0 else -1e30 for beta in (beta1, beta2)]
    n, block = w.numel(), 1024
    if n:
        _kernel[(cdiv(n, block),)](
            w, m, v, w if copy is None else copy, g, norm, step, lr, n, max_norm,
            beta1, beta2, 1 - beta1, 1 - beta2, *logs, eps, weight_decay,
            CLIP=max_norm > 0, COPY=copy is not None, BLOCK=block, num_warps=4, **ROUNDED,
        )  # fmt: skip


attach(adamw_update, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    lr = torch.tensor(1e-3, device=device)
    for n, max_norm, step in ((1, 0.0, 1), (1027, 1.0, 2), (5000, 1e9, 1000), (0, 1.0, 3)):
        w, m, g = torch.randn(3, n, generator=random).to(device, dtype).unbind()
        v = torch.rand(n, generator=random).to(device, dtype)
        count, norm = torch.tensor(float(step), device=device), g.norm()
        half = torch.full_like(w, 7.0, dtype=torch.bfloat16)
        hyper = (max_norm, 0.9, 0.999, 1e-8, 0.05)
        yield w.clone(), m.clone(), v.clone(), None, g, norm, count, lr, *hyper
        yield w.clone(), m.clone(), v.clone(), half, g.bfloat16(), norm, count.long(), lr.double(), *hyper
        yield w.clone(), m.clone(), v.clone(), half.to(dtype), g, norm * float("inf"), count, lr, *hyper
    w, m, g = torch.randn(3, 2002, generator=random).to(device, dtype).unbind()
    v = torch.rand(1001, generator=random).to(device, dtype)
    yield w[::2].contiguous(), m[1001:], v, None, g[::2], g[::2].norm(), count, lr, *hyper


def bytes_moved(w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor, *_: Any) -> int:
    return 2 * (w.nbytes + m.nbytes + v.nbytes) + g.nbytes + (0 if copy is None else copy.nbytes)


OP = Op("adamw_update", adamw_update, reference, launch, samples, bytes_moved)
