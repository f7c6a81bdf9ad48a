"""Every op of safer_fast against its reference, at the sizes of a training step.

    python -m pytest benchmarks/bench_ops.py          pytest-benchmark's table
    python -m benchmarks.bench_ops --json FILE        microseconds, GB/s and the share of a copy's bandwidth

An op is first shown to agree with its reference on the very tensors that are then timed. On a CPU the sizes are those
of DeiT-Ti at 32 px and a batch of 32; on a GPU of ViT-B at 224 px, a batch of 128 and all layers selected, which is
several times the GPU's cache.
"""

import argparse
import copy
import datetime
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.timing import copy_gb_per_s, seconds_of, synchronise
from safer_fast import ops
from safer_fast.profiling import hardware

Arguments = tuple[Any, ...]
# Norms add up in another order than the reference's; a product in float32 likewise. TF32 is off.
RTOL, ATOL = 2e-5, 1e-6


class Sizes(NamedTuple):
    """What an op works on: images, selected weights, tokens of a layer."""

    batch: int
    pixels: int
    weights: int
    tokens: int
    width: int
    heads: int


TI_32 = Sizes(32, 32, 592_512, 65, 192, 3)  # two selected layers
VIT_B_224 = Sizes(128, 224, 85_798_656, 197, 768, 12)
TINY = Sizes(2, 8, 1_027, 5, 32, 2)


def sizes_for(device: torch.device | str) -> Sizes:
    """The realistic ones for this device."""
    return VIT_B_224 if torch.device(device).type == "cuda" else TI_32


class Draw:
    """Random tensors on a device from one seed; never zeros."""

    def __init__(self, device: torch.device | str, sizes: Sizes, seed: int = 0) -> None:
        self.device, self.sizes = torch.device(device), sizes
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """N(0, 1)."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def flat(self) -> Tensor:
        """A vector like the selected weights'."""
        return self.normal(self.sizes.weights)

    def images(self) -> Tensor:
        """Pixels in [0, 1]."""
        shape = (self.sizes.batch, 3, self.sizes.pixels, self.sizes.pixels)
        return torch.rand(shape, generator=self.generator, device=self.device)

    def number(self, value: float) -> Tensor:
        """A 0-D tensor."""
        return torch.tensor(value, device=self.device)

    def ids(self) -> Tensor:
        """Names of the images of a batch."""
        return torch.arange(self.sizes.batch, device=self.device)

    def bounds(self) -> Tensor:
        """Twelve layers of about one size."""
        n = self.sizes.weights
        return torch.tensor([n * i // 12 for i in range(13)], device=self.device)


def _pixels(draw: Draw) -> Arguments:
    x = draw.images()
    return (x * 0.98).clone(), draw.normal(*x.shape), x, draw.number(2 / 255), draw.number(8 / 255)


def _gather(draw: Draw) -> Arguments:
    shape = (4 * draw.sizes.batch, 3, draw.sizes.pixels, draw.sizes.pixels)
    data = torch.randint(256, shape, generator=draw.generator, device=draw.device, dtype=torch.uint8)
    index = torch.randint(len(data), (draw.sizes.batch,), generator=draw.generator, device=draw.device)
    return data, index, draw.ids(), torch.tensor(7, device=draw.device), 4, True


def _linear(draw: Draw) -> Arguments:
    s = draw.sizes
    return draw.normal(s.batch, s.tokens, s.width), draw.normal(4 * s.width, s.width) * 0.02, draw.normal(4 * s.width)


def _qkv(draw: Draw) -> Tensor:
    s = draw.sizes
    return draw.normal(s.batch, s.tokens, 3, s.heads, s.width // s.heads)


def _attention_backward(draw: Draw) -> Arguments:
    qkv = _qkv(draw)
    out, probs = ops.attention(qkv)
    return draw.normal(*out.shape), qkv, probs


def _perturb(draw: Draw) -> Arguments:
    e, g, w = draw.flat(), draw.flat(), draw.flat()
    norms = ops.layer_norms(g, draw.bounds())
    return e, g, w, norms, draw.bounds(), draw.number(0.05), False, 0.01


def _sgd(draw: Draw) -> Arguments:
    w, m, g = draw.flat(), draw.flat(), draw.flat()
    return w, m, w.bfloat16(), g, ops.global_norm(g), draw.number(0.01), 1.0, 0.9, 1e-4, False


def _adamw(draw: Draw) -> Arguments:
    w, m, v, g = draw.flat(), draw.flat(), draw.flat().square(), draw.flat()
    count = draw.number(3.0)
    return w, m, v, w.bfloat16(), g, ops.global_norm(g), count, draw.number(1e-3), 1.0, 0.9, 0.999, 1e-8, 0.05


REALISTIC: dict[str, Callable[[Draw], Arguments]] = {
    "uniform_start": lambda d: (
        d.images(), d.ids(), torch.tensor(5, device=d.device), d.number(8 / 255), 0, 0.0, 1.0,
    ),
    "linf_step": _pixels,
    "l2_step": _pixels,
    "global_norm": lambda d: (d.flat(),),
    "layer_norms": lambda d: (d.flat(), d.bounds()),
    "sam_perturb": _perturb,
    "sgd_update": _sgd,
    "adamw_update": _adamw,
    "gather_augment": _gather,
    "linear": _linear,
    "attention": lambda d: (_qkv(d),),
    "attention_backward": _attention_backward,
}  # fmt: skip


def arguments_for(op: ops.Op, device: torch.device | str, sizes: Sizes | None = None, seed: int = 0) -> Arguments:
    """Realistic arguments, or an unknown op's own largest sample."""
    if op.name in REALISTIC:
        return REALISTIC[op.name](Draw(device, sizes or sizes_for(device), seed))
    return max(op.samples(device, torch.float32, seed), key=lambda args: op.bytes_moved(*args))


def cpu_only(op: ops.Op) -> bool:
    """Whether the op is for CPUs: no Triton kernel, so on a GPU it is its reference, and there is nothing to time."""
    return op.triton is None


def check(op: ops.Op, arguments: Arguments) -> None:
    """Raises AssertionError where the op and its reference part on these arguments (which stay as they are)."""
    ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
    results = op.run(*ours), op.reference(*theirs)
    for a, b in zip((*_tensors(results[0]), *ours), (*_tensors(results[1]), *theirs), strict=True):
        if isinstance(a, Tensor):
            low = a.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, rtol=2**-7 if low else RTOL, atol=ATOL, equal_nan=True)


def _tensors(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def measure(
    op: ops.Op, device: torch.device | str, sizes: Sizes | None = None, *, calls: int = 10, repeats: int = 20
) -> dict[str, Any]:
    """The op and its reference on one set of arguments: microseconds, GB/s by `bytes_moved`, spread."""
    arguments = arguments_for(op, device, sizes)
    check(op, arguments)
    moved = op.bytes_moved(*arguments)
    row: dict[str, Any] = {"op": op.name, "runs_as": ops.active(op.name, device), "bytes": moved}
    ours = functools.partial(op.run, *arguments)
    # Many small kernels: they may wait for the host, so they are not captured, and so long that fewer calls do.
    theirs = functools.partial(op.reference, *arguments)
    timings = {
        "run": seconds_of(ours, device=device, calls=calls, repeats=repeats),
        "reference": seconds_of(theirs, device=device, calls=1, repeats=max(2, repeats // 4), graph=False),
    }
    for name, timing in timings.items():
        row[name] = {
            "us": timing.median * 1e6, "gb_per_s": moved / timing.median / 1e9, "spread": timing.spread,
            "n": len(timing.seconds),
        }  # fmt: skip
    return row | {"faster": row["reference"]["us"] / row["run"]["us"]}


def for_device(device: torch.device | str) -> list[ops.Op]:
    """The ops that have a kernel for this device."""
    return [op for op in ops.ALL if torch.device(device).type == "cpu" or not cpu_only(op)]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures all ops, prints a table, returns what --json writes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_ops", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the result here")
    options = parser.parse_args(arguments)
    cuda = options.device.startswith("cuda")
    copied = copy_gb_per_s(options.device, 1 << 30 if cuda else 1 << 27)
    print(f"a copy moves {copied:,.0f} GB/s")
    found = []
    for op in for_device(options.device):
        row = measure(op, options.device, calls=10 if cuda else 2, repeats=20 if cuda else 8)
        # At the sizes of a CPU the caches serve much of it: a share of the memory's bandwidth would mean nothing.
        row["share_of_copy"] = row["run"]["gb_per_s"] / copied if cuda else None
        found.append(row)
        print(line(row))
    result = {
        "what": "kernels", "device": hardware("cuda" if cuda else "cpu"),
        "copy_gb_per_s": copied, "rows": found, "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return result


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    run, share = row["run"], row["share_of_copy"]
    return (
        f"{row['op']:<20}{row['runs_as']:<10}{run['us']:>10,.1f} us ±{run['spread']:<5.0%}{run['gb_per_s']:>8,.1f} GB/s"
        f"{'' if share is None else f' ({share:.0%} of a copy)'}  {row['faster']:.2f}x its reference"
    )


@pytest.mark.parametrize("which", ["run", "reference"])
@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_op(benchmark: Any, op: ops.Op, which: str) -> None:
    """pytest-benchmark's view of the same; on a GPU with the synchronisation that one call costs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and cpu_only(op):
        pytest.skip(f"{op.name} is for CPUs")
    arguments = arguments_for(op, device)
    check(op, arguments)
    function = op.run if which == "run" else op.reference

    def call() -> None:
        function(*arguments)
        synchronise()

    benchmark.group = op.name
    benchmark.pedantic(call, rounds=7, iterations=2, warmup_rounds=1)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["gb_per_s"] = op.bytes_moved(*arguments) / seconds / 1e9
    if device == "cuda":
        benchmark.extra_info["copy_gb_per_s"] = copy_gb_per_s(device)


if __name__ == "__main__":
    main()
