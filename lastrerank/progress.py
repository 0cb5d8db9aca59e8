"""A progress bar on stderr, or in a notebook, for work that turns out to be long."""

from __future__ import annotations

import shutil
import sys
from typing import Any

# Seconds of silence before a bar appears by itself.
PATIENCE = 2.0


class Progress:
    """Counts work. show: True always, False never, None on a terminal or in a notebook after `PATIENCE` seconds.

    total: of the whole work, in `unit`s.
    """

    def __init__(self, title: str, unit: str, show: bool | None, total: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty() or "ipykernel" in sys.modules if show is None else show:
            from tqdm.auto import tqdm

            form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} {unit} [{elapsed}<{remaining}]"
            delay = PATIENCE if show is None else 0.0
            # tqdm shows nothing on a terminal that doesn't know its size; COLUMNS and LINES, or 80 and 24, are better.
            size = shutil.get_terminal_size() if sys.stderr.isatty() else None
            self._bar = tqdm(
                total=total, desc=title, unit=unit, leave=False, delay=delay, bar_format=form,
                ncols=size and size.columns, nrows=size and size.lines,
            )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: float) -> None:
        """Count some more of it."""
        if self._bar is not None:
            self._bar.update(amount)
