"""The Triton kernels in Triton's interpreter, on the CPU, against the references.

The interpreter has to be chosen before Triton is first imported, which other tests have done by now, so one child
process (this file, run as a script) checks every op, and a test each reads its verdict.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

NAMES = [path.stem for path in sorted((Path(__file__).parents[1] / "kernels").glob("*.py"))]
NAMES = [name for name in NAMES if name not in ("op", "philox", "linear", "attention")]

# rtol, atol by dtype. The interpreter cuts bf16 off where the hardware rounds it (Triton 3.9): one unit, not a half.
TOLERANCE = {torch.float32: (3e-7, 1.2e-7), torch.bfloat16: (2**-7, 0.0)}
EXACT = {"uniform_start", "linf_step", "sam_perturb", "sgd_update", "gather_augment"}
GUARD = 67  # odd, so that the tensors inside are not aligned either
SENTINEL = 12345.0


def guarded(op, args):
    """The same arguments, each written tensor in the middle of a larger buffer, to catch writes beyond its ends."""
    buffers, placed = [], list(args)
    for i, argument in enumerate(op.run._opoverload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write and placed[i] is not None:
            buffer = torch.full((placed[i].numel() + 2 * GUARD,), SENTINEL, dtype=placed[i].dtype)
            inside = buffer[GUARD:-GUARD].view(placed[i].shape)
            placed[i] = inside.copy_(placed[i])
            buffers.append((buffer, buffer.clone()))
    return placed, buffers


def close(name, ours, theirs):
    if isinstance(ours, torch.Tensor):
        exact = name in EXACT and ours.dtype == torch.float32
        rtol, atol = (0.0, 0.0) if exact else TOLERANCE.get(ours.dtype, (0.0, 0.0))
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=rtol, atol=atol)


def check(op):
    for args in op.samples("cpu", torch.float32, 1):
        placed, buffers = guarded(op, copy.deepcopy(args))
        expected = copy.deepcopy(args)
        close(op.name, op.triton(*placed), op.reference(*expected))
        for ours, theirs in zip(placed, expected, strict=True):
            close(op.name, ours, theirs)
        for buffer, before in buffers:
            assert torch.equal(buffer[:GUARD], before[:GUARD]), "wrote before the tensor"
            assert torch.equal(buffer[-GUARD:], before[-GUARD:]), "wrote behind the tensor"


def check_refusals(op):
    """float64 belongs to the references, and gaps cannot be written: both are refused with a sentence."""
    if op.name != "gather_augment":
        with pytest.raises(ValueError, match="float64"):
            op.triton(*next(iter(op.samples("cpu", torch.float64, 0))))
    samples = list(op.samples("cpu", torch.float32, 0))
    args = list(samples[3 if op.name.endswith("update") else 0])
    written = [i for i, a in enumerate(op.run._opoverload._schema.arguments) if a.alias_info is not None]
    if written:
        args[written[0]] = args[written[0]].repeat_interleave(2, dim=-1)[..., ::2]
        with pytest.raises(ValueError, match="contiguous"):
            op.triton(*args)


def check_budget(ops):
    """The L2 budget on flat images, where every pixel rounds the same way, and eps = alpha = 0."""
    for level, eps in ((0.3, 0.5), (0.7, 3.0), (0.9, 0.0)):
        x = torch.full((2, 3, 32, 32), level)
        x_adv = x.clone()
        for _ in range(3):
            launch = next(op for op in ops if op.name == "l2_step").triton
            launch(x_adv, torch.ones_like(x), x, torch.tensor(eps / 2), torch.tensor(eps))
            assert (x_adv.double() - x.double()).flatten(1).norm(dim=1).max() <= eps + 1e-7


def verdicts():
    from safer_fast import ops

    # Fills every torch.empty with NaN, so that an element a kernel forgets shows.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    found = {}
    for op in ops.ALL:
        if op.triton is None:
            continue
        try:
            check(op)
            check_refusals(op)
            if op.name == "l2_step":
                check_budget(ops.ALL)
            found[op.name] = ""
        except Exception as error:
            found[op.name] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def interpreted():
    pytest.importorskip("triton")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_triton_equals_the_reference_in_the_interpreter(name, interpreted):
    assert interpreted[name] == ""


if __name__ == "__main__":
    print(json.dumps(verdicts()))
