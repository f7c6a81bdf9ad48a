"""The README's tables from the measurements under benchmarks/results.

    python -m benchmarks.report            writes them between their markers
    python -m benchmarks.report --check    changes nothing; exit code 1 if a table is not what the measurements say

A table stands between <!-- bench:step --> and <!-- /bench -->; there are step, ops and data. Of several measurements of
one thing on one device the newest counts. What was run in miniature counts nothing.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- bench:(\w+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
MISSING = "not yet measured"

Result = dict[str, Any]


def load(folder: Path) -> list[Result]:
    """All measurements, oldest first."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted((r for r in results if not r.get("dry")), key=lambda r: str(r.get("date", "")))


def step_table(results: Iterable[Result]) -> str:
    """One row a configuration and device: images/s, ratios, share of the bound, memory."""
    found = {_configuration(r): r for r in results if "variants" in r and "model" in r}
    head = [
        "device",
        "model",
        "batch",
        "trained",
        "images/s",
        "× plain",
        "× strong",
        "× full",
        "of the bound",
        "memory",
    ]
    return _by_device(head, [r["device"] for r in found.values()], [_step_row(r) for r in found.values()])


def ops_table(results: Iterable[Result]) -> str:
    """One row an op and device: microseconds, GB/s, share of a copy, against its reference."""
    found = {}
    for result in results:
        for row in result.get("rows", ()) if result.get("what") == "kernels" else ():
            if "run" in row:
                found[result["device"], row["op"]] = row
    head = ["device", "op", "runs as", "µs", "GB/s", "of a copy", "× reference"]
    return _by_device(head, [device for device, _ in found], [_op_row(d, row) for (d, _), row in found.items()])


def data_table(results: Iterable[Result]) -> str:
    """One row a device: images/s of the input pipeline."""
    found = {r["device"]: r for r in results if r.get("what") == "data"}
    rows = [
        [d, str(r["img_size"]), _speed(r["variants"]["ours"]), f"{r['ratios']['plain']:.1f}"] for d, r in found.items()
    ]
    return _by_device(["device", "pixels", "images/s", "× DataLoader"], list(found), rows)


TABLES: dict[str, Callable[[Iterable[Result]], str]] = {"step": step_table, "ops": ops_table, "data": data_table}


def _configuration(r: Result) -> tuple[Any, ...]:
    return r["device"], r["model"], r["img_size"], r["patch_size"], r["batch"], tuple(r["layers"])


def _step_row(r: Result) -> list[str]:
    ours, ratios = r["variants"]["ours"], r["ratios"]
    peak, plain = ours.get("peak_bytes"), r["variants"].get("plain", {}).get("peak_bytes")
    share = ours.get("share_of_bound")
    return [
        r["device"], f"{r['model']} {r['img_size']}/{r['patch_size']}", str(r["batch"]), _layers(r["layers"]),
        _speed(ours), *(_ratio(ratios.get(rival)) for rival in ("plain", "strong", "full")),
        "–" if share is None else f"{share:.0%}",
        "–" if peak is None else f"{peak / 2**30:.1f} GiB" + (f" ({peak / plain:.2f} × plain)" if plain else ""),
    ]  # fmt: skip


def _op_row(device: str, row: Result) -> list[str]:
    run, share = row["run"], row.get("share_of_copy")
    return [
        device, row["op"], row["runs_as"], f"{run['us']:,.1f}", f"{run['gb_per_s']:,.1f}",
        "–" if share is None else f"{share:.0%}", _ratio(row["faster"]),
    ]  # fmt: skip


def _layers(layers: list[str]) -> str:
    return ", ".join(layers) if len(layers) < 3 else f"{len(layers)} layers"


def _speed(row: Result) -> str:
    return f"{row['images_per_s']:,.0f} ± {row['spread']:.1%} (n = {row['n']})"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _by_device(head: list[str], devices: list[str], rows: list[list[str]]) -> str:
    """GPUs first; a line that says so where none has been measured."""
    order = sorted(range(len(rows)), key=lambda i: devices[i].startswith("cpu"))
    body = [rows[i] for i in order]
    if all(device.startswith("cpu") for device in devices):
        body = [["GPU", MISSING, *[""] * (len(head) - 2)], *body]
    rule = ["---", *["---" for _ in head[1:]]]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [head, rule, *body])


def fill(text: str, results: list[Result]) -> str:
    """The text with every marked table made anew. ValueError: a marker names no table."""

    def table(match: re.Match[str]) -> str:
        if match[2] not in TABLES:
            raise ValueError(f"no table bench:{match[2]}: choose one of {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]](results) + match[4]

    return MARKED.sub(table, text)


def main(arguments: list[str] | None = None) -> int:
    """Writes or checks; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    before = options.readme.read_text()
    after = fill(before, load(options.results))
    if options.check:
        if before != after:
            print(f"{options.readme.name} is not what the measurements say: run python -m benchmarks.report")
        return int(before != after)
    options.readme.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
