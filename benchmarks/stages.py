"""The stages of benchmarks.gpu. Each takes a record and whether it runs in miniature, on a CPU too."""

import copy
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import safer_fast as sf
from benchmarks import bench_ops, bench_step
from benchmarks.gpu import Record, path_of
from benchmarks.timing import ceilings, copy_gb_per_s, seconds_of
from benchmarks.trace import by_phase, gaps, read, top
from safer_fast import ops, profiling
from safer_fast.engine import compile_step
from safer_fast.step import Step

RHO = 0.05


class Stage(NamedTuple):
    """What it shows, its time limit in seconds, how it runs."""

    what: str
    seconds: float
    run: Callable[[Record, bool], None]


def where(dry: bool) -> torch.device:
    """The GPU, or a CPU in miniature."""
    return torch.device("cpu" if dry or not torch.cuda.is_available() else "cuda")


def environment(record: Record, dry: bool) -> None:
    """Versions, the device, what is active, the ceilings measured."""
    import timm

    device = where(dry)
    record.row(python=platform.python_version(), torch=torch.__version__, timm=timm.__version__)
    record.row(**{name: _version(name) for name in ("triton", "torchvision", "nvtx", "rich", "expecttest")})
    record.row(active={op.name: ops.active(op.name, device) for op in ops.ALL}, broken=ops.broken_native)
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        record.row(
            name=p.name, capability=f"{p.major}.{p.minor}", multiprocessors=p.multi_processor_count,
            l2_bytes=getattr(p, "L2_cache_size", None), bytes=p.total_memory, cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
        )  # fmt: skip
        record.row(
            nvidia_smi=_output(["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv"])
        )
    record.row(tools={tool: shutil.which(tool) is not None for tool in ("nsys", "ncu", "compute-sanitizer")})
    tflops, gb_per_s = (None, copy_gb_per_s(device, 1 << 24)) if dry else ceilings(device)
    record.row(tflops=tflops, gb_per_s=gb_per_s)


def _version(module: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return "not installed"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


def every_op(record: Record, dry: bool) -> None:
    """Each op against its reference on the same device, all samples, fp32 and fp64 and bf16; opcheck; realistic sizes."""
    device = where(dry)
    for op in ops.ALL:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            record.row(op=op.name, dtype=str(dtype), **_attempt(_samples, op, device, dtype))
        record.row(op=op.name, what="opcheck", **_attempt(_opcheck, op, device))
        record.row(op=op.name, what="realistic sizes", **_attempt(_realistic, op, device, dry))


def _attempt(run: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What `run` returns, or what was wrong; the other rows go on."""
    try:
        return {"ok": True} | run(*arguments)
    except Exception as error:
        return {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}


def _realistic(op: ops.Op, device: torch.device, dry: bool) -> dict[str, Any]:
    bench_ops.check(op, bench_ops.arguments_for(op, device, bench_ops.TINY if dry else None))
    return {}


def _samples(op: ops.Op, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Largest difference over the samples, and whether all bits agree. An op may refuse a dtype, in both its forms."""
    largest, bits, n = 0.0, True, 0
    samples = op.samples(device, dtype, 0)
    while True:
        arguments = None
        try:
            arguments = next(samples, None)
            if arguments is None:
                break
            ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
            expected = op.reference(*theirs)
        except ValueError as refusal:
            return {"refused": str(refusal), "ok": arguments is None or _refuses_too(op, ours)}
        pairs = zip((*_tuple(op.run(*ours)), *ours), (*_tuple(expected), *theirs), strict=True)
        for a, b in ((a, b) for a, b in pairs if isinstance(a, Tensor)):
            _close(a, b)
            bits &= torch.equal(a.nan_to_num(), b.nan_to_num())
            largest = max(largest, _gap(a, b))
        n += 1
    return {"samples": n, "largest_difference": largest, "same_bits": bits}


def _refuses_too(op: ops.Op, arguments: tuple[Any, ...]) -> bool:
    try:
        op.run(*arguments)
    except (ValueError, RuntimeError):  # C++ raises the latter
        return True
    return False


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).nan_to_num().abs().max()) if a.numel() else 0.0


def _tuple(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def _close(a: Tensor, b: Tensor) -> None:
    """Some units in the last place, of the largest element too: sums add up in another order."""
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-7}.get(a.dtype, 1e-12)
    finite = b[b.isfinite()] if b.is_floating_point() else b.new_zeros(0)
    atol = rtol * max(0.25, float(finite.abs().max())) if finite.numel() else 0.0
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def _opcheck(op: ops.Op, device: torch.device) -> dict[str, Any]:
    try:
        import expecttest  # noqa: F401
    except ImportError:
        return {"note": "not run: torch.library.opcheck needs expecttest, which is not installed"}
    overload = op.run._opoverload  # type: ignore[attr-defined]
    for arguments in list(op.samples(device, torch.float32, 0))[:2]:
        torch.library.opcheck(overload, arguments)
    return {}


class Case(NamedTuple):
    """A model, the layers that are trained, and the size of its batches."""

    name: str
    model: Callable[[], nn.Module]
    layers: list[str]
    img_size: int
    batch: int


def cases(dry: bool) -> list[Case]:
    """A small ViT and DeiT-Ti 32/4."""
    tiny: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2} if dry else {
        "embed_dim": 96, "depth": 3, "num_heads": 3,
    }  # fmt: skip
    size = 8 if dry else 16

    def small() -> nn.Module:
        return sf.create_model("vit_tiny_patch16_224", num_classes=10, img_size=size, patch_size=4, **tiny)

    def deit() -> nn.Module:
        return sf.create_model("deit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4)

    found = [Case("small ViT", small, ["blocks.1.mlp.fc1"], size, 4 if dry else 32)]
    return found if dry else [*found, Case("DeiT-Ti 32/4", deit, bench_step.LAYERS.split(","), 32, 128)]


def agreement(record: Record, dry: bool) -> None:
    """eager = compiled = captured: fp32 step by step, bf16 in the mean of 20 steps; the perturbation that counts."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device = where(dry)
    modes = ["compiled", "captured"] if device.type == "cuda" else ["native"]
    for case in cases(dry):
        torch.manual_seed(0)
        model = case.model().to(device)
        record.row(case=case.name, **_attempt(_agree_fp32, model, case, modes))
        if device.type == "cuda":
            record.row(case=case.name, **_attempt(_agree_bf16, model, case, modes))
        for mode in modes:
            precision = "bf16" if device.type == "cuda" else "fp32"
            checked = _attempt(_perturbation, model, case, mode, precision)
            record.row(case=case.name, mode=mode, precision=precision, **checked)


def _step(model: nn.Module, case: Case, mode: str, precision: str) -> Step:
    return compile_step(
        copy.deepcopy(model), case.layers, attack=sf.PGD(eps=8 / 255, alpha=2 / 255, steps=10), sam=sf.SAM(rho=RHO),
        optimizer=sf.SGD(lr=0.01), mode=mode, precision=precision,
    )  # fmt: skip


def _batches(case: Case, device: torch.device, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """n batches, all different, the last one short: that one runs eagerly in every mode."""
    generator = torch.Generator().manual_seed(1)
    for i in range(n):
        size = case.batch if i < n - 1 else case.batch // 2
        x = torch.rand(size, 3, case.img_size, case.img_size, generator=generator)
        yield x.to(device), torch.randint(10, (size,), generator=generator).to(device)


def _train(model: nn.Module, case: Case, mode: str, precision: str, n: int) -> tuple[list[float], Tensor]:
    """Losses of n steps on n batches under a falling learning rate, and the weights afterwards."""
    step = _step(model, case, mode, precision)
    device = next(model.parameters()).device
    losses = [float(step(x, y, seed=i, lr=0.01 / (1 + i))) for i, (x, y) in enumerate(_batches(case, device, n))]
    assert step.mode == mode, f"asked for {mode}, got {step.mode}: {step.reason}"
    return losses, step.store.w_P.clone()


def _agree_fp32(model: nn.Module, case: Case, modes: list[str]) -> dict[str, Any]:
    losses, weights = _train(model, case, "eager", "fp32", 4)
    gaps: dict[str, Any] = {}
    for mode in modes:
        other, moved = _train(model, case, mode, "fp32", 4)
        loss = max(abs(a - b) for a, b in zip(losses, other, strict=True))
        gaps[mode] = {"loss": loss, "weights": float((weights - moved).abs().max())}
    worst = max(max(g.values()) for g in gaps.values())
    return {"precision": "fp32", "gaps": gaps, "ok": worst < 1e-5}


def _agree_bf16(model: nn.Module, case: Case, modes: list[str]) -> dict[str, Any]:
    exact = statistics.mean(_train(model, case, "eager", "fp32", 20)[0])
    means = {mode: statistics.mean(_train(model, case, mode, "bf16", 20)[0]) for mode in ["eager", *modes]}
    gaps = {mode: abs(mean / exact - 1) for mode, mean in means.items()}
    return {"precision": "bf16", "mean_loss_fp32": exact, "gaps": gaps, "ok": max(gaps.values()) < 0.01}


def _perturbation(model: nn.Module, case: Case, mode: str, precision: str) -> dict[str, Any]:
    """Norm and direction of the perturbation that pass 2 computes with, against the one that was meant: ρ g/‖g‖."""
    step = _step(model, case, mode, precision)
    device = next(model.parameters()).device
    x, y = next(_batches(case, device, 2))
    before = step.store.w_P.clone()
    step(x, y, seed=0)
    meant = step._e_P.double()
    copied = getattr(step, "_e_copy_P", None)  # in bf16 it stays a tensor of its own; elsewhere it is added to w
    counts = copied.double() if copied is not None else (before + step._e_P).double() - before.double()
    norm, cosine = float(counts.norm()) / RHO, float(F.cosine_similarity(counts, meant, dim=0))
    return {"norm_over_rho": norm, "cosine": cosine, "ok": abs(norm - 1) < 0.01 and cosine >= 0.999}


CONFIGURATION_SECONDS = 480  # compilation of all variants is most of it
LATE, EARLY = bench_step.LAYERS, "blocks.1.attn.qkv,blocks.2.mlp.fc1"
SWIN_LATE = "layers.3.blocks.0.attn.qkv,layers.3.blocks.1.mlp.fc1"
# name, model, img_size, patch_size, batch, layers
CONFIGURATIONS = [
    ("deit-ti-32", "deit_tiny_patch16_224", 32, 4, 128, LATE),
    ("vit-b-224", "vit_base_patch16_224", 224, 16, 128, LATE),
    ("deit-s-224", "deit_small_patch16_224", 224, 16, 128, LATE),
    ("deit-ti-32-b1024", "deit_tiny_patch16_224", 32, 4, 1024, LATE),
    ("swin-t-224", "swin_tiny_patch4_window7_224", 224, 4, 128, SWIN_LATE),
    ("deit-ti-32-early", "deit_tiny_patch16_224", 32, 4, 128, EARLY),
]
MINIATURE = [("vit-8", "vit_tiny_patch16_224", 8, 4, 2, "blocks.1.mlp.fc1")]


def throughput(record: Record, dry: bool) -> None:
    """The step in our fastest mode against the baselines, a configuration a process and a file."""
    variants = "ours,plain" if dry else "ours,plain,strong,strong-reduce-overhead,full"
    for name, *configuration in _chosen(MINIATURE if dry else CONFIGURATIONS, record.part):
        result = _bench_step(configuration, variants, dry=dry, json_path=path_of(f"step-{name}", record.path.parent))
        record.row(configuration=name, **result)


def _chosen(configurations: list[Any], part: str) -> list[Any]:
    """All, or the one asked for by `throughput:<name>`."""
    chosen = [c for c in configurations if part in ("", c[0])]
    if not chosen:
        raise ValueError(f"no configuration {part!r}: choose one of {', '.join(c[0] for c in configurations)}")
    return chosen


def _bench_step(configuration: list[Any], variants: str, *, dry: bool, json_path: Path) -> dict[str, Any]:
    """bench_step in a process of its own (in miniature: in this one), in short."""
    model, img_size, patch_size, batch, layers = map(str, configuration)
    arguments = [
        "--model", model, "--img-size", img_size, "--patch-size", patch_size, "--batch", batch, "--layers", layers,
        "--variants", variants, "--json", str(json_path), "--keep-going",
    ]  # fmt: skip
    if dry:
        bench_step.main([*arguments, "--repeats", "2", "--depth", "2", "--device", "cpu"])
        result = json.loads(json_path.read_text())
        json_path.write_text(json.dumps(result | {"dry": True}, indent=2) + "\n")
    else:
        command = [sys.executable, "-m", "benchmarks.bench_step", *arguments]
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=CONFIGURATION_SECONDS)
        except subprocess.TimeoutExpired:
            return {"ok": False, "error": f"not done after {CONFIGURATION_SECONDS} s"}
        if done.returncode:
            return {"ok": False, "error": done.stderr[-2000:]}
        result = json.loads(json_path.read_text())
    speeds = {n: round(v["images_per_s"], 1) for n, v in result["variants"].items()}
    peaks = {n: v["peak_bytes"] for n, v in result["variants"].items()}
    share = result["variants"].get("ours", {}).get("share_of_bound")
    return {
        "ok": not result["failed"], "images_per_s": speeds, "ratios": result["ratios"], "share_of_bound": share,
        "peak_bytes": peaks, "failed": result["failed"],
    }  # fmt: skip


def kernels(record: Record, dry: bool) -> None:
    """Microseconds and GB/s of each op, against a copy measured in the same run."""
    device = where(dry)
    copied = copy_gb_per_s(device, 1 << 22 if dry else 1 << 30)
    record.row(copy_gb_per_s=copied)
    for op in bench_ops.for_device(device):
        record.row(**({"op": op.name} | _attempt(_measured, op, device, copied, dry)))


def _measured(op: ops.Op, device: torch.device, copied: float, dry: bool) -> dict[str, Any]:
    how: dict[str, Any] = {"sizes": bench_ops.TINY, "calls": 1, "repeats": 2} if dry else {}
    row = bench_ops.measure(op, device, **how)
    return row | {"share_of_copy": row["run"]["gb_per_s"] / copied}


def memory(record: Record, dry: bool) -> None:
    """Peak memory of each variant alone in a process, at sizes where activations count."""
    with tempfile.TemporaryDirectory() as folder:
        for name, *configuration in MINIATURE if dry else [CONFIGURATIONS[3], CONFIGURATIONS[1]]:
            for variant in ("ours", "plain") if dry else ("ours", "plain", "strong", "full"):
                path = Path(folder) / f"{name}-{variant}.json"
                result = _bench_step(configuration, variant, dry=dry, json_path=path)
                record.row(configuration=name, variant=variant, ok=result["ok"], error=result.get("error"),
                           peak_bytes=result.get("peak_bytes", {}).get(variant))  # fmt: skip


def profile(record: Record, dry: bool) -> None:
    """The captured step under PyTorch's profiler: where the time goes and where nothing runs; phases of the compiled."""
    device, case = where(dry), cases(dry)[-1]
    torch.manual_seed(0)
    model = case.model().to(device)
    for mode in ("captured", "compiled") if device.type == "cuda" else ("native",):
        step = _step(model, case, mode, "auto")
        events, phases = _traced(step, next(_batches(case, device, 2)), 3)
        record.row(mode=mode, steps=3, **gaps(events))
        record.row(mode=mode, phases=phases)
        for entry in top(events, 25):
            record.row(mode=mode, **entry)


def _traced(step: Step, batch: tuple[Tensor, Tensor], n: int) -> tuple[Any, dict[str, float]]:
    from torch.profiler import ProfilerActivity, record_function
    from torch.profiler import profile as profiler

    for i in range(3):
        step(*batch, seed=i)
    profiling.synchronise()
    cuda = batch[0].is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    profiling.enable(record_function)
    try:
        with profiler(activities=activities, acc_events=True) as traced:  # torch 2.11 warns of the default
            for i in range(n):
                step(*batch, seed=i)
            profiling.synchronise()
    finally:
        profiling.disable()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "trace.json")
        traced.export_chrome_trace(path)
        trace = json.loads(Path(path).read_text())
    return read(trace, "kernel" if cuda else "cpu_op"), by_phase(trace, profiling.PHASES, cuda=cuda)


# name, batch, heads, tokens, queries, head width
SHAPES = [
    ("DeiT-Ti 32/4", 128, 3, 65, 65, 64), ("DeiT-Ti 32/4 b1024", 1024, 3, 65, 65, 64),
    ("ViT-B 32/4", 128, 12, 65, 65, 64), ("DeiT-Ti 224", 128, 3, 197, 197, 64),
    ("DeiT-S 224", 128, 6, 197, 197, 64), ("ViT-B 224", 128, 12, 197, 197, 64),
    ("DeiT-Ti 32/4, class token", 128, 3, 65, 1, 64), ("ViT-B 224, class token", 128, 12, 197, 1, 64),
]  # fmt: skip
BACKENDS = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def attention(record: Record, dry: bool) -> None:
    """Each backend of scaled_dot_product_attention by shape: forward and input gradient, from strided q, k, v."""
    device = where(dry)
    for name, *shape in [("tiny", 2, 2, 5, 1, 8)] if dry else SHAPES:
        batch, heads, tokens, queries, width = shape
        qkv = torch.randn(batch, tokens, 3, heads, width, device=device)
        exact = _attend(qkv, queries)[0].detach()
        low = qkv if dry else qkv.bfloat16()
        for backend in ("default", *(("MATH",) if dry else BACKENDS)):
            row = _attempt(_timed_attention, low, queries, backend, exact)
            record.row(shape=name, backend=backend, **(row | {"ok": True, "available": row["ok"]}))


def _attend(qkv: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """Output of the first queries, and the gradient of a combination of it with respect to the packed qkv."""
    qkv = qkv.detach().requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # views, as they leave the qkv product
    out = F.scaled_dot_product_attention(q[:, :, :queries], k, v)
    return out, torch.autograd.grad(out, qkv, out.detach())[0]


def _timed_attention(qkv: Tensor, queries: int, backend: str, exact: Tensor) -> dict[str, Any]:
    def both() -> tuple[Tensor, Tensor]:
        if backend == "default":
            return _attend(qkv, queries)
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _attend(qkv, queries)

    error = float((both()[0].detach().double() - exact.double()).norm() / exact.double().norm())
    timing = seconds_of(both, device=qkv.device, calls=5, repeats=10)
    batch, tokens, _, heads, width = qkv.shape
    flops = 7 * 2 * batch * heads * queries * tokens * width  # two products forward, five backward
    return {
        "us": timing.median * 1e6, "spread": timing.spread, "tflops": flops / timing.median / 1e12,
        "relative_error": error,
    }  # fmt: skip


def training(record: Record, dry: bool) -> None:
    """The whole command on the embedded data set, by the device's default mode."""
    short = ["--epochs", "2", "--warmup-epochs", "1", "--limit", "64"] if dry else ["--epochs", "8"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "safer_fast", "finetune", "quickstart", "--out", str(out), *short]
        done = subprocess.run(command, capture_output=True, text=True)
        results = json.loads((out / "results.json").read_text()) if done.returncode == 0 else {}
    record.row(ok=done.returncode == 0, command=" ".join(["safer-fast", *command[3:5], *short]), results=results,
               output=done.stdout[-3000:], error=done.stderr[-2000:])  # fmt: skip


STAGES = {
    "environment": Stage("versions, device, ceilings", 120, environment),
    "ops": Stage("every op against its reference", 300, every_op),
    "agreement": Stage("eager = compiled = captured", 600, agreement),
    "throughput": Stage("images/s against the baselines", 1500, throughput),
    "kernels": Stage("microseconds and GB/s of each op", 240, kernels),
    "profile": Stage("top kernels and gaps", 300, profile),
    "attention": Stage("attention backends by shape", 240, attention),
    "memory": Stage("peak memory of each variant alone", 900, memory),
    "training": Stage("a training run by the command", 600, training),
}
