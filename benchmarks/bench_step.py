"""One SAFER step: safer_fast against plain PyTorch, side by side in one run.

    python -m benchmarks.bench_step --device cpu --json FILE

First shows that the sides agree (loss and weights of three steps in fp32; the mean loss of twenty in bf16), then times
them in turn and prints images/s, ratios, TFLOP/s, share of the counted bound and peak memory.
"""

import argparse
import copy
import datetime
import functools
import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import safer_fast as sf
from benchmarks.baselines import PlainStep, StrongStep
from benchmarks.roofline import bound, step_cost, step_kernels
from benchmarks.timing import Timing, ceilings, interleave, paired_ratio
from safer_fast import ops
from safer_fast.engine import compile_step
from safer_fast.profiling import hardware

SEED, EPS, ALPHA, STEPS, RHO, LR, MOMENTUM = 0, 8 / 255, 2 / 255, 10, 0.05, 0.01, 0.9
LAYERS = "blocks.8.mlp.fc1,blocks.10.attn.qkv"
Batch = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (x, y, ids, seed) -> loss


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what --json writes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _options(arguments)
    device = torch.device(options.device)
    model = build_model(options).to(device)
    layers, batch = options.layers.split(","), make_batch(options, device)
    runs, failed = start_all(options, model, layers, batch)
    agreement = agree({n: r for n, r in runs.items() if n != "full"}, bf16=device.type == "cuda")
    turns = {name: functools.partial(run.variant.run, *batch, 3) for name, run in runs.items()}
    timings = interleave(turns, repeats=options.repeats)
    result = report(options, model, layers, runs, timings) | {
        "agreement": agreement, "failed": failed, "command": " ".join(["python -m benchmarks.bench_step", *arguments]),
    }  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


class Variant:
    """A way to take a step: `run` on a batch, `weights` afterwards."""

    def __init__(self, model: nn.Module, layers: list[str], run: Run, note: str) -> None:
        self.model, self.layers, self.run, self.note = model, layers, run, note

    def weights(self) -> Tensor:
        """The trained weights, one vector."""
        return torch.cat([p.detach().flatten() for n in self.layers for p in self.model.get_submodule(n).parameters()])


def ours(mode: str) -> Callable[[nn.Module, list[str]], Variant]:
    """safer_fast in a mode of its engine."""

    def build(model: nn.Module, layers: list[str]) -> Variant:
        step = compile_step(
            model, layers, attack=sf.PGD(eps=EPS, alpha=ALPHA, steps=STEPS), sam=sf.SAM(rho=RHO),
            optimizer=sf.SGD(lr=LR, momentum=MOMENTUM), mode=mode,
        )  # fmt: skip
        note = f"{step.mode} ({step.reason}), {step.precision}"
        return Variant(model, layers, lambda x, y, ids, seed: step(x, y, ids, seed=seed), note)

    return build


def baseline(kind: Callable[..., PlainStep], *, every: bool = False, **extra: Any) -> Callable[..., Variant]:
    """A baseline, given the very draw that ours starts from."""

    def build(model: nn.Module, layers: list[str]) -> Variant:
        constants = {"eps": EPS, "alpha": ALPHA, "steps": STEPS, "rho": RHO, "lr": LR, "momentum": MOMENTUM}
        step = kind(model, None if every else layers, **constants, **extra)

        def run(x: Tensor, y: Tensor, ids: Tensor, seed: int) -> Tensor:
            # Filled on the device: torch.tensor(…, device=…) would make the host wait for it.
            eps = torch.full((), EPS, device=x.device)
            key = torch.full((), seed, dtype=torch.int64, device=x.device)
            return step(x, y, ops.uniform_start(x, ids, key, eps, 0, 0.0, 1.0) - x)

        return Variant(model, layers, run, (kind.__doc__ or "").splitlines()[0])

    return build


VARIANTS: dict[str, Callable[[nn.Module, list[str]], Variant]] = {
    "ours": ours("auto"),
    "ours-eager": ours("eager"),
    "ours-compiled": ours("compiled"),
    "plain": baseline(PlainStep),
    "full": baseline(PlainStep, every=True),
    "strong": baseline(StrongStep, mode="default"),
    "strong-reduce-overhead": baseline(StrongStep, mode="reduce-overhead"),
}


def build_model(options: argparse.Namespace) -> nn.Module:
    """The model at random weights, drawn with a fixed seed."""
    torch.manual_seed(SEED)
    depth = {"depth": options.depth} if options.depth else {}
    return sf.create_model(
        options.model, num_classes=options.classes, img_size=options.img_size, patch_size=options.patch_size, **depth
    )


def make_batch(options: argparse.Namespace, device: torch.device) -> Batch:
    """Random images (never zeros), labels, ids."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.rand(options.batch, 3, options.img_size, options.img_size, generator=generator)
    y = torch.randint(options.classes, (options.batch,), generator=generator)
    return x.to(device), y.to(device), torch.arange(options.batch, device=device)


def start_all(
    options: argparse.Namespace, model: nn.Module, layers: list[str], batch: Batch
) -> tuple[dict[str, "Started"], dict[str, str]]:
    """All variants started, and with --keep-going what failed of the rivals, said loudly. Ours may not fail."""
    runs, failed = {}, {}
    for name in options.variants.split(","):
        try:
            runs[name] = start(VARIANTS[name], model, layers, batch)
        except Exception as error:
            if name == "ours" or not options.keep_going:
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name} FAILED and is left out: {failed[name]}", file=sys.stderr)
    return runs, failed


class Started(NamedTuple):
    """A variant after its first steps: their losses, the weights then, and the GPU memory it holds (None on a CPU)."""

    variant: Variant
    losses: list[float]
    weights: Tensor
    peak_bytes: int | None


def start(
    build: Callable[[nn.Module, list[str]], Variant], model: nn.Module, layers: list[str], batch: Batch
) -> Started:
    """Builds a variant from the model and takes the steps that `agree` compares: 20 in bf16, 3 in fp32.

    Memory is what the allocator has reserved beyond what it had before, caches emptied after the first step: that
    counts a CUDA graph's own pool, and none of what compilation took for a while.
    """
    cuda = batch[0].is_cuda
    before = _reserved() if cuda else 0
    variant = build(copy.deepcopy(model), layers)
    losses = [float(variant.run(*batch, 1000))]
    if cuda:
        _reserved()
        torch.cuda.reset_peak_memory_stats()
    losses += [float(variant.run(*batch, 1000 + i)) for i in range(1, 20 if cuda else 3)]
    peak = torch.cuda.max_memory_reserved() - before if cuda else None
    return Started(variant, losses, variant.weights(), peak)


def _reserved() -> int:
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def agree(runs: dict[str, Started], *, bf16: bool) -> dict[str, Any]:
    """Same images, draws and start: in fp32 losses and weights of three steps within 1e-5; in bf16 the mean loss of
    twenty within 1 %, since sign attacks part ways in the last bit. Raises AssertionError."""
    first, *others = runs
    steps, apart = len(runs[first].losses), {}
    for name in others:
        a, b = runs[name], runs[first]
        if bf16:
            gap = abs(statistics.mean(a.losses) / statistics.mean(b.losses) - 1)
            assert gap < 0.01, f"{name} and {first} part: mean loss over {steps} steps differs by {gap:.2%}"
        else:
            losses = max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))
            gap = max(losses, float((a.weights - b.weights).abs().max()))
            assert gap < 1e-5, f"{name} and {first} part: loss or weights differ by {gap:.1e} after {steps} steps"
        apart[name] = gap
    print(f"agreement with {first} over {steps} steps: " + ", ".join(f"{n} {g:.1e}" for n, g in apart.items()))
    return {"steps": steps, "against": first, "gap": apart}


def report(
    options: argparse.Namespace, model: nn.Module, layers: list[str], runs: dict[str, Started],
    timings: dict[str, Timing],
) -> dict[str, Any]:  # fmt: skip
    """Prints the table; returns it as plain values."""
    cost = step_cost(model, options.batch, options.img_size, layers, attack_steps=STEPS)
    limit = limits(options, model, layers, cost.flops / options.batch)
    rows: dict[str, Any] = {}
    for name, timing in timings.items():
        speed = options.batch / timing.median
        rows[name] = {
            "images_per_s": speed, "seconds": timing.median, "spread": timing.spread, "n": len(timing.seconds),
            "tflops": cost.flops / timing.median / 1e12, "share_of_bound": speed / limit["images_per_s"],
            "peak_bytes": runs[name].peak_bytes, "note": runs[name].variant.note,
        }  # fmt: skip
        print(
            f"{name:<24}{speed:>10,.1f} images/s  ±{timing.spread:.1%}  {rows[name]['tflops']:.3f} TFLOP/s  "
            f"{rows[name]['share_of_bound']:.0%} of the bound{_memory(runs[name].peak_bytes)}  {rows[name]['note']}"
        )
    print(f"bound: {limit['images_per_s']:,.0f} images/s ({limit['what']})")
    ratios = ratios_of(timings)
    for rival, ratio in ratios.items():
        print(f"ours is {ratio:.2f}x {rival}")
    return {
        "device": hardware(options.device),
        "variants": rows, "ratios": ratios, "model": options.model, "img_size": options.img_size,
        "patch_size": options.patch_size, "batch": options.batch, "layers": layers, "flops": cost.flops,
        "bound": limit, "tf32": torch.backends.cuda.matmul.allow_tf32, "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def limits(options: argparse.Namespace, model: nn.Module, layers: list[str], flops: float) -> dict[str, Any]:
    """The bound in images/s from ceilings measured here: FLOPs and bytes of the level that ours is at where both are
    counted (a ViT on a GPU), FLOPs alone elsewhere. flops: of one image."""
    tflops, gb_per_s = ceilings(options.device)
    kernels = step_kernels(model, options.img_size, layers, "class-token", attack_steps=STEPS)
    counted = kernels is not None and options.device.startswith("cuda")
    speed = bound(kernels, tflops=tflops, gb_per_s=gb_per_s) if counted and kernels else tflops * 1e12 / flops
    what = "FLOPs and bytes, level class-token" if counted else "FLOPs alone"
    return {"images_per_s": speed, "what": what, "tflops": tflops, "gb_per_s": gb_per_s}


def ratios_of(timings: dict[str, Timing]) -> dict[str, float]:
    """How many times as fast ours is, paired turn by turn; strong is the faster of its two."""
    rivals = {"plain": ["plain"], "full": ["full"], "strong": [n for n in timings if n.startswith("strong")]}
    return {
        rival: min(paired_ratio(timings[n], timings["ours"]) for n in names if n in timings)
        for rival, names in rivals.items()
        if "ours" in timings and any(n in timings for n in names)
    }


def _memory(peak: int | None) -> str:
    return "" if peak is None else f"  {peak / 2**30:.2f} GiB"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--depth", type=int, help="another number of blocks than the model's own")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128 if cuda else 32)
    parser.add_argument("--layers", default=LAYERS, help="selected layers, with commas")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--variants", default="ours,plain,strong,full", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    parser.add_argument("--keep-going", action="store_true", help="leave out rivals that fail, and say so")
    parser.add_argument("--json", help="write the result here")
    options = parser.parse_args(arguments)
    unknown = set(options.variants.split(",")) - set(VARIANTS)
    if unknown:
        parser.error(f"no variant {', '.join(sorted(unknown))}; choose of {', '.join(VARIANTS)}")
    return options


if __name__ == "__main__":
    main()
