"""What a profiler and a stopwatch need: named ranges around the phases of a step, and honest timing.

Ranges are off, and then cost a look at a variable, until `enable()` or SAFER_FAST_NVTX=1 in the environment. The owner
of nvtx: it is imported only when ranges are switched on, PyTorch's own NVTX is taken where it is not installed, and
where there is neither the ranges stay empty.
In a captured step they are seen while it is captured, not when it is replayed; profile mode "compiled" for phases.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

PHASES = ("attack", "pass1", "perturb", "pass2", "update")

Mark = Callable[[str], AbstractContextManager[Any]]

_mark: Mark | None = None
_NOTHING: AbstractContextManager[None] = nullcontext()


def phase(name: str) -> AbstractContextManager[Any]:
    """A range of this name around the block, where ranges are on: `with phase("attack"): …`."""
    return _NOTHING if _mark is None else _mark(name)


def enable(mark: Mark | None = None) -> str:
    """Switches the ranges on and says what draws them: "nvtx", "torch.cuda.nvtx" or "nothing".

    mark: draws them instead, torch.profiler.record_function for example.
    """
    global _mark
    who, _mark = ("given", mark) if mark else _find()
    return who


def disable() -> None:
    """Switches them off again."""
    global _mark
    _mark = None


def _find() -> tuple[str, Mark | None]:
    try:
        from nvtx import annotate
    except ImportError:
        return ("torch.cuda.nvtx", _torch_range) if torch.cuda.is_available() else ("nothing", None)
    return "nvtx", annotate


@contextmanager
def _torch_range(name: str) -> Iterator[None]:
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


class Timing(NamedTuple):
    """Seconds of each repeat."""

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a fraction of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def interleave(variants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> dict[str, Timing]:
    """Times each variant `repeats` times (2 or more), in turn (A B A B …), after `warmup` turns that do not count."""
    if repeats < 2:
        raise ValueError(f"repeats={repeats}: a spread needs two measurements or more")
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(warmup + repeats):
        for name, run in variants.items():
            elapsed = clock(run)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(values) for name, values in seconds.items()}


def paired_ratio(a: Timing, b: Timing) -> float:
    """Median over the turns of a/b: what drifts in the machine's speed hits both sides of a pair."""
    return statistics.median(x / y for x, y in zip(a.seconds, b.seconds, strict=True))


def clock(run: Callable[[], object]) -> float:
    """Wall seconds of one call, the GPU waited for."""
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if os.environ.get("SAFER_FAST_NVTX", "") not in ("", "0"):
    enable()


def hardware(device: torch.device | str) -> str:
    """What computes: the GPU's name, or processor, instruction set and threads, on which a CPU's ratios depend."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu: {_processor()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
