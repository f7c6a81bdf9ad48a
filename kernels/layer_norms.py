"""||v[offsets[l] : offsets[l+1]]||_2 for each segment l of a flat vector: the norms of all layers in one pass.

v [P] of any float dtype, offsets int64 [L+1], rising, on v's device; returns [L] of v's dtype, float32 at least.
Squares add up in float64, in an order that depends on the segment's length and L alone; no atomics. Reads v once
(4 bytes a float32 element); memory-bound. The offsets are never read by the host.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import Op, attach, refuse


def _out_dtype(v: Tensor) -> torch.dtype:
    return torch.promote_types(v.dtype, torch.float32)


def _check(v: Tensor, offsets: Tensor) -> None:
    refuse(
        v.ndim != 1 or not v.is_floating_point() or offsets.ndim != 1 or offsets.dtype != torch.int64 or len(offsets) < 1,
        f"layer_norms: v must be a flat vector of floats and offsets int64 [L+1], "
        f"not {list(v.shape)} {v.dtype} and {list(offsets.shape)} {offsets.dtype}",
    )


def reference(v: Tensor, offsets: Tensor) -> Tensor:
    """See the top of the file. ValueError: v is not a flat vector of floats, or offsets not int64 [L+1]."""
    _check(v, offsets)
    squares = torch.segment_reduce(v.double().square(), "sum", offsets=offsets, axis=0, initial=0.0, unsafe=True)
    return squares.sqrt().to(_out_dtype(v))


layer_norms = torch.library.custom_op("safer_fast::layer_norms", reference, mutates_args=())


@layer_norms.register_fake
def _fake(v: Tensor, offsets: Tensor) -> Tensor:
    _check(v, offsets)
    return v.new_empty(len(offsets) - 1, dtype=_out_dtype(v))


def launch(v: Tensor, offsets: Tensor) -> Tensor:
    raise NotImplementedError


attach(layer_norms, reference, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    for ends, scale in (([5, 5, 1029, 9000], 1.0), ([1], 1e-30), ([40_003, 40_100], 1e30), ([], 1.0)):
        offsets = torch.tensor([0, *ends], device=device)
        v = torch.randn(([0, *ends])[-1], generator=random).to(device, dtype) * scale
        yield v, offsets
        yield v.bfloat16(), offsets
    yield torch.randn(9000, generator=random).to(device, dtype)[::3], torch.tensor([0, 7, 3000], device=device)


def bytes_moved(v: Tensor, offsets: Tensor) -> int:
    return v.nbytes + offsets.nbytes


OP = Op("layer_norms", layer_norms, reference, launch, samples, bytes_moved)
