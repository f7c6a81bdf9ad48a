"""Honest timing: variants interleaved (A B A B …), medians, spreads, a synchronised clock."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


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
    """Times each variant `repeats` times, in turn, after `warmup` turns that do not count."""
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
