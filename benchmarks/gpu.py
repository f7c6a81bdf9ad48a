"""What a GPU has to show, as independent stages, the most valuable first: make gpu, or

    python -m benchmarks.gpu --only ops,agreement --budget 500 --json benchmarks/results
    python -m benchmarks.gpu --only throughput:vit-b-224

Each stage is a process of its own with a time limit, so that neither an exception nor a hung or poisoned GPU takes the
others with it. It writes <date>-<stage>-<device>.json row by row, so that a stage cut short keeps what it has. Nothing
has to be installed: it runs from a checkout. The last lines sum up; the exit code is 0 if every stage ran and found
nothing wrong, 1 if one failed or ran out of time, 2 if the budget was spent before all had run.
--dry, or no GPU: every stage in miniature on the CPU, results kept only with --json.
"""

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
FAILED, OUT_OF_TIME, NOT_RUN, OK = "failed", "out of time", "not run", "ok"


class Record:
    """A stage's result: rows as they come, each written at once. `ok=False` in a row fails the stage."""

    def __init__(self, stage: str, folder: Path, *, dry: bool) -> None:
        self.path = path_of(stage, folder)
        self.part = stage.partition(":")[2]
        self.rows: list[dict[str, Any]] = []
        self.head: dict[str, Any] = {
            "what": stage_of(stage), "status": OUT_OF_TIME, "dry": dry, "device": device_name(), "torch": torch.__version__,
            "date": datetime.date.today().isoformat(), "rows": self.rows,
        }  # fmt: skip
        self.write()

    def row(self, **values: Any) -> None:
        """Keeps a row, and shows it."""
        self.rows.append(values)
        print("  " + "  ".join(f"{k} {_short(v)}" for k, v in values.items()), flush=True)
        self.write()

    def close(self, **values: Any) -> None:
        """The stage's end."""
        self.head |= values
        self.write()

    def write(self) -> None:
        """To a file beside it and renamed: a reader never sees half a file."""
        part = self.path.with_suffix(".part")
        text = json.dumps(self.head, indent=2, default=str).replace(f"{Path.cwd()}/", "")  # no folder of this machine
        part.write_text(text + "\n")
        part.replace(self.path)


def device_name() -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def slug() -> str:
    """The device's name as a part of a file's."""
    return device_name().lower().replace(" ", "-")


def path_of(what: str, folder: Path) -> Path:
    """<date>-<what>-<device>.json"""
    return folder / f"{datetime.date.today().isoformat()}-{what.replace(':', '-')}-{slug()}.json"


def stage_of(name: str) -> str:
    """The stage in `stage` or `stage:part`."""
    return name.partition(":")[0]


def run_stage(name: str, folder: Path, *, dry: bool) -> str:
    """Runs a stage in this process; what became of it."""
    from benchmarks.stages import STAGES

    record = Record(name, folder, dry=dry)
    start = time.perf_counter()
    try:
        STAGES[stage_of(name)].run(record, dry)
        bad = [row for row in record.rows if row.get("ok") is False]
        status, detail = (FAILED, f"{len(bad)} of {len(record.rows)} rows") if bad else (OK, f"{len(record.rows)} rows")
    except Exception as error:
        traceback.print_exc()
        status, detail = FAILED, f"{type(error).__name__}: {error}"[:500]
        record.head["traceback"] = traceback.format_exc()
    record.close(status=status, detail=detail, seconds=round(time.perf_counter() - start, 1))
    return status


def run_apart(name: str, folder: Path, *, dry: bool, limit: float) -> str:
    """Runs a stage in a process of its own, ended with all its children after `limit` seconds."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--stage", name, "--json", str(folder), *(["--dry"] * dry)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return OUT_OF_TIME
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return OK if process.returncode == 0 else FAILED


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages; the exit code."""
    from benchmarks.stages import STAGES

    options = _options(arguments, list(STAGES))
    dry = options.dry or not torch.cuda.is_available()
    folder = Path(options.json) if options.json else Path(tempfile.mkdtemp()) if dry else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    if options.stage:
        return 0 if run_stage(options.stage, folder, dry=dry) == OK else 1
    end, found = time.monotonic() + options.budget, {}
    for name in options.only:
        left = end - time.monotonic()
        if left < 5:
            found[name] = (NOT_RUN, "the budget is spent")
            continue
        stage = STAGES[stage_of(name)]
        print(f"{name}: {stage.what}", flush=True)
        status = run_apart(name, folder, dry=dry, limit=min(left, stage.seconds))
        found[name] = (status, _detail(path_of(name, folder)))
    return _sum_up(found, folder, dry=dry)


def _sum_up(found: dict[str, tuple[str, str]], folder: Path, *, dry: bool) -> int:
    print(f"\n{device_name()}{', in miniature' if dry else ''}, results in {folder}")
    for name, (status, detail) in found.items():
        print(f"{name:<24} {status:<12} {detail}")
    states = {status for status, _ in found.values()}
    if states & {FAILED, OUT_OF_TIME}:
        return 1
    return 2 if NOT_RUN in states else 0


def _detail(path: Path) -> str:
    """A line on a stage's file."""
    if not path.exists():
        return "nothing was written: it ended before it began"
    result = json.loads(path.read_text())
    return f"{result.get('detail', str(len(result['rows'])) + ' rows')}, {result.get('seconds', '?')} s"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) < 100 else text[:97] + "…"


def _options(arguments: list[str] | None, stages: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(stages), help="stages with commas, run in this order")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for all of them")
    parser.add_argument("--json", help="folder for the results; default benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="in miniature")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.only = options.only.split(",")
    unknown = set(map(stage_of, options.only)) - set(stages)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}; choose of {', '.join(stages)}")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
