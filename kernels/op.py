"""What every op file is made of: the record, the one import of Triton, and the sentences that refuse bad
tensors."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Triton 3.9 warns while this is unset, since its default will change. "1" is today's default, so that the kernels
# of torch.compile stay what they were; ours ask for no fusion themselves (ROUNDED), to round as the references do.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:  # macOS, Windows: the references and the C++ kernels remain
    HAVE_TRITON = False

    class _Absent:
        """Lets a kernel be defined, as text that nobody compiles, where Triton does not exist."""

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, function: Any = None, **_: Any) -> Any:
            return function

    triton = tl = _Absent()

__all__ = [
    "HAVE_TRITON", "ROUNDED", "Op", "alike", "attach", "cdiv", "contiguous", "readable", "refuse", "tl", "triton",
    "written",
]  # fmt: skip

# a * b + c rounds twice, as in the references: contracted to an FMA, a pixel would differ between devices.
ROUNDED: dict[str, Any] = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Op:
    """One op and its twins.

    run           the op itself: C++ on the CPU where built, Triton on CUDA, else the reference
    reference     ten lines of PyTorch, in place where the op is in place
    triton        the Triton launcher, or None; tests call it on CPU tensors in Triton's interpreter
    samples       (device, dtype, seed) -> argument tuples, with odd sizes on purpose
    bytes_moved   the same arguments -> bytes read and written, each tensor once
    onednn        for an op that can use it: whether oneDNN does the float32 work on the CPU
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    triton: Callable[..., Any] | None
    samples: Callable[[torch.device | str, torch.dtype, int], Iterator[tuple[Any, ...]]]
    bytes_moved: Callable[..., int]
    onednn: Callable[[], bool] | None = None


def attach(run: Any, launch: Callable[..., Any], reference: Callable[..., Any]) -> None:
    """Register the launcher for CUDA; the first argument's dtype decides, and float64 goes to the reference."""
    if not HAVE_TRITON:
        return

    def on_cuda(*args: Any) -> Any:
        with torch.cuda.device(args[0].device):  # Triton launches on the current device, whatever its arguments'
            return (reference if args[0].dtype == torch.float64 else launch)(*args)

    run.register_kernel("cuda")(on_cuda)


def cdiv(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def refuse(condition: bool, sentence: str) -> None:
    """Raise ValueError(sentence) where `condition` holds."""
    if condition:
        raise ValueError(sentence)


def written(op: str, **tensors: Tensor) -> None:
    """Refuse what cannot be written in place: other dtypes than float32 and float64, gaps between elements."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: {name} is {tensor.dtype}; it must be float32 (or float64), which small steps need")
        contiguous(op, name, tensor)


def contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Refuse gaps between the elements of a tensor that is written in place."""
    if not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} is written in place and must be contiguous; call .contiguous() on it first")


def alike(op: str, **tensors: Tensor) -> None:
    """Refuse tensors that are not floats of one shape."""
    first = next(iter(tensors.values()))
    if any(t.shape != first.shape or not t.is_floating_point() for t in tensors.values()):
        raise ValueError(
            f"{op}: {', '.join(tensors)} must be floats of one shape; they are "
            + ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors.values())
        )


def readable(like: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` as a Triton kernel wants it: contiguous, on the device of `like`; float64 data is refused."""
    refuse(like.dtype == torch.float64, "the Triton kernels take float32; float64 is for the references")
    refuse(
        tensor.device != like.device,
        f"an op on {like.device} was given a tensor on {tensor.device}; move it there first",
    )
    return tensor if tensor.is_contiguous() else tensor.contiguous()
