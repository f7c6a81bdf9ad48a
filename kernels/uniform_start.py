"""The random start of an attack: out = clamp(x + eps (2u - 1), low, high), u uniform in [0, 1).

    counter = (j // 4, id_lo, id_hi, stream), key = (seed_lo, seed_hi); element j of an image takes word j % 4
    u = (word >> 8) 2^-24

x [B, ...] float32 or float64, ids int64 [B] (what names an image, not its place in the batch), seed int64
0-D, eps 0-D of any float dtype. Reads x, ids and two scalars, writes a new contiguous tensor like x: 8
bytes a float32 pixel. About 60 integer operations a pixel: near the balance of memory and compute.

u and 2u - 1 are exact in float32; the product and the sum round once each, so the bits are the same on
every device.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, attach, cdiv, readable, refuse, tl, triton
from safer_fast.kernels.philox import MASK, halves, philox


def _check(x: Tensor, ids: Tensor) -> None:
    refuse(
        x.dtype not in (torch.float32, torch.float64),
        f"uniform_start: x is {x.dtype}; pixels under attack are float32 (or float64)",
    )
    refuse(
        ids.dtype != torch.int64 or ids.ndim != 1 or x.ndim < 1 or len(ids) != len(x),
        f"uniform_start: ids must be int64 [{x.shape[0] if x.ndim else '?'}], one for each image, "
        f"not {ids.dtype} {list(ids.shape)}",
    )


def reference(x: Tensor, ids: Tensor, seed: Tensor, eps: Tensor, stream: int, low: float, high: float) -> Tensor:
    """See the top of the file. ValueError: ids is not int64 [B], or x neither float32 nor float64."""
    _check(x, ids)
    flat_BD = x.reshape(len(x), x[:1].numel())
    counters = torch.arange((flat_BD.shape[1] + 3) // 4, device=x.device)
    id_lo, id_hi = halves(ids[:, None])
    words = philox((counters, id_lo, id_hi, stream & MASK), halves(seed))
    word_BD = torch.stack(words, dim=-1).flatten(1)[:, : flat_BD.shape[1]]
    signed_u = (word_BD >> 8).to(x.dtype) * 2.0**-23 - 1
    return (flat_BD + eps.to(x.dtype) * signed_u).clamp(low, high).view(x.shape)


uniform_start = torch.library.custom_op("safer_fast::uniform_start", reference, mutates_args=())


@uniform_start.register_fake
def _fake(x: Tensor, ids: Tensor, seed: Tensor, eps: Tensor, stream: int, low: float, high: float) -> Tensor:
    _check(x, ids)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@triton.jit
def _kernel(
    p_out, p_x, p_ids, p_seed, p_eps, D, stream, low, high, BLOCK: tl.constexpr
):  # fmt: skip
    """BLOCK counters of one image, four pixels each."""
    i_image, i_tile = tl.program_id(0), tl.program_id(1)
    image = tl.load(p_ids + i_image)  # []
    seed = tl.load(p_seed)  # []
    eps = tl.load(p_eps).to(tl.float32)  # []
    b_counter = (i_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.uint32)
    b_0 = tl.zeros([BLOCK], dtype=tl.uint32)
    b_lo, b_hi = b_0 + image.to(tl.uint32), b_0 + (image >> 32).to(tl.uint32)
    b_w0, b_w1, b_w2, b_w3 = tl.philox(seed, b_counter, b_lo, b_hi, (b_0 + stream).to(tl.uint32))
    b_word = tl.interleave(tl.interleave(b_w0, b_w2), tl.interleave(b_w1, b_w3))  # [4 BLOCK]: w0 w1 w2 w3 w0 …
    b_signed = (b_word >> 8).to(tl.float32) * 1.1920928955078125e-07 - 1.0  # 2^-23
    o_ = i_tile * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    m_ = o_ < D
    o_ = i_image.to(tl.int64) * D + o_
    b_out = tl.load(p_x + o_, mask=m_) + eps * b_signed  # [4 BLOCK]
    b_out = tl.maximum(b_out, low, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_out + o_, tl.minimum(b_out, high, propagate_nan=tl.PropagateNan.ALL), mask=m_)


def launch(x: Tensor, ids: Tensor, seed: Tensor, eps: Tensor, stream: int, low: float, high: float) -> Tensor:
    """The reference in one Triton kernel. ValueError: as the reference, or float64."""
    _check(x, ids)
    x, ids, seed, eps = (readable(x, t) for t in (x, ids, seed, eps))
    out, block = torch.empty_like(x), 256
    if x.numel():
        D = x[0].numel()
        _kernel[(len(x), cdiv(D, 4 * block))](
            out, x, ids, seed, eps, D, stream, low, high, BLOCK=block, num_warps=4, **ROUNDED
        )
    return out


attach(uniform_start, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    for shape, stream in (((3, 3, 7, 5), 0), ((2, 3, 32, 32), 1), ((5, 1), 2)):
        x = torch.rand(shape, generator=random).to(device, dtype)
        ids = torch.randint(-(2**40), 2**40, shape[:1], generator=random).to(device)
        eps = torch.tensor(8 / 255, device=device)
        yield x, ids, torch.tensor(seed + (7 << 40), device=device), eps, stream, 0.0, 1.0
    strided = torch.rand(10, 3, generator=random).to(device, dtype).t()[:, ::2]
    yield strided, ids[:3], torch.tensor(-1, device=device), eps, 3, -1.0, 2.0
    yield x[:0], ids[:0], torch.tensor(1, device=device), eps, 3, 0.0, 1.0


def bytes_moved(x: Tensor, ids: Tensor, *_: Any) -> int:
    return 2 * x.nbytes + ids.nbytes


OP = Op("uniform_start", uniform_start, reference, launch, samples, bytes_moved)
