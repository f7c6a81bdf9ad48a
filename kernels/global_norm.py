"""||v||_2 of a flat vector, the same bits every time.

v [P] of any float dtype; returns 0-D of v's dtype, float32 at least. Squares add up in float64, in an order
that depends on P alone: two stages, no atomics. Reads v once (4 bytes a float32 element); memory-bound.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, attach, cdiv, readable, refuse, tl, triton

PARTS = 1024  # programs of the first stage: about eight a multiprocessor of the largest GPU


def _out_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _check(v: Tensor) -> None:
    refuse(
        v.ndim != 1 or not v.is_floating_point(),
        f"global_norm: v must be a flat vector of floats, not {list(v.shape)} {v.dtype}",
    )


def reference(v: Tensor) -> Tensor:
    """See the top of the file. ValueError: v is not a flat vector of floats."""
    _check(v)
    return torch.linalg.vector_norm(v, dtype=torch.float64).to(_out_dtype(v))


global_norm = torch.library.custom_op("safer_fast::global_norm", reference, mutates_args=())


@global_norm.register_fake
def _fake(v: Tensor) -> Tensor:
    _check(v)
    return v.new_empty((), dtype=_out_dtype(v))


@triton.jit
def _parts_kernel(p_v, p_part, n, TILES: tl.constexpr, BLOCK: tl.constexpr):
    i_part = tl.program_id(0)
    b_sum = tl.zeros([BLOCK], dtype=tl.float64)
    for i_tile in range(TILES):
        o_ = (i_part.to(tl.int64) * TILES + i_tile) * BLOCK + tl.arange(0, BLOCK)
        b_v = tl.load(p_v + o_, mask=o_ < n, other=0.0).to(tl.float64)  # [BLOCK]
        b_sum += b_v * b_v
    tl.store(p_part + i_part, tl.sum(b_sum, axis=0))


@triton.jit
def _finish_kernel(p_part, p_norm, n_parts, PARTS: tl.constexpr):
    o_ = tl.arange(0, PARTS)
    b_part = tl.load(p_part + o_, mask=o_ < n_parts, other=0.0)  # [PARTS]
    tl.store(p_norm, tl.sqrt(tl.sum(b_part, axis=0)).to(tl.float32))


def launch(v: Tensor) -> Tensor:
    """The reference in two Triton kernels. ValueError: as the reference, or float64."""
    _check(v)
    v = readable(v, v)
    norm = v.new_zeros((), dtype=torch.float32)
    if not len(v):
        return norm
    block = 2048
    tiles = cdiv(len(v), block * PARTS)
    n_parts = cdiv(len(v), block * tiles)
    part = v.new_empty(n_parts, dtype=torch.float64)
    _parts_kernel[(n_parts,)](v, part, len(v), TILES=tiles, BLOCK=block, num_warps=8, **ROUNDED)
    _finish_kernel[(1,)](part, norm, n_parts, PARTS=PARTS, num_warps=4, **ROUNDED)
    return norm


attach(global_norm, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    for n, scale in ((1, 1.0), (1027, 1e-30), (70_001, 1e30), (0, 1.0)):
        v = torch.randn(n, generator=random).to(device, dtype) * scale
        yield (v,)
    yield (torch.randn(4099, generator=random).to(device).bfloat16(),)
    yield (torch.randn(4099, generator=random).to(device, dtype)[::3],)


def bytes_moved(v: Tensor) -> int:
    return v.nbytes


OP = Op("global_norm", global_norm, reference, launch, samples, bytes_moved)
