"""||v||_2 of a flat vector, the same bits every time.

v [P] of any float dtype; returns 0-D of v's dtype, float32 at least. Squares add up in float64, in an order that
depends on P alone: two stages, no atomics. Reads v once (4 bytes a float32 element); memory-bound.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import Op, attach, refuse


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


def launch(v: Tensor) -> Tensor:
    raise NotImplementedError


attach(global_norm, reference, reference)


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
