"""A request to stop, SIGTERM above all: where it is noted, where it is obeyed, and by when.

Between two steps of ``fit`` there is something to save, so the signal is noted and the loop saves. Everywhere else
nothing is lost by ending at once: finished arms and checkpoints are whole on the disk at any moment.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

RESUME_EXIT_CODE = 75
"""Exit status of a run that was told to stop, has saved, and wants to be started again (EX_TEMPFAIL)."""
GRACE = 8.0
"""Seconds in which the loop must come to the end of a step, an evaluation or a compilation, and in which a run that
has saved must end. After them the process ends as it is, and continues from the checkpoint before."""
AT_EXIT: list[Callable[[], object]] = []
"""What a process that ends at once still does: locks are released, the terminal gets its cursor back."""


class Preempted(Exception):
    """SIGTERM (or the cluster) asked the run to stop; its state has been saved."""


class _Notice:
    """What this process has been told, and what it does about it."""

    def __init__(self) -> None:
        self.requested = False
        self.listeners = 0  # nested StopSignals
        self.checks = 0
        self.unsaved = False  # the loop has steps that no checkpoint holds, and will look at `requested`
        self.saving = False  # it has looked


_notice = _Notice()


class StopSignal:
    """Notes SIGTERM, and others if asked, instead of dying; in several processes JAX's own preemption service listens.

    Where one stands inside another, the request lasts until the outer one ends.

    Args:
      numbers: the signals.
    """

    def __init__(self, *numbers: int):
        self._numbers = numbers or (signal.SIGTERM,)
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        import jax

        _notice.listeners += 1
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in self._numbers:
                self._previous[number] = signal.signal(number, _note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        _notice.listeners -= 1
        _notice.unsaved = _notice.saving = False
        if not _notice.listeners:
            _notice.requested = False

    @property
    def requested(self) -> bool:
        """Whether to stop now; every process of a run must ask equally often, and all get the same answer."""
        return stop_requested()

    def unsaved(self) -> None:
        """Say that there is something to save, and that ``requested`` is asked soon; true until the block ends."""
        _notice.unsaved = True

    def saving(self) -> None:
        """Say that it is being saved."""
        _notice.saving = True


def _note(number: int, frame: Any) -> None:
    if _notice.requested and number == signal.SIGINT:  # a second Ctrl-C means now
        raise KeyboardInterrupt
    _notice.requested = True


def stop_requested() -> bool:
    """Whether this process was told to stop; in several processes, whether all are to stop here.

    There JAX agrees on the number of the check at which they do. It counts on through the whole process, so that a
    signal near the end of one run is obeyed at the start of the next.
    """
    import jax

    if jax.process_count() > 1 and not _notice.requested:
        from jax.experimental import multihost_utils

        _notice.checks += 1
        _notice.requested = multihost_utils.reached_preemption_sync_point(_notice.checks)
    return _notice.requested


def check_stop(what: str = "stopped; the same command continues.") -> None:
    """End here if a ``StopSignal`` around this call has noted a request; nothing needs saving.

    Raises:
      Preempted: with ``what``.
    """
    if _notice.listeners and stop_requested():
        raise Preempted(what)


@contextlib.contextmanager
def end_on_sigterm(message: str) -> Generator[None]:
    """Around a whole command: SIGTERM ends the process with ``RESUME_EXIT_CODE``, at once where nothing is unsaved.

    A thread does it, as Python runs a signal's handler only between two instructions, and a compilation is one.
    Several processes of one run are left to JAX's preemption service, whose handler replaces this one.

    Args:
      message: what to print when the process ends at once.
    """
    end, begin = os.pipe()  # read, write
    os.set_blocking(begin, False)
    signal.signal(signal.SIGTERM, _note)
    signal.set_wakeup_fd(begin, warn_on_full_buffer=False)
    threading.Thread(target=_wait_and_end, args=(end, message), daemon=True, name="sigterm").start()
    _notice.listeners += 1
    yield  # the handler stays: the command is over, and so is the process


def _wait_and_end(pipe: int, message: str) -> None:
    while signal.SIGTERM not in os.read(pipe, 1):
        pass
    _notice.requested = True
    was_unsaved = _notice.unsaved
    deadline = time.monotonic() + GRACE
    while _notice.unsaved and (_notice.saving or time.monotonic() < deadline):
        time.sleep(0.02)
    if was_unsaved and not _notice.unsaved:  # it has saved, and is on its way out with a message of its own
        time.sleep(GRACE)
    end_now(message)


def end_now(message: str) -> None:
    """End the process with ``RESUME_EXIT_CODE``: no thread, no clean-up of a library is waited for."""
    for action in AT_EXIT:
        with contextlib.suppress(Exception):
            action()
    with contextlib.suppress(Exception):
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(RESUME_EXIT_CODE)
