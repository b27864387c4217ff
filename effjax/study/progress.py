"""A progress bar in a terminal, a line now and then elsewhere; both with the time left."""

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from effjax.train.signals import AT_EXIT


class Progress:
    """Counts work done against work planned, in milliseconds of expected device time or in any other unit.

    The time left follows from the pace of the work itself: what passes between ``say`` and the next ``reach``
    (preparing, compiling, measuring) is in no pace, and the time left stands still meanwhile.

    Args:
      quiet: show nothing (tests, all processes but the first).
      every: seconds between lines when the output is no terminal.
      stream: where it is shown; standard error if None.
      clock: seconds; another one in tests.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        every: float = 10.0,
        stream: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._quiet, self._every, self._clock = quiet, every, clock
        self._stream = stream
        self._bar: Any = None
        self._task: Any = None
        self._what = "starting"
        self._printed = -math.inf
        self.plan(0.0)

    def __enter__(self) -> "Progress":
        stream = self._stream or sys.stderr
        if not self._quiet and stream.isatty():
            self._bar = _bar(stream, self)
            self._bar.start()
            AT_EXIT.append(self._show_cursor)
            self._task = self._bar.add_task(self._what, total=self._total or None)
            self._bar.update(self._task, completed=self._done)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            AT_EXIT.remove(self._show_cursor)
            self._bar.stop()

    def _show_cursor(self) -> None:
        """What a process that ends at once still owes to a terminal."""
        print("\x1b[?25h", file=self._stream or sys.stderr, flush=True)

    def plan(self, total: float, done: float = 0.0, *, expected_s: float | None = None) -> None:
        """Set the whole work and what earlier runs have done of it.

        Args:
          total: the whole work.
          done: of it, by earlier runs.
          expected_s: seconds per unit of work, used until the pace is known: 1e-3 for milliseconds. Until then None
            shows no time left.
        """
        self._total, self._done = total, done
        self._pace, self._seconds, self._work = expected_s, 0.0, 0.0
        self._since: float | None = None
        if self._bar is not None:
            self._bar.reset(self._task, total=total or None, completed=done)

    def say(self, what: str) -> None:
        """Name what runs now; until the next ``reach`` the time left stands still."""
        self._what, self._since = what, None
        if self._bar is not None:
            self._bar.update(self._task, description=what)
        elif not self._quiet:
            self._print()

    def compiling(self, label: str) -> Callable[[int, int], None]:
        """A function for ``fit`` to tell which executable it compiles; the last call names ``label`` again."""
        return lambda done, total: self.say(
            label if done == total else f"{label}: compiling batch shape {done + 1} of {total}"
        )

    def reach(self, done: float) -> None:
        """Set the work done so far."""
        now = self._clock()
        if self._since is not None and done > self._done:
            self._seconds += now - self._since
            self._work += done - self._done
            self._pace = self._seconds / self._work
        self._since, self._done = now, done
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif not self._quiet and now - self._printed > self._every:
            self._print()

    def left(self) -> float | None:
        """Seconds left, None while unknown. Between two calls of ``reach`` it counts down, never up."""
        if not self._total or self._pace is None:
            return None
        gone = 0.0 if self._since is None else self._clock() - self._since
        return max(0.0, self._pace * (self._total - self._done) - gone)

    def _print(self) -> None:
        share = left = ""
        if self._total:
            seconds = self.left()
            left = "" if seconds is None else f", {clock_face(seconds)} left"
            share = f"[{min(1.0, self._done / self._total):4.0%}{left}] "
        print(f"{share}{self._what}", file=self._stream or sys.stderr, flush=True)
        self._printed = self._clock()


def clock_face(seconds: float | None) -> str:
    """Hours, minutes and seconds as rich's columns write them.

    Example:
      >>> clock_face(75.2), clock_face(None)
      ('0:01:16', '-:--:--')
    """
    if seconds is None:
        return "-:--:--"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _bar(stream: Any, progress: Progress):
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar
    from rich.text import Text

    class Left(ProgressColumn):
        """rich's column of the time left, with the pace of the work in place of the pace of all that happens."""

        max_refresh = 0.5

        def render(self, task):
            return Text(clock_face(progress.left()), style="progress.remaining")

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        Left(),
        console=Console(file=stream, force_terminal=True),
    )
