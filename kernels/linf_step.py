"""One L∞ step of PGD, in place: x_adv <- clip(clip(x_adv + alpha sign(grad), x - eps, x + eps), 0, 1).

x_adv, x [B, ...] float32 or float64 of one shape, x_adv contiguous; grad of that shape in any float dtype (bf16 halves
its traffic); alpha, eps 0-D. sign(NaN) = 0: a NaN gradient moves nothing. Reads x_adv, grad, x, writes x_adv:
16 bytes a float32 pixel (14 with a bf16 gradient); memory-bound.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import Op, attach, refuse, writable


def _check(x_adv: Tensor, grad: Tensor, x: Tensor) -> None:
    writable("linf_step", x_adv=x_adv)
    refuse(
        not x_adv.shape == grad.shape == x.shape or x.dtype != x_adv.dtype or not grad.is_floating_point(),
        f"linf_step: x_adv, grad and x must have one shape, and x the dtype of x_adv; they are {list(x_adv.shape)} "
        f"{x_adv.dtype}, {list(grad.shape)} {grad.dtype}, {list(x.shape)} {x.dtype}",
    )


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


def launch(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    raise NotImplementedError


attach(linf_step, reference, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    alpha, eps = torch.tensor(2 / 255, device=device), torch.tensor(8 / 255, device=device)
    for shape in ((3, 3, 7, 5), (2, 3, 32, 32), (1, 1)):
        x = torch.rand(shape, generator=random).to(device, dtype)
        x_adv = (x + 8 / 255 * (2 * torch.rand(shape, generator=random).to(device, dtype) - 1)).clamp(0, 1)
        grad = torch.randn(shape, generator=random).to(device, dtype)
        grad.view(-1)[::5] = 0
        grad.view(-1)[0] = float("nan")
        yield x_adv, grad, x, alpha, eps
        yield x_adv.clone(), grad.bfloat16(), x, alpha, eps.double()
    strided = torch.randn(5, 4, 3, generator=random).to(device, dtype)
    yield torch.rand(3, 4, 5, generator=random).to(device, dtype), strided.transpose(0, 2), strided.transpose(0, 2), alpha, eps


def bytes_moved(x_adv: Tensor, grad: Tensor, x: Tensor, *_: Any) -> int:
    return 2 * x_adv.nbytes + grad.nbytes + x.nbytes


OP = Op("linf_step", linf_step, reference, launch, samples, bytes_moved)
