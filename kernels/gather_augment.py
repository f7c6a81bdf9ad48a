"""A training batch out of a data set in memory: gather, random crop after zero padding, random horizontal
flip.

    w0, w1, w2 = Philox words of counter (0, id_lo, id_hi, 0xA06) and key (seed_lo, seed_hi)
    dy = w0 (2 pad + 1) >> 32,  dx = w1 (2 pad + 1) >> 32      the crop's corner in the padded image
    flipped = flip and w2 & 1;   pixel = uint8 / 255, correctly rounded;   outside the image 0

data uint8 [N, C, H, W], index int64 [B] (which images), ids int64 [B] (what names each draw), seed int64
0-D; returns float32 [B, C, H, W] in [0, 1], the same bits on every device. pad = 0 without flip is plain
loading. Reads one byte and writes four a pixel; memory-bound. On a GPU an index outside the data gives NaN
pixels, since the host never looks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from safer_fast.kernels.op import ROUNDED, Op, attach, cdiv, readable, refuse, tl, triton
from safer_fast.kernels.philox import CROP, halves, philox


def _check(data: Tensor, index: Tensor, ids: Tensor, pad: int) -> None:
    refuse(
        data.dtype != torch.uint8 or data.ndim != 4,
        f"gather_augment: data must be uint8 [N, C, H, W], not {data.dtype} {list(data.shape)}",
    )
    refuse(
        index.dtype != torch.int64 or ids.dtype != torch.int64 or index.ndim != 1 or index.shape != ids.shape,
        f"gather_augment: index and ids must be int64 [B], not {index.dtype} {list(index.shape)} "
        f"and {ids.dtype} {list(ids.shape)}",
    )
    refuse(pad < 0, f"gather_augment: pad={pad}: padding is 0 or more; 0 turns the crop off")


def reference(data: Tensor, index: Tensor, ids: Tensor, seed: Tensor, pad: int, flip: bool) -> Tensor:
    """See the top of the file. ValueError: shapes or dtypes do not fit, pad < 0; IndexError: index outside."""
    _check(data, index, ids, pad)
    _, _, H, W = data.shape
    id_lo, id_hi = halves(ids)
    w0, w1, w2, _ = philox((0, id_lo, id_hi, CROP), halves(seed))
    dy, dx = w0 * (2 * pad + 1) >> 32, w1 * (2 * pad + 1) >> 32
    rows_BH = dy[:, None] + torch.arange(H, device=data.device)
    cols_BW = torch.arange(W, device=data.device).expand(len(ids), W)
    if flip:
        cols_BW = torch.where((w2 & 1).bool()[:, None], W - 1 - cols_BW, cols_BW)
    cols_BW = cols_BW + dx[:, None]
    padded_BCHW = torch.nn.functional.pad(data.index_select(0, index), (pad, pad, pad, pad))
    images = torch.arange(len(ids), device=data.device)
    crop_BHWC = padded_BCHW[images[:, None, None], :, rows_BH[:, :, None], cols_BW[:, None, :]]
    # By a tensor: CUDA turns division by a Python number into a multiplication, which rounds otherwise.
    return crop_BHWC.permute(0, 3, 1, 2).contiguous() / torch.full((), 255.0, device=data.device)


gather_augment = torch.library.custom_op("safer_fast::gather_augment", reference, mutates_args=())


@gather_augment.register_fake
def _fake(data: Tensor, index: Tensor, ids: Tensor, seed: Tensor, pad: int, flip: bool) -> Tensor:
    _check(data, index, ids, pad)
    return data.new_empty((len(index), *data.shape[1:]), dtype=torch.float32)


@triton.jit
def _kernel(
    p_out, p_data, p_index, p_ids, p_seed, N, C, H, W, s_image, s_channel, s_row, s_col,
    PAD: tl.constexpr, FLIP: tl.constexpr, CROP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_image = tl.program_id(0)
    image = tl.load(p_ids + i_image)  # []
    zero = tl.full([], 0, tl.uint32)
    w0, w1, w2, _ = tl.philox(tl.load(p_seed), zero, image.to(tl.uint32), (image >> 32).to(tl.uint32), zero + CROP)
    dy = tl.umulhi(w0, zero + (2 * PAD + 1)).to(tl.int32)
    dx = tl.umulhi(w1, zero + (2 * PAD + 1)).to(tl.int32)
    o_ = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_ = o_ < C * H * W
    b_col, b_row, b_channel = o_ % W, o_ // W % H, o_ // W // H
    if FLIP:
        b_col = tl.where((w2 & 1) == 1, W - 1 - b_col, b_col)
    b_col, b_row = b_col + dx - PAD, b_row + dy - PAD
    source = tl.load(p_index + i_image)  # []
    known = (source >= 0) & (source < N)
    m_inside = m_ & (b_row >= 0) & (b_row < tl.where(known, H, 0)) & (b_col >= 0) & (b_col < W)
    p_pixel = p_data + source * s_image + b_channel * s_channel + b_row * s_row + b_col * s_col
    b_byte = tl.load(p_pixel, mask=m_inside, other=0)  # [BLOCK]
    b_pixel = tl.math.div_rn(b_byte.to(tl.float32), 255.0)
    p_row = p_out + i_image.to(tl.int64) * (C * H * W)
    tl.store(p_row + o_, tl.where(known, b_pixel, float("nan")), mask=m_)


def launch(data: Tensor, index: Tensor, ids: Tensor, seed: Tensor, pad: int, flip: bool) -> Tensor:
    """The reference in one Triton kernel. ValueError: as the reference."""
    _check(data, index, ids, pad)
    index, ids, seed = (readable(data, t) for t in (index, ids, seed))  # the data set keeps its strides: no copy
    N, C, H, W = data.shape
    out, block = data.new_empty((len(index), C, H, W), dtype=torch.float32), 1024
    if out.numel():
        _kernel[(len(index), cdiv(C * H * W, block))](
            out, data, index, ids, seed, N, C, H, W, *data.stride(),
            PAD=pad, FLIP=flip, CROP=CROP, BLOCK=block, num_warps=4, **ROUNDED,
        )  # fmt: skip
    return out


attach(gather_augment, launch, reference)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    """`dtype` changes nothing: the op reads uint8 and writes float32."""
    random = torch.Generator().manual_seed(seed)
    for shape, pad, flip in (((9, 3, 7, 5), 2, True), ((4, 1, 8, 8), 4, True), ((5, 3, 32, 32), 0, False)):
        data = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8).to(device)
        index = torch.randint(0, shape[0], (6,), generator=random).to(device)
        ids = torch.randint(-(2**40), 2**40, (6,), generator=random).to(device)
        yield data, index, ids, torch.tensor(seed + (3 << 33), device=device), pad, flip
    yield data, index[:0], ids[:0], torch.tensor(1, device=device), 1, True
    yield data.transpose(2, 3)[:, :2], index[::2], ids[::2], torch.tensor(-5, device=device), 1, True


def bytes_moved(data: Tensor, index: Tensor, ids: Tensor, *_: Any) -> int:
    return len(index) * data[0].numel() * 5 + index.nbytes + ids.nbytes


OP = Op("gather_augment", gather_augment, reference, launch, samples, bytes_moved)
