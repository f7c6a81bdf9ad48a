"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random words from a
counter.

A draw depends on its counter and key alone, so an image's noise is the same on every device, in every batch
order and on any number of processes. Words are held in int64, since PyTorch multiplies no unsigned 32-bit
integers.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
CROP = 0xA06  # the stream of gather_augment, away from the attacks' small stream numbers


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Four random words in [0, 2^32) for each counter.

    counter: four int64 tensors (or ints) that broadcast together; key: two; all values in [0, 2^32).
    Returns four int64 tensors of the broadcast shape.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*(torch.as_tensor(c, device=key[0].device) for c in counter))
    k0, k1 = key
    for _ in range(10):
        # The product wraps in int64; its 64 bits are the unsigned product's all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & MASK) ^ c1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = k0 + 0x9E3779B9 & MASK, k1 + 0xBB67AE85 & MASK
    return [c0, c1, c2, c3]


def halves(value: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high 32 bits of int64 values, each as int64 in [0, 2^32)."""
    return value & MASK, value >> 32 & MASK
