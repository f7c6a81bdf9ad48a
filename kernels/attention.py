"""Self-attention on the output of one qkv product, as a vision transformer has it, and its gradient.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2];   probs = softmax(q kᵀ / sqrt(d));   out = probs v

qkv [B, N, 3, H, d] float32 or float64; out [B, N, H d], probs [B, H, N, M] with M = N rounded up to 16 and zeros
beyond N, for whole vectors. No mask, no dropout; probs is for the gradient and has none itself.

    dv = probsᵀ g;   ds = probs (g vᵀ - Σ probs (g vᵀ));   dq = ds k / sqrt(d);   dk = dsᵀ q / sqrt(d)

g [B, N, H d]; dqkv like qkv. It cannot be differentiated again. In C++ an image's result does not depend on the other
images, nor on the number of threads. Reads qkv, writes out and probs: 4 (4 H d + H M) bytes a float32 token;
compute-bound. For the CPU, where F.scaled_dot_product_attention wants q, k and v laid out anew; on a GPU that is
the faster one.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from safer_fast.kernels.op import Op, refuse

WIDTH = 16  # float32 in the longest vector; csrc/cpu/attention.cpp


def _check(qkv: Tensor) -> None:
    refuse(
        qkv.dtype not in (torch.float32, torch.float64),
        f"attention: qkv is {qkv.dtype}; it must be float32 (or float64); "
        "F.scaled_dot_product_attention takes lower precision",
    )
    refuse(
        qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] < 1,
        f"attention: qkv must be [B, N, 3, H, d], not {list(qkv.shape)}",
    )


def _check_backward(g: Tensor, qkv: Tensor, probs: Tensor) -> None:
    _check(qkv)
    B, N, _, H, d = qkv.shape
    refuse(
        g.shape != (B, N, H * d) or probs.shape != (B, H, N, N + -N % WIDTH),
        f"attention_backward: g {list(g.shape)} and probs {list(probs.shape)} do not belong to qkv {list(qkv.shape)}",
    )
    refuse(
        not g.dtype == probs.dtype == qkv.dtype,
        f"attention_backward: g, qkv, probs are {g.dtype}, {qkv.dtype}, {probs.dtype}; give them one dtype",
    )


def reference(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """See the top of the file. ValueError: qkv is not [B, N, 3, H, d], or neither float32 nor float64."""
    _check(qkv)
    B, N, _, H, d = qkv.shape
    q_BHNd, k_BHNd, v_BHNd = qkv.permute(2, 0, 3, 1, 4)
    with torch.autocast(qkv.device.type, enabled=False):
        probs_BHNN = (q_BHNd @ k_BHNd.mT * d**-0.5).softmax(dim=-1)
        out_BHNd = probs_BHNN @ v_BHNd
    return out_BHNd.transpose(1, 2).reshape(B, N, H * d), F.pad(probs_BHNN, (0, -N % WIDTH))


def reference_backward(g: Tensor, qkv: Tensor, probs: Tensor) -> Tensor:
    """See the top of the file. ValueError: shapes do not belong together, or dtypes differ."""
    _check_backward(g, qkv, probs)
    B, N, _, H, d = qkv.shape
    q_BHNd, k_BHNd, v_BHNd = qkv.permute(2, 0, 3, 1, 4)
    g_BHNd, probs_BHNN = g.view(B, N, H, d).transpose(1, 2), probs[..., :N]
    with torch.autocast(qkv.device.type, enabled=False):
        dprobs_BHNN = g_BHNd @ v_BHNd.mT
        ds_BHNN = probs_BHNN * (dprobs_BHNN - (probs_BHNN * dprobs_BHNN).sum(dim=-1, keepdim=True)) * d**-0.5
        dqkv = (ds_BHNN @ k_BHNd, ds_BHNN.mT @ q_BHNd, probs_BHNN.mT @ g_BHNd)
    return torch.stack(dqkv).permute(1, 3, 0, 2, 4).contiguous()


attention = torch.library.custom_op("safer_fast::attention", reference, mutates_args=())
attention_backward = torch.library.custom_op("safer_fast::attention_backward", reference_backward, mutates_args=())


@attention.register_fake
def _fake(qkv: Tensor) -> tuple[Tensor, Tensor]:
    _check(qkv)
    B, N, _, H, d = qkv.shape
    return qkv.new_empty((B, N, H * d)), qkv.new_empty((B, H, N, N + -N % WIDTH))


@attention_backward.register_fake
def _fake_backward(g: Tensor, qkv: Tensor, probs: Tensor) -> Tensor:
    _check_backward(g, qkv, probs)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
    return attention_backward(g, *ctx.saved_tensors)


attention.register_autograd(_backward, setup_context=_keep)


def samples(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed)
    shapes = (
        (2, 5, 3, 3, 7),
        (3, 65, 3, 3, 64),
        (1, 1, 3, 1, 16),
        (1, 197, 3, 1, 32),
        (2, 17, 3, 2, 20),
        (0, 5, 3, 3, 7),
    )
    for shape in shapes:
        yield (torch.randn(shape, generator=random).to(device, dtype) * 2,)
    yield (torch.randn(2, 9, 2, 3, 16, generator=random).to(device, dtype).transpose(2, 3),)


def samples_backward(device: torch.device | str, dtype: torch.dtype, seed: int) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(seed + 1)
    for (qkv,) in samples(device, dtype, seed):
        out, probs = reference(qkv)
        yield torch.randn(out.shape, generator=random).to(device, dtype), qkv, probs
    yield torch.randn(1, generator=random).to(device, dtype).expand_as(out), qkv, probs


def bytes_moved(qkv: Tensor) -> int:
    B, N, _, H, d = qkv.shape
    return qkv.nbytes + (B * N * H * d + B * H * N * (N + -N % WIDTH)) * qkv.element_size()


def bytes_moved_backward(g: Tensor, qkv: Tensor, probs: Tensor) -> int:
    return g.nbytes + 2 * qkv.nbytes + probs.nbytes


OP = Op("attention", attention, reference, None, samples, bytes_moved)
BACKWARD = Op(
    "attention_backward", attention_backward, reference_backward, None, samples_backward, bytes_moved_backward
)
