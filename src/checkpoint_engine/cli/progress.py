"""How a command shows that bytes move, and how it writes sizes, times and tables: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text


def size(nbytes: int) -> str:
    """Bytes in decimal units, three significant digits: "90.9 MB"."""
    value, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def speed(nbytes: int, seconds: float) -> str:
    """Gigabytes (10^9) per second; "-" when nothing moved."""
    return f"{nbytes / seconds / 1e9:.2f} GB/s" if nbytes and seconds > 0 else "-"


class Meter:
    """Counts bytes. Its methods may be called from any thread."""

    def __init__(self, total: int | None) -> None:
        self.done, self.total = 0, total
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        """So many more bytes are done."""
        with self._lock:
            self.done += nbytes
            self._changed()

    def reach(self, done: int, total: int) -> None:
        """So many bytes of so many are done."""
        with self._lock:
            self.done, self.total = max(self.done, done), total
            self._changed()

    def _changed(self) -> None:
        pass


class _Bar(Meter):
    def __init__(self, progress: Progress, label: str, total: int | None) -> None:
        super().__init__(total)
        self._progress, self._task = progress, progress.add_task(escape(label), total=total)

    def _changed(self) -> None:
        self._progress.update(self._task, completed=self.done, total=self.total)


@contextmanager
def meter(console: Console, label: str, total: int | None = None, show: bool = True) -> Iterator[Meter]:
    """A bar of `total` bytes while the block runs, which moves as the meter is told; without a total it is told one.

    Where `console` is no terminal: one line at the end, unless the block raised. show=False: nothing (other ranks).
    """
    if show and console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            yield _Bar(progress, label, total)
        return
    started, counted = time.monotonic(), Meter(total)
    yield counted
    seconds = time.monotonic() - started
    if show:
        line(console, f"{label}: {size(counted.done)} in {seconds:.2f} s, {speed(counted.done, seconds)}")


def line(console: Console, text: str) -> None:
    """One line, never wrapped and never interpreted as markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: int) -> None:
    """A table on a terminal, lines of aligned text elsewhere. The last `numbers` columns are aligned to the right."""
    left = len(columns) - numbers
    if console.is_terminal:
        drawn = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            drawn.add_column(column, justify="left" if index < left else "right", overflow="fold")
        for row in rows:
            drawn.add_row(*map(Text, row))  # as it is: names of tensors are no markup
        console.print(drawn)
        return
    line(console, title)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        line(console, "  " + "  ".join(cells).rstrip())
