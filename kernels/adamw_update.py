"""One AdamW step (Loshchilov & Hutter 2019) on flat buffers, in place, gradient clipping included.

    clip = min(1, max_norm / (norm + 1e-6)), or 1 if max_norm = 0;   g <- clip g;   w <- w (1 - lr weight_decay)
    m <- beta1 m + (1 - beta1) g;   v <- beta2 v + (1 - beta2) g²
    w <- w - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps);   copy <- w

w, m, v [P] float32 or float64; copy [P] of any float dtype or None; g [P] of any float dtype; norm 0-D, the norm of g
before clipping; step 0-D, already counted up (1 at the first update); lr 0-D. If norm is not finite, nothing is written
at all. Equals torch.optim.AdamW after clip_grad_norm_. Reads w, m, v, g, writes w, m, v, copy: 30 bytes an element with
a bf16 copy and a float32 gradient; memory-bound.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import Op, attach, refuse, writable


def _check(w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor) -> None:
    writable("adamw_update", w=w, m=m, v=v)
    tensors = {"w": w, "m": m, "v": v, "g": g} | ({} if copy is None else {"copy": copy})
    refuse(
        w.ndim != 1
        or not w.dtype == m.dtype == v.dtype
        or any(t.shape != w.shape or not t.is_floating_point() for t in tensors.values()),
        "adamw_update: w, m, v, g and copy must be flat floats of one length, and m and v of w's dtype; they are "
        + ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in tensors.items()),
    )
    refuse(
        copy is not None and not copy.is_contiguous(),
        "adamw_update: copy is written in place and must be contiguous; call .contiguous() on it first",
    )


def reference(
    w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, step: Tensor, lr: Tensor,
    max_norm: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """See the top of the file. ValueError: shapes or dtypes do not fit, or a written tensor is not contiguous."""
    _check(w, m, v, copy, g)
    norm, lr64, step = norm.to(w.dtype), lr.double(), step.double()
    finite = norm.isfinite()
    # 1 - beta^step in float64: in float32, 1 - 0.999 has lost four digits.
    rate = (lr64 / (1 - beta1**step)).to(w.dtype)
    root = (1 - beta2**step).sqrt().to(w.dtype)
    g = g.to(w.dtype)
    if max_norm > 0:
        g = g * ((norm + 1e-6).reciprocal() * max_norm).clamp(max=1)
    m_new = beta1 * m + (1 - beta1) * g
    v_new = beta2 * v + (1 - beta2) * g * g
    w_new = w * (1 - lr64 * weight_decay).to(w.dtype) - rate * (m_new / (v_new.sqrt() / root + eps))
    for old, new in ((w, w_new), (m, m_new), (v, v_new), *([] if copy is None else [(copy, w_new.to(copy.dtype))])):
        old.copy_(torch.where(finite, new, old))


adamw_update = torch.library.custom_op("safer_fast::adamw_update", reference, mutates_args=("w", "m", "v", "copy"))


@adamw_update.register_fake
def _fake(
    w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, step: Tensor, lr: Tensor,
    max_norm: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    _check(w, m, v, copy, g)


def launch(
    w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, step: Tensor, lr: Tensor,
    max_norm: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    raise NotImplementedError


attach(adamw_update, reference, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    lr = torch.tensor(1e-3, device=device)
    for n, max_norm, step in ((1, 0.0, 1), (1027, 1.0, 2), (5000, 1e9, 1000)):
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
