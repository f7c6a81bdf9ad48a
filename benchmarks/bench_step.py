"""One SAFER step: safer_fast against plain PyTorch, side by side in one run.

    python -m benchmarks.bench_step --device cpu --json FILE

First shows that the sides agree (loss and weights of three steps in fp32; the mean loss of twenty in bf16), then times
them in turn and prints images/s, ratios, TFLOP/s, share of the counted bound and peak memory.
"""

import argparse
import copy
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import safer_fast as sf
from benchmarks.baselines import PlainStep, StrongStep
from benchmarks.roofline import step_cost
from benchmarks.timing import Timing, interleave, paired_ratio
from safer_fast import ops
from safer_fast.engine import compile_step

SEED, EPS, ALPHA, STEPS, RHO, LR, MOMENTUM = 0, 8 / 255, 2 / 255, 10, 0.05, 0.01, 0.9
LAYERS = "blocks.8.mlp.fc1,blocks.10.attn.qkv"
Batch = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (x, y, ids, seed) -> loss


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark; returns what --json writes."""
    options = _options(arguments)
    device = torch.device(options.device)
    model = build_model(options).to(device)
    layers = options.layers.split(",")
    variants = {name: VARIANTS[name](copy.deepcopy(model), layers) for name in options.variants.split(",")}
    batch = make_batch(options, device)
    agreement = agree({n: v for n, v in variants.items() if n != "full"}, batch, bf16=device.type == "cuda")
    timings, peaks = measure(variants, batch, options.repeats)
    result = report(options, model, layers, variants, timings, peaks, agreement)
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
            eps, key = torch.tensor(EPS, device=x.device), torch.tensor(seed, device=x.device)
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
    return sf.create_model(
        options.model, num_classes=options.classes, img_size=options.img_size, patch_size=options.patch_size
    )


def make_batch(options: argparse.Namespace, device: torch.device) -> Batch:
    """Random images (never zeros), labels, ids."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.rand(options.batch, 3, options.img_size, options.img_size, generator=generator)
    y = torch.randint(options.classes, (options.batch,), generator=generator)
    return x.to(device), y.to(device), torch.arange(options.batch, device=device)


def agree(variants: dict[str, Variant], batch: Batch, *, bf16: bool) -> dict[str, Any]:
    """Same images, draws and start: in fp32 losses and weights of three steps within 1e-5; in bf16 the mean loss of
    twenty within 1 %, since sign attacks part ways in the last bit. Raises AssertionError."""
    steps = 20 if bf16 else 3
    losses = {name: [float(v.run(*batch, 1000 + i)) for i in range(steps)] for name, v in variants.items()}
    first, *others = variants
    apart = {}
    for name in others:
        if bf16:
            gap = abs(statistics.mean(losses[name]) / statistics.mean(losses[first]) - 1)
            assert gap < 0.01, f"{name} and {first} part: mean loss over {steps} steps differs by {gap:.2%}"
        else:
            gap = max(
                *(abs(a - b) for a, b in zip(losses[name], losses[first], strict=True)),
                float((variants[name].weights() - variants[first].weights()).abs().max()),
            )
            assert gap < 1e-5, f"{name} and {first} part: loss or weights differ by {gap:.1e} after {steps} steps"
        apart[name] = gap
    print(f"agreement with {first} over {steps} steps: " + ", ".join(f"{n} {g:.1e}" for n, g in apart.items()))
    return {"steps": steps, "against": first, "gap": apart}


def measure(variants: dict[str, Variant], batch: Batch, repeats: int) -> tuple[dict[str, Timing], dict[str, int]]:
    """Timings of all variants in turn, and the peak of GPU memory of each (0 on a CPU)."""
    peaks = {}
    for name, v in variants.items():
        if batch[0].is_cuda:
            v.run(*batch, 1)
            torch.cuda.reset_peak_memory_stats()
        v.run(*batch, 2)
        peaks[name] = torch.cuda.max_memory_allocated() if batch[0].is_cuda else 0
    runs = {name: (lambda v=v: v.run(*batch, 3)) for name, v in variants.items()}
    return interleave(runs, repeats=repeats), peaks


def report(
    options: argparse.Namespace, model: nn.Module, layers: list[str], variants: dict[str, Variant],
    timings: dict[str, Timing], peaks: dict[str, int], agreement: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Prints the table; returns it as plain values."""
    cost = step_cost(model, options.batch, options.img_size, layers, attack_steps=STEPS)
    rows: dict[str, Any] = {}
    for name, timing in timings.items():
        rows[name] = {
            "images_per_s": options.batch / timing.median, "seconds": timing.median, "spread": timing.spread,
            "n": len(timing.seconds), "tflops": cost.flops / timing.median / 1e12, "peak_bytes": peaks[name],
            "note": variants[name].note,
        }  # fmt: skip
        print(
            f"{name:<24}{rows[name]['images_per_s']:>10,.1f} images/s  ±{timing.spread:.1%}  "
            f"{rows[name]['tflops']:.3f} TFLOP/s  {variants[name].note}"
        )
    strong = [n for n in timings if n.startswith("strong")]
    rivals = {"plain": ["plain"], "full": ["full"], "strong": strong}
    ratios = {
        rival: min(paired_ratio(timings[n], timings["ours"]) for n in names if n in timings)
        for rival, names in rivals.items()
        if "ours" in timings and any(n in timings for n in names)
    }
    for rival, ratio in ratios.items():
        print(f"ours is {ratio:.2f}x {rival}")
    where = (
        torch.cuda.get_device_name() if options.device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    )
    return {
        "device": where, "variants": rows, "ratios": ratios, "model": options.model, "img_size": options.img_size,
        "patch_size": options.patch_size, "batch": options.batch, "layers": layers, "agreement": agreement,
        "flops": cost.flops, "command": " ".join(["python -m benchmarks.bench_step", *sys.argv[1:]]),
        "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_step", description=__doc__)
    cuda = torch.cuda.is_available()
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--img-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128 if cuda else 32)
    parser.add_argument("--layers", default=LAYERS, help="selected layers, with commas")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--variants", default="ours,plain,strong,full", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--repeats", type=int, default=20 if cuda else 5)
    parser.add_argument("--json", help="write the result here")
    options = parser.parse_args(arguments)
    unknown = set(options.variants.split(",")) - set(VARIANTS)
    if unknown:
        parser.error(f"no variant {', '.join(sorted(unknown))}; choose of {', '.join(VARIANTS)}")
    return options


if __name__ == "__main__":
    main()
