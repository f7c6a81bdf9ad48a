"""The one door into kernels/: every op as a plain callable, its record in `ALL`, and what runs it here.

An op runs as C++ on the CPU where `safer_fast._C` is built (csrc/), as a Triton kernel on a GPU, and
everywhere else as its reference: ten lines of PyTorch in the op's file, whose docstring gives formula,
shapes, dtypes and what it raises. `linear` and `attention` are for the CPU and have no Triton kernel.
"""

import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from safer_fast.kernels import adamw_update as _adamw_update
from safer_fast.kernels import attention as _attention
from safer_fast.kernels import gather_augment as _gather_augment
from safer_fast.kernels import global_norm as _global_norm
from safer_fast.kernels import l2_step as _l2_step
from safer_fast.kernels import layer_norms as _layer_norms
from safer_fast.kernels import linear as _linear
from safer_fast.kernels import linf_step as _linf_step
from safer_fast.kernels import sam_perturb as _sam_perturb
from safer_fast.kernels import sgd_update as _sgd_update
from safer_fast.kernels import uniform_start as _uniform_start
from safer_fast.kernels.op import HAVE_TRITON, Op

ALL: list[Op] = [
    _uniform_start.OP,
    _linf_step.OP,
    _l2_step.OP,
    _global_norm.OP,
    _layer_norms.OP,
    _sam_perturb.OP,
    _sgd_update.OP,
    _adamw_update.OP,
    _gather_augment.OP,
    _linear.OP,
    _attention.OP,
    _attention.BACKWARD,
]
_BY_NAME = {op.name: op for op in ALL}

uniform_start = _uniform_start.uniform_start
global_norm = _global_norm.global_norm
layer_norms = _layer_norms.layer_norms
gather_augment = _gather_augment.gather_augment
linear = _linear.linear
attention = _attention.attention
attention_backward = _attention.attention_backward


def _no_tape(op: str, **written: Tensor | None) -> None:
    """PyTorch's own in-place ops refuse a leaf that requires grad; a custom op would write it without a word."""
    if torch.is_grad_enabled():
        for name, tensor in written.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(f"{op} writes {name}, which requires grad; call it under torch.no_grad()")


def linf_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    """One L∞ step of PGD, in place: kernels/linf_step.py. RuntimeError: x_adv requires grad while grad is enabled."""
    _no_tape("linf_step", x_adv=x_adv)
    _linf_step.linf_step(x_adv, grad, x, alpha, eps)


def l2_step(x_adv: Tensor, grad: Tensor, x: Tensor, alpha: Tensor, eps: Tensor) -> None:
    """One L2 step of PGD, in place: kernels/l2_step.py. RuntimeError: x_adv requires grad while grad is enabled."""
    _no_tape("l2_step", x_adv=x_adv)
    _l2_step.l2_step(x_adv, grad, x, alpha, eps)


def sam_perturb(
    e: Tensor, g: Tensor, w: Tensor, norms: Tensor, offsets: Tensor, rho: Tensor, adaptive: bool, eta: float
) -> None:
    """SAM's perturbation, written to e: kernels/sam_perturb.py. RuntimeError: e requires grad while grad is enabled."""
    _no_tape("sam_perturb", e=e)
    _sam_perturb.sam_perturb(e, g, w, norms, offsets, rho, adaptive, eta)


def sgd_update(
    w: Tensor, m: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, lr: Tensor,
    max_norm: float, momentum: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """One clipped SGD step, in place: kernels/sgd_update.py. RuntimeError: a written tensor is on the autograd tape."""
    _no_tape("sgd_update", w=w, m=m, copy=copy)
    _sgd_update.sgd_update(w, m, copy, g, norm, lr, max_norm, momentum, weight_decay, nesterov)


def adamw_update(
    w: Tensor, m: Tensor, v: Tensor, copy: Tensor | None, g: Tensor, norm: Tensor, step: Tensor, lr: Tensor,
    max_norm: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One clipped AdamW step, in place: kernels/adamw_update.py. RuntimeError: a written tensor is on the tape."""
    _no_tape("adamw_update", w=w, m=m, v=v, copy=copy)
    _adamw_update.adamw_update(w, m, v, copy, g, norm, step, lr, max_norm, beta1, beta2, eps, weight_decay)


def _load_native(folder: Path) -> str | None:
    """Load the compiled `_C` that lies in `folder`; what is wrong with it, or None.

    No file is no fault: the references do the same work. A file that does not load is one.
    """
    for library in sorted(folder.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            return (
                f"{library} does not load with torch {torch.__version__}, so the slower references run instead; "
                f"rebuild it (python setup.py build_ext --inplace) or delete it. The loader says: {error}"
            )
    return None


broken_native = _load_native(Path(__file__).parent)
if broken_native:
    warnings.warn(broken_native, RuntimeWarning, stacklevel=2)


def active(name: str, device: torch.device | str) -> Literal["native", "onednn", "triton", "reference"]:
    """Which implementation of op `name` runs on `device` (float32). ValueError: no such op."""
    if name not in _BY_NAME:
        raise ValueError(f"no op is named {name!r}; there are {', '.join(_BY_NAME)}")
    kind = torch.device(device).type
    if kind == "cpu" and torch._C._dispatch_has_kernel_for_dispatch_key(f"safer_fast::{name}", "CPU"):
        return "native"
    op = _BY_NAME[name]
    if kind == "cpu" and op.onednn is not None and op.onednn():
        return "onednn"
    return "triton" if kind == "cuda" and HAVE_TRITON and op.triton is not None else "reference"
