"""A progress bar on stderr for work that turns out to be long."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

# Seconds of silence before a bar appears by itself.
PATIENCE = 2.0


class Progress:
    """Counts work whose total may grow. show: True always, False never, None on a terminal after `PATIENCE` seconds."""

    def __init__(self, title: str, unit: str, show: bool | None) -> None:
        self._title, self._unit = title, unit
        self._show = sys.stderr.isatty() if show is None else show
        self._wait = PATIENCE if show is None else 0.0
        self._done = self._total = 0
        self._started = time.monotonic()
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add_total(self, amount: int) -> None:
        self._total += amount

    def advance(self, amount: int) -> None:
        self._done += amount
        if not self._show or time.monotonic() - self._started < self._wait:
            return
        if self._bar is None or self._task is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self._unit))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total)
        self._bar.update(self._task, completed=self._done, total=self._total)
