"""SAM's perturbation of a flat buffer, written beside the weights: e = rho t² g / (norm + 1e-12).

    t = |w| + eta if adaptive (ASAM, Kwon et al. 2021, eq. 11) else 1

e, w [P] float32 or float64, g [P] of any float dtype, norms [L] (of g, or of t g if adaptive), offsets int64 [L+1],
rho 0-D. Element i of segment l (offsets[l] <= i < offsets[l+1]) uses norms[l]; a segment whose norm is not finite gets
e = 0. L = 1 is SAM's one norm over everything. Reads g (and w if adaptive), writes e: 8 or 12 bytes a float32 element;
memory-bound. The weights are not touched, so that nothing has to be restored.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import Op, attach, refuse, writable


def _check(e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor) -> None:
    writable("sam_perturb", e=e)
    refuse(
        e.ndim != 1 or not e.shape == g.shape == w.shape or w.dtype != e.dtype or not g.is_floating_point(),
        f"sam_perturb: e, g and w must be flat and of one length, and w of e's dtype; they are {list(e.shape)} {e.dtype}, "
        f"{list(g.shape)} {g.dtype}, {list(w.shape)} {w.dtype}",
    )
    refuse(
        norms.ndim != 1 or offsets.ndim != 1 or offsets.dtype != torch.int64 or len(offsets) != len(norms) + 1,
        f"sam_perturb: norms must be [L] and offsets int64 [L+1], "
        f"not {list(norms.shape)} and {list(offsets.shape)} {offsets.dtype}",
    )


def reference(
    e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor, rho: Tensor, adaptive: bool, eta: float
) -> None:
    """See the top of the file. ValueError: shapes or dtypes do not fit, or e is not contiguous."""
    _check(e, g, w, norms, offsets)
    norms, rho = norms.to(w.dtype), rho.to(w.dtype)
    scale = torch.where(norms.isfinite(), rho / (norms + 1e-12), float("nan"))
    scale = scale.repeat_interleave(offsets.diff(), output_size=len(e))
    if adaptive:
        t = w.abs() + eta
        moved = scale * (t * t) * g.to(w.dtype)
    else:
        moved = scale * g.to(w.dtype)
    e.copy_(torch.where(scale.isnan(), 0.0, moved))


sam_perturb = torch.library.custom_op("safer_fast::sam_perturb", reference, mutates_args=("e",))


@sam_perturb.register_fake
def _fake(
    e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor, rho: Tensor, adaptive: bool, eta: float
) -> None:
    _check(e, g, w, norms, offsets)


def launch(
    e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor, rho: Tensor, adaptive: bool, eta: float
) -> None:
    raise NotImplementedError


attach(sam_perturb, reference, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    rho = torch.tensor(0.05, device=device)
    for ends, adaptive in (([5, 5, 1029, 9000], False), ([1], True), ([4099, 4100], True), ([5000], False)):
        n = ends[-1]
        w, g = (torch.randn(n, generator=random).to(device, dtype) for _ in range(2))
        norms = torch.rand(len(ends), generator=random).to(device, dtype) + 0.1
        offsets = torch.tensor([0, *ends], device=device)
        yield torch.full_like(w, float("nan")), g, w, norms, offsets, rho, adaptive, 0.01
        norms = norms.clone()
        norms[-1] = float("inf")
        g[-1] = float("nan")
        yield torch.full_like(w, float("nan")), g.bfloat16(), w, norms, offsets, rho.double(), adaptive, 0.01
    w, g = torch.randn(2, 3001, generator=random).to(device, dtype).repeat_interleave(2, dim=1)[:, ::2]
    norms, offsets = torch.ones(1, device=device), torch.tensor([0, 3001], device=device)
    yield torch.full_like(w, float("nan")).contiguous(), g, w, norms, offsets, rho, True, 0.0


def bytes_moved(e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor, rho: Tensor, adaptive: bool, *_: Any) -> int:
    return e.nbytes + g.nbytes + (w.nbytes if adaptive else 0)


OP = Op("sam_perturb", sam_perturb, reference, launch, samples, bytes_moved)
