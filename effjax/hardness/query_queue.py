"""Rows that ask an expert, collected over several batches until a call is full or a deadline is over."""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from effjax.core.errors import check_number
from effjax.core.shapes import check_ladder
from effjax.hardness.dispatch import Dispatched, check_batch
from effjax.hardness.remote import RemoteCall, RemoteExpert, padded_size, put_rows

__all__ = ["Finished", "QueryQueue"]


class Finished(NamedTuple):
    """A batch all of whose rows are answered.

    Attributes:
      ticket: of ``QueryQueue.submit``.
      found: a ``Dispatched`` of NumPy arrays, in the order of the batch.
      seconds: from ``submit`` until it was collected.
    """

    ticket: int
    found: Dispatched
    seconds: float


class _Batch:
    """A batch that is not finished."""

    def __init__(self, ticket: int, start: float, inputs: PyTree, outputs: PyTree, open_rows: int, rows: int):
        self.ticket, self.start, self.inputs, self.outputs = ticket, start, inputs, outputs
        self.open = open_rows
        self.answered, self.failed = np.zeros(rows, np.int32), np.zeros(rows, bool)


class _Sent(NamedTuple):
    """A call on its way, and the rows in it: pairs of a batch and places there."""

    call: RemoteCall
    outputs: PyTree
    rows: list[tuple[_Batch, np.ndarray]]
    count: int


class QueryQueue:
    """Rows of several batches asked about together: an expert of few queries gets calls of an efficient size.

    A call starts when ``sizes[-1]`` rows wait, or when the oldest has waited ``deadline_s``. So a row that asks is
    answered after at most ``deadline_s`` and the expert's timeout, provided that ``submit`` or ``collect`` is called
    meanwhile: the queue has no timer of its own. Batches come back in the order they were submitted, each once,
    whatever the expert does. To be used by one thread.

    Args:
      expert: a ``RemoteExpert``; a local one is ``RemoteExpert(lambda x: apply(params, x), timeout_s=60)``.
      sizes: rows of a call, increasing: one is filled up to the smallest that holds it, with copies of its first row.
      deadline_s: seconds that a row waits for others.

    Example:
      >>> expert = RemoteExpert(lambda x: 10 * x, timeout_s=5.0)
      >>> line = QueryQueue(expert, sizes=(2,), deadline_s=60.0)
      >>> for start in (0.0, 1.0):
      ...     ticket = line.submit(np.full((2, 1), start), np.zeros((2, 1)), np.array([False, True]))
      >>> [(done.ticket, done.found.outputs.ravel().tolist()) for done in line.flush()], expert.events.calls
      ([(0, [0.0, 0.0]), (1, [0.0, 10.0])], 1)
    """

    def __init__(self, expert: RemoteExpert, *, sizes: Sequence[int], deadline_s: float):
        if not isinstance(expert, RemoteExpert):
            raise TypeError(f"expert={expert!r} must be a RemoteExpert: RemoteExpert(call, timeout_s=...).")
        self.sizes = check_ladder(sizes, argument="sizes")
        self.deadline_s = check_number("deadline_s", deadline_s, low=0)
        self._expert, self._clock = expert, expert.clock
        self._waiting: collections.deque[tuple[_Batch, int]] = collections.deque()
        self._batches: collections.deque[_Batch] = collections.deque()
        self._sent: list[_Sent] = []
        self._tickets = 0

    @property
    def waiting(self) -> int:
        """Rows that no call holds yet."""
        return len(self._waiting)

    def submit(self, inputs: PyTree, outputs: PyTree, request: Bool[Array | np.ndarray, "rows"]) -> int:
        """Take a batch.

        Args:
          inputs: an array or a tree of arrays, the batch axis leading.
          outputs: the base model's answers.
          request: rows that ask.

        Returns:
          The batch's ticket: 0, 1, 2, ...

        Raises:
          ValueError: arrays that do not fit, or rows of other shapes than those that wait.
        """
        rows = check_batch(inputs, outputs, jnp.asarray(request))
        host = lambda tree: jax.tree.map(np.asarray, tree)
        inputs, outputs = host(inputs), jax.tree.map(np.array, outputs)
        self._check_alike(inputs, outputs)
        places = np.flatnonzero(np.asarray(request))
        batch = _Batch(self._tickets, self._clock(), inputs, outputs, len(places), rows)
        self._tickets += 1
        self._batches.append(batch)
        self._waiting.extend((batch, int(place)) for place in places)
        while len(self._waiting) >= self.sizes[-1]:
            self._send(self.sizes[-1])
        self._send_overdue()
        return batch.ticket

    def collect(self) -> list[Finished]:
        """Batches that are finished by now, in the order of their tickets; never waits.

        Returns:
          Those whose every row is answered, as all before them are.
        """
        self._send_overdue()
        self._take(wait=False)
        return self._finished()

    def flush(self) -> list[Finished]:
        """All batches, after asking about every row that waits; waits for the expert, at most until its timeout.

        Returns:
          In the order of their tickets.
        """
        while self._waiting:
            self._send(self.sizes[-1])
        self._take(wait=True)
        return self._finished()

    def _check_alike(self, inputs: PyTree, outputs: PyTree) -> None:
        """Rows of one call are stacked."""
        if not self._waiting:
            return
        form = lambda tree: jax.tree.map(lambda leaf: (leaf.shape[1:], leaf.dtype.name), tree)
        other = self._waiting[0][0]
        for name, new, old in (("inputs", inputs, other.inputs), ("outputs", outputs, other.outputs)):
            if form(new) != form(old):
                raise ValueError(f"{name} have rows {form(new)}, but {form(old)} wait. Flush first, or pad them alike.")

    def _send_overdue(self) -> None:
        if self._waiting and self._clock() - self._waiting[0][0].start >= self.deadline_s:
            self._send(self.sizes[-1])

    def _send(self, most: int) -> None:
        """Start a call with the rows that wait longest."""
        rows: list[tuple[_Batch, list[int]]] = []
        count = min(most, len(self._waiting))
        for _ in range(count):
            batch, place = self._waiting.popleft()
            if not rows or rows[-1][0] is not batch:
                rows.append((batch, []))
            rows[-1][1].append(place)
        taken = [(batch, np.asarray(places)) for batch, places in rows]
        size = padded_size(count, self.sizes)
        inputs = _stacked([jax.tree.map(lambda leaf, at=at: leaf[at], batch.inputs) for batch, at in taken], size)
        outputs = _stacked([jax.tree.map(lambda leaf, at=at: leaf[at], batch.outputs) for batch, at in taken], size)
        self._sent.append(_Sent(self._expert.start(inputs), outputs, taken, count))

    def _take(self, *, wait: bool) -> None:
        """Put the answers of calls that are over in their places."""
        still = []
        for sent in self._sent:
            if not wait and not self._expert.over(sent.call):
                still.append(sent)
                continue
            outputs, failed = self._expert.finish(sent.call, sent.outputs, rows=sent.count)
            start = 0
            for batch, places in sent.rows:
                own = slice(start, start + len(places))
                put_rows(batch.outputs, places, jax.tree.map(lambda leaf, own=own: leaf[own], outputs))
                batch.failed[places], batch.answered[places] = failed[own], ~failed[own]
                batch.open -= len(places)
                start = own.stop
        self._sent = still

    def _finished(self) -> list[Finished]:
        found = []
        while self._batches and not self._batches[0].open:
            batch = self._batches.popleft()
            served = Dispatched(batch.outputs, batch.answered, np.zeros(len(batch.failed), bool), batch.failed)
            found.append(Finished(batch.ticket, served, self._clock() - batch.start))
        return found


def _stacked(parts: Sequence[PyTree], size: int) -> Any:
    """Rows of several trees end to end, with copies of the first up to ``size``."""

    def join(*leaves: np.ndarray) -> np.ndarray:
        joined = np.concatenate(leaves)
        return np.concatenate([joined, np.repeat(joined[:1], size - len(joined), axis=0)])

    return jax.tree.map(join, *parts)
