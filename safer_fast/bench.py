"""Throughput of a training step on this machine, in the modes that it has here, against the eager one.

All take the same steps on the same random images. First they are shown to agree, then timed in turn (A B A B …).
"""

import copy
import shlex
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from . import profiling
from .attacks import PGD
from .engine import choose_mode, compile_step
from .layers import candidate_layers
from .models import create_model
from .optimizers import SGD
from .profiling import Timing, hardware, interleave, paired_ratio
from .progress import say, table
from .sam import SAM
from .seeds import mix
from .step import Step
from .train import device_named

EAGER = "eager"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Bench:
    """What is measured. None means: chosen by the device. layers: names with commas; default two late ones.

    repeats: timed steps of each mode. modes: of eager, native, compiled, captured, with commas.
    """

    model: str = "deit_tiny_patch16_224"
    img_size: int = 32
    patch_size: int = 4
    batch: int | None = None
    layers: str | None = None
    classes: int = 10
    attack_steps: int = 10
    repeats: int | None = None
    modes: str | None = None
    precision: str = "auto"
    device: str | None = None
    args: dict[str, Any] = field(default_factory=dict)  # to timm

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "batch", "classes", "attack_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if self.repeats is not None and self.repeats < 2:
            raise ValueError(f"repeats={self.repeats}: a spread needs two measurements or more")

    def arguments(self) -> list[str]:
        """As options of the command, those that differ from the defaults."""
        given = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "args"]
        default = Bench()
        return [
            text
            for name, value in given
            if value != getattr(default, name)
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]


def bench(what: Bench = Bench()) -> dict[str, Any]:
    """Checks that the modes agree, times them, prints a table; returns plain values.

    Raises ValueError for a mode that cannot be had here, AssertionError where two modes part.
    """
    device = device_named(what.device)
    model, batch = _build(what, device)
    steps = {mode: _step(what, model, mode) for mode in _modes(what, device)}
    gaps = _agree({mode: _losses(step, batch) for mode, step in steps.items()}, _precision(steps))
    repeats = what.repeats or (20 if device.type == "cuda" else 5)
    timings = interleave({mode: _once(step, batch) for mode, step in steps.items()}, repeats=repeats)
    result = _result(what, device, batch, steps, timings) | {"gaps": gaps}
    _show(result)
    return result


def profile(what: Bench, *, steps: int = 3) -> str:
    """Takes `steps` steps of one mode between cudaProfilerStart and Stop, its phases as NVTX ranges; the mode.

    For Nsight, which is started as `nsight_commands` says. Raises ValueError without a GPU.
    """
    device = device_named(what.device)
    if device.type != "cuda":
        raise ValueError(f"--profile marks a part of a run for Nsight, which needs an NVIDIA GPU; this is {device}")
    model, batch = _build(what, device)
    step = _step(what, model, _modes(what, device)[-1])
    profiling.enable()
    for _ in range(3):
        step(*batch)
    profiling.synchronise()
    torch.cuda.profiler.start()
    for _ in range(steps):
        with profiling.phase("step"):
            step(*batch)
    profiling.synchronise()
    torch.cuda.profiler.stop()
    return step.mode


def nsight_commands(what: Bench) -> list[str]:
    """The exact lines that profile this with Nsight Systems and Nsight Compute.

    Systems sees the fastest mode, every kernel of its graph. Compute looks closely at the first 60 kernels of the
    attack, nine tenths of a step; "pass1/", "perturb/", "pass2/" or "update/" in its place show the others. Phases are
    only seen where nothing is captured, so it runs the compiled mode. Clocks are left alone.
    """
    own = ["safer-fast", "bench", *what.arguments()]
    systems = [
        "nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--trace=cuda,nvtx,cublas,cudnn",
        "--cuda-graph-trace=node", "--output=safer-fast-step", *own, "--profile",
    ]  # fmt: skip
    one = own if what.modes else [*own, "--modes", "compiled"]
    compute = [
        "ncu", "--profile-from-start=off", "--clock-control=none", "--nvtx", "--nvtx-include", "attack/",
        "--launch-count=60", "--set=full", "--export=safer-fast-kernels", *one, "--profile",
    ]  # fmt: skip
    return [shlex.join(systems), shlex.join(compute)]


def _modes(what: Bench, device: torch.device) -> list[str]:
    """eager first, the fastest last."""
    usual = [EAGER, "compiled", "captured"] if device.type == "cuda" else [EAGER, "native"]
    modes = what.modes.split(",") if what.modes else usual
    for mode in modes:
        choose_mode(mode, device)
    return modes


def _build(what: Bench, device: torch.device) -> tuple[nn.Module, Batch]:
    """The model at random weights and a batch of random images, both drawn with fixed seeds."""
    torch.manual_seed(mix(0, "model"))
    model = create_model(
        what.model, num_classes=what.classes, img_size=what.img_size, patch_size=what.patch_size, **what.args
    )
    size = what.batch or (128 if device.type == "cuda" else 32)
    generator = torch.Generator().manual_seed(mix(0, "images"))
    channels = what.args.get("in_chans", 3)
    x = torch.rand(size, channels, what.img_size, what.img_size, generator=generator)
    y = torch.randint(what.classes, (size,), generator=generator)
    return model.to(device), (x.to(device), y.to(device))


def _step(what: Bench, model: nn.Module, mode: str) -> Step:
    return compile_step(
        copy.deepcopy(model), _layers(what, model), attack=PGD(steps=what.attack_steps), sam=SAM(),
        optimizer=SGD(lr=0.01), mode=mode, precision=what.precision,
    )  # fmt: skip


def _layers(what: Bench, model: nn.Module) -> list[str]:
    """Those asked for, or two layers from the last third, which is where the sharpest ones usually are."""
    if what.layers:
        return what.layers.split(",")
    names = list(candidate_layers(model))
    return sorted({names[len(names) * 7 // 10], names[len(names) * 17 // 20]}, key=names.index)


def _precision(steps: dict[str, Step]) -> str:
    return next(iter(steps.values())).precision


def _losses(step: Step, batch: Batch) -> list[float]:
    """Of the steps that are compared: 3 in fp32, 20 in lower precision."""
    return [float(step(*batch, seed=i)) for i in range(3 if step.precision == "fp32" else 20)]


def _agree(losses: dict[str, list[float]], precision: str) -> dict[str, float]:
    """How far each mode is from the first: in fp32 no loss by more than 1e-5; else the mean by no more than 1 %, since
    sign attacks part ways in the last bit. Raises AssertionError."""
    first, *others = losses
    gaps = {}
    for mode in others:
        if precision == "fp32":
            gap, allowed = max(abs(a - b) for a, b in zip(losses[mode], losses[first], strict=True)), 1e-5
        else:
            gap, allowed = abs(statistics.mean(losses[mode]) / statistics.mean(losses[first]) - 1), 0.01
        if not gap <= allowed:
            raise AssertionError(f"{mode} and {first} part: their losses differ by {gap:.1e}, {allowed:g} is allowed")
        gaps[mode] = gap
    return gaps


def _once(step: Step, batch: Batch) -> Callable[[], Tensor]:
    return lambda: step(*batch, seed=0)


def _result(
    what: Bench, device: torch.device, batch: Batch, steps: dict[str, Step], timings: dict[str, Timing]
) -> dict[str, Any]:
    size, first = len(batch[1]), next(iter(steps))
    return {
        "device": hardware(device),
        "variants": {
            mode: {
                "images_per_s": size / t.median, "spread": t.spread, "seconds": t.median, "n": len(t.seconds),
                "mode": steps[mode].mode, "reason": steps[mode].reason,
            }
            for mode, t in timings.items()
        },
        "ratios": {mode: paired_ratio(timings[first], t) for mode, t in timings.items() if mode != first},
        "against": first, "model": what.model, "img_size": what.img_size, "patch_size": what.patch_size, "batch": size,
        "layers": list(steps[first].store.layers), "precision": _precision(steps),
        "command": shlex.join(["safer-fast", "bench", *what.arguments()]), "torch": torch.__version__,
    }  # fmt: skip


def _show(result: dict[str, Any]) -> None:
    rows: list[Sequence[str]] = [
        [
            mode, f"{row['images_per_s']:,.1f}", f"±{row['spread']:.1%}",
            f"{result['ratios'][mode]:.2f}x" if mode in result["ratios"] else "", row["reason"],
        ]
        for mode, row in result["variants"].items()
    ]  # fmt: skip
    title = (
        f"{result['model']} at {result['img_size']} px, batch {result['batch']}, {result['precision']}, "
        f"{', '.join(result['layers'])} trained, on {result['device']}"
    )
    table(title, ["mode", "images/s", "spread", f"against {result['against']}", "because"], rows)
    say(f"the modes agree; median of {next(iter(result['variants'].values()))['n']} steps each")
