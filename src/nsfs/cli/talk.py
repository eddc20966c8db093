"""What nsfs says to people while it works: notes, progress, errors; on stderr, never on stdout.

Three voices with the same three words: bars on a terminal, plain lines elsewhere, JSON lines for log collectors. One
thread. A progress report is seen a few times a second, also while a finished piece of work waits for another, so the
plain voice speaks at the first and the last one of a piece of work, and every ten seconds between; the JSON voice
whenever there is something new.
"""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from math import inf
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from nsfs.model.report import render_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from nsfs.errors import NsfsError
    from nsfs.model.report import Progress

_PATIENCE = 10.0
"""Seconds between plain lines about one piece of work."""


class Talk(Protocol):
    """A voice."""

    def note(self, text: str) -> None:
        """Say one sentence."""

    def progress(self, report: Progress) -> None:
        """Say how far a piece of work is."""

    def error(self, error: NsfsError) -> None:
        """Say what went wrong, and what helps."""


class PlainTalk:
    """Lines."""

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._quiet = quiet
        self._clock = clock
        self._due: dict[tuple[str, str], float] = {}

    def note(self, text: str) -> None:
        """Say `text`, unless quiet."""
        if not self._quiet:
            self._line(text)

    def progress(self, report: Progress) -> None:
        """Say it where it is the first or last report of this work, or the last one said is old."""
        work = (report.stage, report.what)
        ended = 0 < report.total <= report.done
        due = self._due.get(work, 0.0)
        if self._quiet or due == inf or not (ended or self._clock() >= due):
            return
        self._due[work] = inf if ended else self._clock() + _PATIENCE
        self._line(f"{report.stage} {report.what}: {_how_far(report)}")

    def error(self, error: NsfsError) -> None:
        """Say it however quiet we are."""
        self._line(f"nsfs: {error.message}")
        if error.hint:
            self._line(f"hint: {error.hint}")

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


def _how_far(report: Progress) -> str:
    if not report.total:
        return render_size(report.done) if report.done else "begun"
    if report.done >= report.total:
        return f"{render_size(report.total)}, done"
    return f"{render_size(report.done)} of {render_size(report.total)}"


class JsonTalk:
    """One JSON object a line."""

    def __init__(self, stream: TextIO, *, quiet: bool = False) -> None:
        self._stream = stream
        self._quiet = quiet
        self._said: dict[tuple[str, str], Progress] = {}

    def note(self, text: str) -> None:
        """Level info."""
        self._line("info", text)

    def progress(self, report: Progress) -> None:
        """Level info, with the figures as fields."""
        work = (report.stage, report.what)
        if self._said.get(work) == report:
            return
        self._said[work] = report
        self._line("info", "progress", stage=report.stage, what=report.what, done=report.done, total=report.total)

    def error(self, error: NsfsError) -> None:
        """Level error, with code and exit code."""
        self._line("error", error.message, hint=error.hint, code=error.code, exit_code=error.exit_code)

    def _line(self, level: str, message: str, **fields: Any) -> None:  # noqa: ANN401  any JSON value
        if self._quiet and level == "info":
            return
        self._stream.write(json.dumps({"level": level, "message": message} | fields) + "\n")
        self._stream.flush()


class TerminalTalk:
    """Bars, one for each piece of work; they vanish when the work is over."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[tuple[str, str], TaskID] = {}

    def note(self, text: str) -> None:
        """Above the bars."""
        self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, report: Progress) -> None:
        """Move the bar of this work."""
        work = (report.stage, report.what)
        if work not in self._tasks:
            self._bars.start()
            self._tasks[work] = self._bars.add_task(f"{report.stage} {report.what}", total=None)
        self._bars.update(self._tasks[work], completed=report.done, total=report.total or None)

    def error(self, error: NsfsError) -> None:
        """Below what was there."""
        self._bars.stop()
        self._bars.console.print(f"nsfs: {error.message}", markup=False, highlight=False, soft_wrap=True)
        if error.hint:
            self._bars.console.print(f"hint: {error.hint}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def open_talk(form: str, level: str, stream: TextIO) -> Iterator[Talk]:
    """Give the voice for `stream`: `form` is text or json, `level` the least that is said."""
    quiet = level in {"warning", "error"}
    if form == "json":
        yield JsonTalk(stream, quiet=quiet)
    elif quiet or not stream.isatty():
        yield PlainTalk(stream, quiet=quiet)
    else:
        bars = _make_bars(stream)
        try:
            yield TerminalTalk(bars)
        finally:
            bars.stop()


def _make_bars(stream: TextIO) -> Bars:
    from rich import progress  # noqa: PLC0415  30 ms that only a terminal needs
    from rich.console import Console  # noqa: PLC0415

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=Console(file=stream), transient=True)
