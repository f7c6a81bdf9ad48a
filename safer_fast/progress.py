"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere. The owner of rich."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PLAIN_SECONDS = 20.0
BAR_SECONDS = 0.5

Advance = Callable[..., None]


@contextmanager
def track(label: str, total: int, *, unit: str = "images") -> Iterator[Advance]:
    """Yields advance(n, **metrics): n more of `total` are done. Metrics are numbers or 0-D tensors.

    Tensors are read (a synchronisation) only when something is drawn: twice a second on a terminal, every 20 seconds
    elsewhere.
    """
    drawer = _bar(label, total, unit) if sys.stderr.isatty() else _plain(label, total, unit)
    with drawer as advance:
        yield advance


def say(text: str) -> None:
    """One plain line to the user, now."""
    print(text, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table: first column to the left, others to the right. Plain, aligned text where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return _plain_table(title, columns, rows)
    drawn = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    # Elsewhere than on a terminal rich assumes 80 columns and would cut cells.
    Console(width=None if sys.stdout.isatty() else 120).print(drawn)
    return None


def _plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    say(title)
    for row in cells:
        say("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


@contextmanager
def _bar(label: str, total: int, unit: str) -> Iterator[Advance]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        with _plain(label, total, unit) as advance:
            yield advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total, text="")
        start, drawn, done = time.perf_counter(), 0.0, 0

        def advance(n: int, **metrics: Any) -> None:
            nonlocal drawn, done
            done += n
            now = time.perf_counter()
            if now - drawn > BAR_SECONDS or done >= total:
                drawn = now
                progress.update(task, completed=done, text=_text(done, now - start, unit, metrics))

        yield advance


@contextmanager
def _plain(label: str, total: int, unit: str) -> Iterator[Advance]:
    start = said = time.perf_counter()
    done = 0

    def advance(n: int, **metrics: Any) -> None:
        nonlocal said, done
        done += n
        now = time.perf_counter()
        if now - said > PLAIN_SECONDS:
            said = now
            print(f"{label}: {done}/{total}, {_text(done, now - start, unit, metrics)}", file=sys.stderr, flush=True)

    yield advance


def _text(done: int, seconds: float, unit: str, metrics: dict[str, Any]) -> str:
    shown = "".join(f", {name} {float(value):.3f}" for name, value in metrics.items())
    return f"{done / max(seconds, 1e-9):,.0f} {unit}/s{shown}"
