"""A progress bar in a terminal, a line now and then elsewhere; both with the time left."""

import sys
import time
from collections.abc import Callable
from types import TracebackType


class Progress:
    """Counts work done against work planned, in milliseconds of expected device time.

    Args:
      quiet: show nothing (tests, all processes but the first).
      every: seconds between lines when the output is no terminal.
    """

    def __init__(self, *, quiet: bool = False, every: float = 10.0):
        self._quiet, self._every = quiet, every
        self._bar = self._task = None
        self._total = self._done = 0.0
        self._printed = self._began = time.monotonic()

    def __enter__(self) -> "Progress":
        if not self._quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def plan(self, total: float, done: float = 0.0) -> None:
        """Set the whole work and what earlier runs have done of it."""
        self._total, self._done = total, done
        self._began, self._at_start = time.monotonic(), done
        if self._bar is not None:
            self._bar.reset(self._task, total=total, completed=done)

    def say(self, what: str) -> None:
        """Name what runs now."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        elif not self._quiet:
            print(f"{self._left()}{what}", file=sys.stderr, flush=True)
            self._printed = time.monotonic()
        self._what = what

    def compiling(self, label: str) -> Callable[[int, int], None]:
        """A function for ``fit`` to tell which executable it compiles; the last call names ``label`` again."""
        return lambda done, total: self.say(
            label if done == total else f"{label}: compiling batch shape {done + 1} of {total}"
        )

    def reach(self, done: float) -> None:
        """Set the work done so far."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif not self._quiet and time.monotonic() - self._printed > self._every:
            self.say(self._what)

    def _left(self) -> str:
        if not self._total:
            return ""
        spent, gained = time.monotonic() - self._began, self._done - self._at_start
        left = f", {spent * (self._total - self._done) / gained:.0f} s left" if gained > 0 else ""
        return f"[{self._done / self._total:4.0%}{left}] "
