"""What a trace of PyTorch's profiler says: which kernels take the time, and when nothing runs."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Event(NamedTuple):
    """Something that ran, in microseconds."""

    name: str
    start: float
    end: float


def read(trace: dict[str, Any], category: str) -> list[Event]:
    """The events of a category ("kernel": the GPU's, copies and fills among them), by their start."""
    wanted = {category, "gpu_memcpy", "gpu_memset"} if category == "kernel" else {category}
    found = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("cat") in wanted]
    return sorted(
        (Event(e["name"], float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in found), key=lambda e: e.start
    )


def top(events: Iterable[Event], n: int) -> list[dict[str, Any]]:
    """The n names that take most time: microseconds, calls, share of the sum."""
    times: dict[str, list[float]] = {}
    for event in events:
        times.setdefault(event.name, []).append(event.end - event.start)
    whole = sum(map(sum, times.values())) or 1.0
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))[:n]
    return [{"kernel": k[:160], "us": sum(v), "calls": len(v), "share": sum(v) / whole} for k, v in ranked]


def gaps(events: Sequence[Event], n: int = 5) -> dict[str, Any]:
    """From the first event to the last: microseconds in all, busy (overlaps counted once), idle; the n longest gaps."""
    if not events:
        return {"ok": False, "error": "the trace has no events of the device"}
    reached, last = events[0].end, events[0].name
    holes: list[dict[str, Any]] = []
    for event in events[1:]:
        if event.start > reached:
            holes.append({"us": event.start - reached, "after": last[:80], "before": event.name[:80]})
        if event.end > reached:
            reached, last = event.end, event.name
    span, idle = reached - events[0].start, sum(h["us"] for h in holes)
    longest = sorted(holes, key=lambda h: -h["us"])[:n]
    return {
        "span_us": span, "busy_us": span - idle, "idle_us": idle, "idle_share": idle / span if span else 0.0,
        "events": len(events), "gaps": len(holes), "longest": longest,
    }  # fmt: skip


def by_phase(trace: dict[str, Any], phases: Sequence[str], *, cuda: bool) -> dict[str, float]:
    """Microseconds of each named range, on the GPU's side where there is one. A replayed graph has none."""
    category = "gpu_user_annotation" if cuda else "user_annotation"
    found: dict[str, float] = {}
    for event in read(trace, category):
        if event.name in phases:
            found[event.name] = found.get(event.name, 0.0) + event.end - event.start
    return found
