"""The Triton kernels as machine code for Hopper and Ampere, compiled here without a GPU: registers, spills, width.

A memory-bound kernel that lost its 128-bit accesses, or spills, still gives the right numbers; only this shows it.
"""

import importlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402  (only where Triton exists)
from triton.compiler import ASTSource  # noqa: E402

from safer_fast.kernels.op import ROUNDED  # noqa: E402

F32, F64, BF16, I64, U8 = "*fp32", "*fp64", "*bf16", "*i64", "*u8"


@dataclass(frozen=True)
class Case:
    """One kernel as its launcher calls it: argument types in order, compile-time constants, warps."""

    kernel: str
    types: list[str]
    constants: dict[str, Any]
    warps: int = 4
    loads: bool = True  # reads its data 128 bits at a time
    stores: bool = True
    fused: bool = False  # a correctly rounded division is made of fused multiply-adds
    target: int = 90

    def __str__(self) -> str:
        return f"{self.kernel}-sm_{self.target}" + ("-bf16" if BF16 in self.types else "")


LINF = {"BLOCK": 1024}
SAM = [F32, F32, F32, F32, I64, F32, "fp32"]
ADAMW = [F32, F32, F32, BF16, F32, F32, F32, F32, "i32"] + ["fp32"] * 9
CASES = [
    Case("linf_step._kernel", [F32, F32, F32, F32, F32, "i32"], LINF),
    Case("linf_step._kernel", [F32, BF16, F32, F32, F32, "i32"], LINF),
    Case("linf_step._kernel", [F32, F32, F32, F32, F32, "i32"], LINF, target=80),
    Case("l2_step._sums_kernel", [F32, F32, F32, F64, "i32"], {"BLOCK": 2048}, 8, stores=False),
    Case(
        "l2_step._move_kernel",
        [F32, F32, F32, F64, F32, F32, "i32"],
        {"MARGIN": 1 - 2.0**-21, "TILES": 128, "BLOCK": 2048},
        8,
        fused=True,
    ),
    Case("global_norm._parts_kernel", [F32, F64, "i32"], {"TILES": 3, "BLOCK": 2048}, 8, stores=False),
    Case("global_norm._finish_kernel", [F64, F32, "i32"], {"PARTS": 1024}, loads=False, stores=False, fused=True),
    Case("layer_norms._parts_kernel", [F32, I64, F64], {"BLOCK": 1024}, stores=False),
    Case("layer_norms._finish_kernel", [F64, F32, "i32"], {"SPLITS": 128}, loads=False, stores=False, fused=True),
    Case("sam_perturb._kernel", SAM, {"ADAPTIVE": False, "BLOCK": 1024}, fused=True),
    Case("sam_perturb._kernel", SAM, {"ADAPTIVE": True, "BLOCK": 1024}, fused=True, target=80),
    Case(
        "sgd_update._kernel",
        [F32, F32, BF16, F32, F32, F32, "i32"] + ["fp32"] * 3,
        {"CLIP": True, "NESTEROV": True, "COPY": True, "BLOCK": 1024},
        fused=True,
    ),
    Case("adamw_update._kernel", ADAMW, {"CLIP": True, "COPY": True, "BLOCK": 1024}, fused=True),
    Case("adamw_update._kernel", ADAMW, {"CLIP": True, "COPY": True, "BLOCK": 1024}, fused=True, target=80),
    Case("uniform_start._kernel", [F32, F32, I64, I64, F32, "i32", "i32", "fp32", "fp32"], {"BLOCK": 256}),
    Case(
        "gather_augment._kernel",
        [F32, U8, I64, I64, I64] + ["i32"] * 8,
        {"PAD": 4, "FLIP": True, "CROP": 0xA06, "BLOCK": 1024},
        loads=False,  # bytes, from anywhere
        fused=True,
    ),
]


def compiled(case: Case, *, ones: bool = False) -> Any:
    """The kernel compiled for `case.target`, every pointer and size a multiple of 16, as the launcher finds them.

    ones: every integer is 1 instead, which the launcher makes a compile-time constant.
    """
    module, name = case.kernel.split(".")
    kernel = getattr(importlib.import_module(f"safer_fast.kernels.{module}"), name)
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: there is nothing to compile")
    names = kernel.arg_names
    types = [*case.types, *["constexpr"] * len(case.constants)]
    assert len(names) == len(types), "the case lags behind the kernel's arguments"
    signature = dict(zip(names, types, strict=True))
    constants = dict(case.constants)
    if ones:
        constants |= {n: 1 for n in names if signature[n] == "i32"}
        signature |= dict.fromkeys(constants, "constexpr")
    sizes = set() if ones else {"n", "D", "H", "W"}
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or n in sizes]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(
        source, target=GPUTarget("cuda", case.target, 32), options={"num_warps": case.warps, **ROUNDED}
    )


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a kernel, from cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"{tool} is not part of this Triton")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", out.stdout)}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_machine_code(case: Case) -> None:
    kernel = compiled(case)
    used = resources(kernel.asm["cubin"])
    assert used["STACK"] == used["LOCAL"] == 0, f"spills: {used}"
    assert used["REG"] <= 64, f"{used['REG']} registers leave less than half of a multiprocessor's threads"
    sass = kernel.asm["sass"]
    assert not re.search(r"\b(LDL|STL)\b", sass), "spills"
    assert bool(re.search(r"\bLDG\.E\S*\.128", sass)) == case.loads
    assert bool(re.search(r"\bSTG\.E\S*\.128", sass)) == case.stores
    if not case.fused:
        assert not re.search(r"\b[FD]FMA\b", sass), "a fused multiply-add rounds once where the reference rounds twice"


@pytest.mark.parametrize(
    "case", [c for c in CASES if "i32" in c.types and c.target == 90 and BF16 not in c.types], ids=str
)
def test_sizes_of_one_compile(case: Case) -> None:
    """An argument that is 1 arrives as a Python number, without a tensor's methods; the interpreter never shows it."""
    assert compiled(case, ones=True).asm["cubin"]
