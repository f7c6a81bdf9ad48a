"""||v[offsets[l] : offsets[l+1]]||_2 of each segment l of a flat vector: the norms of all layers in one pass.

v [P] of any float dtype, offsets int64 [L+1], rising, on v's device; returns [L] of v's dtype, float32 at
least. Squares add up in float64, in an order that depends on P and the offsets alone; no atomics. Reads v
once (4 bytes a float32 element); memory-bound. The host never reads the offsets.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, attach, cdiv, readable, refuse, tl, triton

PROGRAMS = 4096  # shared evenly among the segments; a short segment leaves most of its own idle


def _out_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _check(v: Tensor, offsets: Tensor) -> None:
    refuse(
        v.ndim != 1
        or not v.is_floating_point()
        or offsets.ndim != 1
        or offsets.dtype != torch.int64
        or not len(offsets),
        f"layer_norms: v must be a flat vector of floats and offsets int64 [L+1], "
        f"not {list(v.shape)} {v.dtype} and {list(offsets.shape)} {offsets.dtype}",
    )


def reference(v: Tensor, offsets: Tensor) -> Tensor:
    """See the top of the file. ValueError: v is not a flat vector of floats, or offsets not int64 [L+1]."""
    _check(v, offsets)
    squares = v.double().square()
    sums = torch.segment_reduce(squares, "sum", offsets=offsets, axis=0, initial=0.0, unsafe=True)
    return sums.sqrt().to(_out_dtype(v))


layer_norms = torch.library.custom_op("safer_fast::layer_norms", reference, mutates_args=())


@layer_norms.register_fake
def _fake(v: Tensor, offsets: Tensor) -> Tensor:
    _check(v, offsets)
    return v.new_empty(len(offsets) - 1, dtype=_out_dtype(v))


@triton.jit
def _parts_kernel(p_v, p_offsets, p_part, BLOCK: tl.constexpr):
    """Every SPLIT-th tile of one segment. Tiles start at multiples of BLOCK, so that whole ones need no mask and are
    read 128 bits at a time wherever the segment begins; the ragged ends belong to the first program."""
    i_segment, i_split = tl.program_id(0), tl.program_id(1)
    lo = tl.load(p_offsets + i_segment)  # []
    hi = tl.load(p_offsets + i_segment + 1)  # []
    first = (lo + BLOCK - 1) // BLOCK * BLOCK
    last = tl.maximum(hi // BLOCK * BLOCK, first)
    b_sum = tl.zeros([BLOCK], dtype=tl.float64)
    if i_split == 0:
        o_ = lo + tl.arange(0, BLOCK)
        b_v = tl.load(p_v + o_, mask=o_ < tl.minimum(first, hi), other=0.0).to(tl.float64)  # [BLOCK]
        b_sum += b_v * b_v
        o_ = last + tl.arange(0, BLOCK)
        b_v = tl.load(p_v + o_, mask=o_ < hi, other=0.0).to(tl.float64)  # [BLOCK]
        b_sum += b_v * b_v
    start = first + i_split * BLOCK
    while start < last:
        start = tl.multiple_of(start, BLOCK)
        b_v = tl.load(p_v + start + tl.arange(0, BLOCK)).to(tl.float64)  # [BLOCK]
        b_sum += b_v * b_v
        start += tl.num_programs(1) * BLOCK
    tl.store(p_part + i_segment * tl.num_programs(1) + i_split, tl.sum(b_sum, axis=0))


@triton.jit
def _finish_kernel(p_part, p_norms, n_splits, SPLITS: tl.constexpr):
    i_segment = tl.program_id(0)
    o_ = tl.arange(0, SPLITS)
    b_part = tl.load(p_part + i_segment * n_splits + o_, mask=o_ < n_splits, other=0.0)  # [SPLITS]
    tl.store(p_norms + i_segment, tl.sqrt(tl.sum(b_part, axis=0)).to(tl.float32))


def launch(v: Tensor, offsets: Tensor) -> Tensor:
    """The reference in two Triton kernels. ValueError: as the reference, or float64."""
    _check(v, offsets)
    v, offsets = readable(v, v), readable(v, offsets)
    segments, block = len(offsets) - 1, 1024
    norms = v.new_empty(segments, dtype=torch.float32)
    if not segments:
        return norms
    splits = max(1, min(cdiv(PROGRAMS, segments), cdiv(len(v), block)))
    part = v.new_empty(segments, splits, dtype=torch.float64)
    _parts_kernel[(segments, splits)](v, offsets, part, BLOCK=block, num_warps=4, **ROUNDED)
    power = 1 << (splits - 1).bit_length()
    _finish_kernel[(segments,)](part, norms, splits, SPLITS=power, num_warps=4, **ROUNDED)
    return norms


attach(layer_norms, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    for ends, scale in (([5, 5, 1029, 9000], 1.0), ([1], 1e-30), ([40_003, 40_100], 1e30), ([], 1.0)):
        offsets = torch.tensor([0, *ends], device=device)
        v = torch.randn(([0, *ends])[-1], generator=random).to(device, dtype) * scale
        yield v, offsets
        yield v.bfloat16(), offsets
    strided = torch.randn(9000, generator=random).to(device, dtype)[::3]
    yield strided, torch.tensor([0, 7, 3000], device=device)


def bytes_moved(v: Tensor, offsets: Tensor) -> int:
    return v.nbytes + offsets.nbytes


OP = Op("layer_norms", layer_norms, reference, launch, samples, bytes_moved)
