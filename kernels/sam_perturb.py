"""SAM's perturbation of a flat buffer, written beside the weights: e = rho t² g / (norm + 1e-12).

    t = |w| + eta if adaptive (ASAM, Kwon et al. 2021, eq. 11) else 1

e, w [P] float32 or float64, g [P] of any float dtype, norms [L] (of g, or of t g if adaptive), offsets
int64 [L+1] from 0 to P, rho 0-D. Element i of segment l (offsets[l] <= i < offsets[l+1]) uses norms[l]; a
segment whose norm is not finite gets e = 0. L = 1 is SAM's one norm over everything. Reads g (and w if
adaptive), writes e: 8 or 12 bytes a float32 element; memory-bound. The weights are not touched, so that
nothing has to be restored.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, alike, attach, cdiv, readable, refuse, tl, triton, written

PROGRAMS = 4096  # shared evenly among the segments, as in layer_norms


def _check(e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor) -> None:
    written("sam_perturb", e=e)
    alike("sam_perturb", e=e, g=g, w=w)
    refuse(
        e.ndim != 1 or w.dtype != e.dtype,
        f"sam_perturb: e and w must be flat and of one dtype, not {list(e.shape)} {e.dtype} and {w.dtype}",
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
    factor = scale * (w.abs() + eta).square() if adaptive else scale
    e.copy_(torch.where(scale.isnan(), 0.0, factor * g.to(w.dtype)))


sam_perturb = torch.library.custom_op("safer_fast::sam_perturb", reference, mutates_args=("e",))


@sam_perturb.register_fake
def _fake(
    e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor, rho: Tensor, adaptive: bool, eta: float
) -> None:
    _check(e, g, w, norms, offsets)


@triton.jit
def _perturbed(p_g, p_w, o_, m_, scale, finite, eta, ADAPTIVE: tl.constexpr):
    b_factor = scale
    if ADAPTIVE:
        b_t = tl.abs(tl.load(p_w + o_, mask=m_)) + eta  # [BLOCK]
        b_factor = scale * (b_t * b_t)
    b_g = tl.load(p_g + o_, mask=m_).to(tl.float32)  # [BLOCK]
    return tl.where(finite, b_factor * b_g, 0.0)


@triton.jit
def _kernel(
    p_e, p_g, p_w, p_norms, p_offsets, p_rho, eta, ADAPTIVE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Every SPLIT-th tile of one segment, cut as in layer_norms: whole tiles unmasked, ragged ends by the first."""
    i_segment, i_split = tl.program_id(0), tl.program_id(1)
    lo = tl.load(p_offsets + i_segment)  # []
    hi = tl.load(p_offsets + i_segment + 1)  # []
    norm = tl.load(p_norms + i_segment).to(tl.float32)  # []
    finite = tl.abs(norm) < float("inf")  # false for NaN
    scale = tl.math.div_rn(tl.load(p_rho).to(tl.float32), norm + 1e-12)  # []
    first = (lo + BLOCK - 1) // BLOCK * BLOCK
    last = tl.maximum(hi // BLOCK * BLOCK, first)
    if i_split == 0:
        o_ = lo + tl.arange(0, BLOCK)
        m_ = o_ < tl.minimum(first, hi)
        tl.store(p_e + o_, _perturbed(p_g, p_w, o_, m_, scale, finite, eta, ADAPTIVE), mask=m_)
        o_ = last + tl.arange(0, BLOCK)
        m_ = o_ < hi
        tl.store(p_e + o_, _perturbed(p_g, p_w, o_, m_, scale, finite, eta, ADAPTIVE), mask=m_)
    start = first + i_split * BLOCK
    while start < last:
        o_ = tl.multiple_of(start, BLOCK) + tl.arange(0, BLOCK)
        tl.store(p_e + o_, _perturbed(p_g, p_w, o_, None, scale, finite, eta, ADAPTIVE))
        start += tl.num_programs(1) * BLOCK


def launch(
    e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor, rho: Tensor, adaptive: bool, eta: float
) -> None:
    """The reference in one Triton kernel. ValueError: as the reference, or float64."""
    _check(e, g, w, norms, offsets)
    reads = [readable(e, t) for t in (g, w, norms, offsets, rho)]
    segments, block = len(norms), 1024
    if not segments or not len(e):
        return
    splits = min(cdiv(PROGRAMS, segments), cdiv(len(e), block))
    _kernel[(segments, splits)](e, *reads, eta, ADAPTIVE=adaptive, BLOCK=block, num_warps=4, **ROUNDED)


attach(sam_perturb, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    rho = torch.tensor(0.05, device=device)
    for ends, adaptive in (([5, 5, 1029, 9000], False), ([1], True), ([4099, 4100], True), ([5000], False)):
        w, g = torch.randn(2, ends[-1], generator=random).to(device, dtype).unbind()
        norms = torch.rand(len(ends), generator=random).to(device, dtype) + 0.1
        offsets = torch.tensor([0, *ends], device=device)
        poison = torch.full_like(w, float("nan"))
        yield poison, g, w, norms, offsets, rho, adaptive, 0.01
        spoilt = g.clone()
        spoilt[-1] = float("nan")
        norms = norms.clone()
        norms[-1] = float("inf")
        yield poison.clone(), spoilt.bfloat16(), w, norms, offsets, rho.double(), adaptive, 0.01
    w, g = torch.randn(2, 6002, generator=random).to(device, dtype)[:, ::2].unbind()
    norms, offsets = torch.ones(1, device=device), torch.tensor([0, 3001], device=device)
    yield torch.full_like(w, float("nan")).contiguous(), g, w, norms, offsets, rho, True, 0.0


def bytes_moved(
    e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor, rho: Tensor, adaptive: bool, *_: Any
) -> int:
    return e.nbytes + g.nbytes + (w.nbytes if adaptive else 0)


OP = Op("sam_perturb", sam_perturb, reference, launch, samples, bytes_moved)
