"""One SGD step on flat buffers, in place, gradient clipping included.

    clip = min(1, max_norm / (norm + 1e-6)), or 1 if max_norm = 0
    d = clip g + weight_decay w;   m <- momentum m + d;   w <- w - lr (d + momentum m if nesterov else m);   copy <- w

w, m [P] float32 or float64; copy [P] of any float dtype (the bf16 weights a layer computes with) or None; g [P] of any
float dtype; norm 0-D, the norm of g before clipping; lr 0-D. If norm is not finite, nothing is written at all. Equals
torch.optim.SGD (dampening 0, its momentum buffer starting at 0) after clip_grad_norm_. Reads w, m, g, writes w, m, copy:
22 bytes an element with a bf16 copy and a float32 gradient; memory-bound.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import Op, attach, refuse, writable


def _check(w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor) -> None:
    writable("sgd_update", w=w, m=m)
    tensors = {"w": w, "m": m, "g": g} | ({} if copy is None else {"copy": copy})
    refuse(
        w.ndim != 1 or m.dtype != w.dtype or any(t.shape != w.shape or not t.is_floating_point() for t in tensors.values()),
        "sgd_update: w, m, g and copy must be flat floats of one length, and m of w's dtype; they are "
        + ", ".join(f"{name} {list(t.shape)} {t.dtype}" for name, t in tensors.items()),
    )
    refuse(
        copy is not None and not copy.is_contiguous(),
        "sgd_update: copy is written in place and must be contiguous; call .contiguous() on it first",
    )


def reference(
    w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, lr: Tensor,
    max_norm: float, momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """See the top of the file. ValueError: shapes or dtypes do not fit, or a written tensor is not contiguous."""
    _check(w, m, copy, g)
    lr, norm = lr.to(w.dtype), norm.to(w.dtype)
    finite = norm.isfinite()
    d = g.to(w.dtype)
    if max_norm > 0:
        d = d * ((norm + 1e-6).reciprocal() * max_norm).clamp(max=1)  # reciprocal first, as clip_grad_norm_ does
    d = d + weight_decay * w
    m_new = momentum * m + d
    w_new = w - lr * (d + momentum * m_new if nesterov else m_new)
    for old, new in ((w, w_new), (m, m_new), *([] if copy is None else [(copy, w_new.to(copy.dtype))])):
        old.copy_(torch.where(finite, new, old))


sgd_update = torch.library.custom_op("safer_fast::sgd_update", reference, mutates_args=("w", "m", "copy"))


@sgd_update.register_fake
def _fake(
    w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, lr: Tensor,
    max_norm: float, momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    _check(w, m, copy, g)


def launch(
    w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, lr: Tensor,
    max_norm: float, momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    raise NotImplementedError


attach(sgd_update, reference, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    lr = torch.tensor(0.1, device=device)
    for n, max_norm, nesterov in ((1, 0.0, False), (1027, 1.0, True), (5000, 1e9, False)):
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
