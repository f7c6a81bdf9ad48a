"""y = x wᵀ + b, on the CPU in float32 by oneDNN where PyTorch has it, which is faster than its default there.

x [..., in], w [out, in], b [out] or None, of one float dtype and any strides; returns a contiguous [..., out].
Everywhere else this is F.linear. Autocast does not reach in: cast first. Reads x, w, b and writes y;
compute-bound.

The gradients take the same route: dx = g w, dw = gᵀ x, db = Σ g. dw and db are computed, and x kept for them,
only where they are asked for.
"""

import functools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from safer_fast.kernels.op import Op, refuse


def _check(x: Tensor, w: Tensor, b: Tensor | None) -> None:
    """oneDNN itself takes a w of the wrong rank and returns something."""
    refuse(
        x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1] or (b is not None and b.shape != w.shape[:1]),
        f"linear: x [..., in], w [out, in] and b [out] do not fit: {list(x.shape)}, {list(w.shape)}"
        + ("" if b is None else f", {list(b.shape)}"),
    )
    refuse(
        not x.is_floating_point() or w.dtype != x.dtype or (b is not None and b.dtype != x.dtype),
        f"linear: x and w are {x.dtype} and {w.dtype}" + ("" if b is None else f", b is {b.dtype}") + "; "
        "give them one float dtype",
    )


def reference(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """See the top of the file. ValueError: shapes do not fit, or dtypes differ."""
    _check(x, w, b)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, w, b).contiguous()


@functools.cache
def have_onednn() -> bool:
    """Whether the op of PyTorch's that takes a GEMM to oneDNN works here. It is private, so it is tried once."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        works = torch.equal(_onednn(torch.full((2, 3), 2.0), torch.ones(4, 3), torch.ones(4)), torch.full((2, 4), 7.0))
        reason = "a wrong result"
    except Exception as error:  # another signature, a CPU that oneDNN does not know: F.linear serves all
        works, reason = False, str(error)
    if not works:
        warnings.warn(f"oneDNN's linear does not work with torch {torch.__version__}, so the slower F.linear runs "
                      f"instead: {reason}", RuntimeWarning, stacklevel=2)  # fmt: skip
    return works


def _onednn(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    # A b with gaps is read as if it had none (torch 2.15).
    b = None if b is None else b.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, w, b, "none", [], "")


def _run(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    _check(x, w, b)
    wanted = x.dtype == torch.float32 and x.is_cpu and w.is_cpu and torch.backends.mkldnn.enabled
    # oneDNN refuses a product over nothing.
    if wanted and x.numel() and w.numel() and have_onednn():
        return _onednn(x, w, b).contiguous()
    return reference(x, w, b)


linear = torch.library.custom_op("safer_fast::linear", _run, mutates_args=())


@linear.register_fake
def _fake(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    _check(x, w, b)
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, w, _ = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)


def _rows(t: Tensor) -> Tensor:
    """[..., n] -> [rows, n]; reshape(-1, n) is ambiguous for n = 0."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, w = ctx.saved_tensors
    for_x, for_w, for_b = ctx.needs_input_grad
    dx = linear(g, w.t(), None) if for_x else None
    dw = linear(_rows(g).t(), _rows(x).t(), None) if for_w else None
    return dx, dw, _rows(g).sum(0) if for_b else None


linear.register_autograd(_backward, setup_context=_keep)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(device, dtype)

    yield normal(3, 5, 7), normal(4, 7), normal(4)
    yield normal(3, 5, 7).bfloat16(), normal(4, 7).bfloat16(), None
    yield normal(2, 65, 48), normal(33, 48), None
    yield normal(1, 1), normal(1, 1), normal(1)
    yield normal(31), normal(8, 31), normal(8)
    yield normal(5, 2, 6).transpose(0, 1)[..., ::2], normal(3, 9).t()[2:5].t()[:, :3], normal(6)[::2]
    yield normal(4, 5, 6)[:, 0], normal(12, 6)[:6].t(), normal(12)[6:]
    yield normal(1, 1, 6).expand(3, 4, 6), normal(1, 6).expand(5, 6), normal(1).expand(5)
    yield normal(0, 5, 7), normal(4, 7), normal(4)
    yield normal(3, 0), normal(4, 0), normal(4)


def bytes_moved(x: Tensor, w: Tensor, b: Tensor | None) -> int:
    out = x.numel() // max(x.shape[-1], 1) * w.shape[0] * x.element_size()
    return x.nbytes + w.nbytes + out + (0 if b is None else b.nbytes)


OP = Op("linear", linear, reference, None, samples, bytes_moved, onednn=have_onednn)
