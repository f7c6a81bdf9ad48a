"""Honest timing: variants interleaved on a synchronised clock; on a GPU graph replays between events; its ceilings.

`Timing`, `interleave` and `paired_ratio` are the package's own, which `safer-fast bench` times with.
"""

from collections.abc import Callable

import torch

from safer_fast import ops
from safer_fast.profiling import Timing, clock, interleave, paired_ratio, synchronise

__all__ = [
    "Timing", "ceilings", "clock", "copy_gb_per_s", "interleave", "matmul_tflops", "paired_ratio", "seconds_of", "synchronise",
]  # fmt: skip


def seconds_of(
    run: Callable[[], object], *, device: torch.device | str, calls: int = 10, repeats: int = 20, graph: bool = True
) -> Timing:
    """Seconds of one call, `repeats` times. On a GPU `calls` of them are replayed as one graph, so that no host time
    comes between them; on a CPU, and with graph=False, they follow each other on a synchronised clock."""
    if torch.device(device).type == "cuda" and graph:
        return _replayed(run, calls, repeats)
    run()
    return Timing([clock(lambda: [run() for _ in range(calls)]) / calls for _ in range(repeats)])


def _replayed(run: Callable[[], object], calls: int, repeats: int) -> Timing:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets libraries allocate
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    seconds = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / calls)
    return Timing(seconds)


def copy_gb_per_s(device: torch.device | str, nbytes: int = 1 << 30) -> float:
    """Bytes read and written by a copy of a random buffer, in GB/s: the bandwidth that a kernel can be held to.

    The buffer has to be several times the last cache to measure memory.
    """
    source = torch.rand(nbytes // 4, device=device)
    target = torch.full_like(source, float("nan"))
    timing = seconds_of(lambda: target.copy_(source), device=device, calls=3, repeats=10)
    assert torch.equal(source, target)
    return 2 * source.nbytes / timing.median / 1e9


def matmul_tflops(device: torch.device | str, dtype: torch.dtype, n: int = 8192) -> float:
    """TFLOP/s of an n×n×n product of random matrices, the better of PyTorch's product and ours: the rate that a model
    can be held to."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = min(
        seconds_of(run, device=device, calls=3, repeats=10).median
        for run in (lambda: torch.mm(a, b, out=out), lambda: ops.linear(a, b, None))
    )
    return 2 * n**3 / best / 1e12


def ceilings(device: torch.device | str) -> tuple[float, float]:
    """TFLOP/s of products in the dtype that a step takes here, and GB/s of a copy."""
    if torch.device(device).type == "cuda":
        return matmul_tflops(device, torch.bfloat16), copy_gb_per_s(device)
    return matmul_tflops(device, torch.float32, 1024), copy_gb_per_s(device, 1 << 27)
