"""An expert behind a Python callable, which may be late, fail, or answer nonsense: then the base model answers."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from effjax.core.errors import check_number
from effjax.core.shapes import check_ladder, smallest_fit
from effjax.hardness.dispatch import Dispatched, check_batch

__all__ = ["RemoteEvents", "RemoteExpert", "dispatch_remote"]

_log = logging.getLogger("effjax")
Call = Callable[[PyTree], PyTree]


class RemoteEvents(NamedTuple):
    """What became of a remote expert's calls; every call counts in one of the last six once it is over.

    Attributes:
      calls: started or refused.
      answered: with an answer of the right form; single rows of it may still hold NaN.
      late: that took longer than the timeout.
      raised: that ended in an exception.
      misshapen: whose answer had another form than the base model's.
      refused: not started, as ``most_open`` were open.
      rows_failed: rows, of all calls, that the base model answered in the expert's place.
    """

    calls: int = 0
    answered: int = 0
    late: int = 0
    raised: int = 0
    misshapen: int = 0
    refused: int = 0
    rows_failed: int = 0


class RemoteCall:
    """A call on its way: started at ``start``, over when ``done`` is set."""

    def __init__(self, start: float):
        self.start = start
        self.done = threading.Event()
        self.refused = False
        self.value: Any = None
        self.error: BaseException | None = None


class RemoteExpert:
    """An expert behind a Python callable with a timeout; whatever it does, every row gets an answer.

    Calls run in threads that do not keep the process alive. A call that is late cannot be stopped: its answer is
    dropped when it comes, and until then it counts among those open, so that a server that hangs is not sent more than
    ``most_open`` calls.

    Args:
      call: ``inputs -> outputs`` on NumPy arrays, the batch axis leading: a request to a server, or a compiled function
        on another mesh (with ``jax.device_put`` in it).
      timeout_s: seconds from the start of a call until the base model answers instead.
      most_open: calls under way at once; a call beyond them is refused, and the base model answers.
      clock: seconds; another one for tests.

    Attributes:
      last_error: the last exception, or what was wrong with the last answer; None.

    Example:
      >>> expert = RemoteExpert(lambda x: 10 * x, timeout_s=5.0)
      >>> outputs, failed = expert(np.array([[1.0], [2.0]]), np.zeros((2, 1)))
      >>> outputs.ravel().tolist(), failed.tolist(), expert.events.answered
      ([10.0, 20.0], [False, False], 1)
    """

    def __init__(
        self, call: Call, *, timeout_s: float, most_open: int = 8, clock: Callable[[], float] = time.monotonic
    ):
        if not callable(call):
            raise TypeError(f"call={call!r} must be a function from inputs to outputs.")
        check_number("timeout_s", timeout_s, low=0, open_low=True)
        check_number("most_open", most_open, low=1, integer=True)
        self.timeout_s, self.most_open, self.clock = timeout_s, most_open, clock
        self.last_error: BaseException | str | None = None
        self._call = call
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(RemoteEvents._fields, 0)
        self._open = self._threads = 0
        self._work: queue.SimpleQueue[tuple[RemoteCall, PyTree]] = queue.SimpleQueue()

    @property
    def events(self) -> RemoteEvents:
        """The counts so far."""
        with self._lock:
            return RemoteEvents(**self._counts)

    def __call__(self, inputs: PyTree, outputs: PyTree) -> tuple[PyTree, Bool[np.ndarray, "rows"]]:
        """Ask, and wait for the answer until the timeout.

        Args:
          inputs: NumPy arrays, the batch axis leading.
          outputs: the base model's answers to the same rows. The expert's are rounded to their dtypes.

        Returns:
          The answers, and which rows are the base model's, as the expert's are NaN or did not come.
        """
        return self.finish(self.start(inputs), outputs)

    def start(self, inputs: PyTree) -> RemoteCall:
        """Ask without waiting; ``finish`` takes what is returned."""
        call = RemoteCall(self.clock())
        with self._lock:
            self._counts["calls"] += 1
            if self._open >= self.most_open:
                call.refused = True
                call.done.set()
                return call
            self._open += 1
            if self._open > self._threads:
                self._threads += 1
                threading.Thread(target=self._work_on, name="effjax-expert", daemon=True).start()
        self._work.put((call, inputs))
        return call

    def over(self, call: RemoteCall) -> bool:
        """Whether ``finish`` would not wait: the answer is there, or late."""
        return call.done.is_set() or self.clock() - call.start >= self.timeout_s

    def finish(
        self, call: RemoteCall, outputs: PyTree, *, rows: int | None = None
    ) -> tuple[PyTree, Bool[np.ndarray, "rows"]]:
        """The answers of a call that was started, as for ``__call__``; waits until the timeout.

        Args:
          call: of ``start``.
          outputs: the base model's answers to the same rows.
          rows: how many of them are meant, as the rest fill a bucket; None for all. For the counts.
        """
        if not call.done.is_set():
            call.done.wait(max(0.0, self.timeout_s - (self.clock() - call.start)))
        outputs = jax.tree.map(np.asarray, outputs)
        event, problem = self._judged(call, outputs)
        held = len(jax.tree.leaves(outputs)[0])
        failed = np.ones(held, bool) if problem else _rows_with_nan(call.value, held)
        bad = int(failed[:rows].sum())
        if not problem:
            choose = lambda own, given: np.where(_column(failed, own), own, given.astype(own.dtype))
            outputs = jax.tree.map(choose, outputs, call.value)
            problem = f"{bad} of {len(failed[:rows])} rows are NaN" if bad else ""
        with self._lock:
            self._counts[event] += 1
            self._counts["rows_failed"] += bad
        if problem:
            if self.last_error is None:
                _log.warning("The remote expert failed, and the base model answers in its place: %s", problem)
            self.last_error = call.error or str(problem)
        return outputs, failed

    def _work_on(self) -> None:
        while True:
            call, inputs = self._work.get()
            try:
                call.value = jax.tree.map(np.asarray, self._call(inputs))
            except BaseException as error:  # a thread's end must not lose the rows
                call.error = error
            with self._lock:
                self._open -= 1
            call.done.set()

    def _judged(self, call: RemoteCall, outputs: PyTree) -> tuple[str, str]:
        """What became of a call, and in words what was wrong with it."""
        if call.refused:
            return "refused", f"{self.most_open} calls are open; raise most_open or shorten the calls"
        if not call.done.is_set():
            return "late", f"no answer within timeout_s={self.timeout_s}"
        if call.error is not None:
            return "raised", f"{type(call.error).__name__}: {call.error}"
        show = lambda tree: jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", tree)
        pairs = lambda: zip(jax.tree.leaves(call.value), jax.tree.leaves(outputs), strict=True)
        same = jax.tree.structure(call.value) == jax.tree.structure(outputs)
        same = same and all(_fits(given, own) for given, own in pairs())
        return ("answered", "") if same else ("misshapen", f"it answered {show(call.value)}, not {show(outputs)}")


def dispatch_remote(
    expert: RemoteExpert,
    inputs: PyTree,
    outputs: PyTree,
    request: Bool[Array | np.ndarray, "rows"],
    *,
    buckets: Sequence[int] | None = None,
) -> Dispatched:
    """Ask a remote expert about the rows that ask, on the host; nothing is sent where nobody asks.

    Args:
      expert: of ``RemoteExpert``.
      inputs: an array or a tree of arrays, the batch axis leading.
      outputs: the base model's answers.
      request: rows that ask.
      buckets: sizes that a call is padded to, with copies of its first row, for an expert that is compiled for each
        size; None for none.

    Returns:
      A ``Dispatched`` of NumPy arrays, in the order of the batch.

    Raises:
      ValueError: inputs, outputs and request of different numbers of rows. What the expert raises is counted, not
        raised.

    Example:
      >>> def down(x):
      ...     raise ConnectionError("no route")
      >>> expert = RemoteExpert(down, timeout_s=5.0)
      >>> found = dispatch_remote(expert, np.ones((2, 1)), np.zeros((2, 1)), np.array([True, False]))
      >>> found.outputs.tolist(), found.failed.tolist(), expert.events.raised
      ([[0.0], [0.0]], [True, False], 1)
    """
    rows = check_batch(inputs, outputs, jnp.asarray(request))
    outputs = jax.tree.map(np.array, outputs)
    places = np.flatnonzero(np.asarray(request))
    answered, failed = np.zeros(rows, np.int32), np.zeros(rows, bool)
    if len(places):
        given, bad = ask_about(expert, inputs, outputs, places, buckets)
        put_rows(outputs, places, given)
        failed[places], answered[places] = bad, ~bad
    return Dispatched(outputs, answered, np.zeros(rows, bool), failed)


def ask_about(
    expert: RemoteExpert, inputs: PyTree, outputs: PyTree, places: np.ndarray, buckets: Sequence[int] | None
) -> tuple[PyTree, np.ndarray]:
    """The answers to some rows of a batch, and which of them failed."""
    size = padded_size(len(places), buckets)
    padded = np.concatenate([places, np.repeat(places[:1], size - len(places))])
    cut = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf)[padded], tree)
    given, bad = expert.finish(expert.start(cut(inputs)), cut(outputs), rows=len(places))
    return jax.tree.map(lambda leaf: leaf[: len(places)], given), bad[: len(places)]


def padded_size(count: int, buckets: Sequence[int] | None) -> int:
    """The smallest bucket that holds ``count`` rows; ``count`` itself without buckets or above the top one."""
    if buckets is None:
        return count
    rungs = check_ladder(buckets, argument="buckets")
    return smallest_fit(count, rungs) if count <= rungs[-1] else count


def put_rows(outputs: PyTree, places: np.ndarray, given: PyTree) -> None:
    """Write rows into arrays of one's own, in place."""
    for own, new in zip(jax.tree.leaves(outputs), jax.tree.leaves(given), strict=True):
        own[places] = new


def _column(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    return values.reshape(values.shape + (1,) * (like.ndim - 1))


def _fits(given: np.ndarray, own: np.ndarray) -> bool:
    """Whether answers have the base model's form: floats may be rounded to its dtype, other numbers must be in it."""
    if given.shape != own.shape or jnp.issubdtype(given.dtype, jnp.inexact) != jnp.issubdtype(own.dtype, jnp.inexact):
        return False
    return jnp.issubdtype(own.dtype, jnp.inexact) or np.array_equal(given.astype(own.dtype), given)


def _rows_with_nan(answers: PyTree, rows: int) -> np.ndarray:
    bad = np.zeros(rows, bool)
    for leaf in jax.tree.leaves(answers):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            bad |= np.isnan(leaf).reshape(rows, -1).any(1)
    return bad
