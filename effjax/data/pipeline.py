"""Resumable batches: one seed, the same global order on any number of processes, a tiny state.

Batch ``i`` is a function of ``(seed, i)`` alone, so a state is one number and resuming costs nothing.
Every iterator here answers ``next``, ``get_state`` (JSON-able) and ``set_state``; so do grain's iterators, and
``Batches`` is a grain random-access source.
"""

import functools
import queue
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from effjax.core.cursor import Cursor
from effjax.core.errors import check_number

__all__ = ["batches", "prefetch_to_device"]

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, int, np.random.Generator], Batch]


@runtime_checkable
class ResumableIterator(Protocol):
    """What the training loop asks of its data: ``Batches``, planned batches, a ``grain.DatasetIterator``."""

    def __next__(self) -> Any: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


class Batches(Cursor[Batch]):
    """Batches of an in-memory data set, by index and as a resumable iterator.

    In epoch ``e`` the rows come in the order ``default_rng((seed, e)).permutation(n)``; global batch
    ``i`` is rows ``[j * batch_size, (j + 1) * batch_size)`` of it with ``e, j = divmod(i, batches per
    epoch)``, and process ``p`` of ``P`` gets the ``p``-th of ``P`` equal contiguous parts. So the
    union over processes is the same for every ``P``. A permutation is made once per epoch; everything
    else costs what gathering the rows costs.

    Args:
      source: column -> array ``[n, ...]`` of numbers; or any random-access source of examples (each a
        mapping of numbers or arrays): a Hugging Face ``Dataset``, a ``grain.MapDataset``. Arrays are
        checked once; rows of other sources when they are read.
      batch_size: rows of a global batch, over all processes.
      seed: of the order and of ``transform``'s generator.
      epochs: passes over the data; None repeats for ever.
      shuffle: a new order every epoch, or the order of the rows.
      drop_remainder: leave out the short batch at the end of an epoch (its shape would compile anew).
      transform: ``(batch, index, rng) -> batch`` on the host, where ``index`` is the global batch index
        and ``rng`` depends on ``(seed, index)`` alone. It sees the global batch, of which each process
        then keeps its part: what it draws is the same on any number of processes, and each pays for
        the whole.
      process_index: this process; by default ``jax.process_index()``.
      process_count: how many there are; by default ``jax.process_count()``.

    Raises:
      TypeError: a source without a length, such as a streamed data set or a generator, or one of several splits.
      ValueError: a column is empty, of another length, not numeric, or holds NaN or infinity; a batch
        is larger than the data or does not divide among the processes.

    Example:
      >>> data = Batches({"x": np.arange(10)}, 4, seed=0, shuffle=False)
      >>> next(data)["x"], data.get_state()["next"]
      (array([0, 1, 2, 3]), 1)
      >>> data[3]["x"]
      array([4, 5, 6, 7])
    """

    def __init__(
        self,
        source: Any,
        batch_size: int,
        *,
        seed: int,
        epochs: int | None = None,
        shuffle: bool = True,
        drop_remainder: bool = True,
        transform: Transform | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        check_number("batch_size", batch_size, low=1, integer=True)
        check_number("seed", seed, low=0, integer=True)
        if epochs is not None:
            check_number("epochs", epochs, low=1, integer=True, hint="None repeats for ever.")
        self._part, self._parts = process_share(process_index, process_count)
        check_source("source", source)
        if isinstance(source, Mapping):
            self._rows, self._gather = _check_arrays(source), functools.partial(_gather_arrays, source)
        elif hasattr(source, "with_format"):  # Hugging Face: reads many rows at once
            self._rows, self._gather = len(source), functools.partial(_gather_table, source.with_format("numpy"))
        else:
            self._rows, self._gather = len(source), functools.partial(_gather_examples, source)
        if batch_size > self._rows:
            raise ValueError(
                f"batch_size={batch_size} is larger than the data ({self._rows} rows). Choose one in [1, {self._rows}]."
            )
        sizes = [batch_size] if drop_remainder else [batch_size, self._rows % batch_size]
        if any(size % self._parts for size in sizes):
            raise ValueError(
                f"A global batch of {next(size for size in sizes if size % self._parts)} rows does not divide among "
                f"process_count={self._parts}. Choose batch_size a multiple of {self._parts}"
                f"{'' if drop_remainder else ', and drop_remainder=True'}."
            )
        self._batch_size = batch_size
        self._seed = seed
        self._epochs = epochs
        self._shuffle = shuffle
        self._drop_remainder = drop_remainder
        self._transform = transform
        self._order: tuple[int, np.ndarray] | None = None
        self._settings = {
            "rows": self._rows,
            "batch_size": batch_size,
            "seed": seed,
            "shuffle": shuffle,
            "drop_remainder": drop_remainder,
        }

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of one pass over the data."""
        rounding = 0 if self._drop_remainder else self._batch_size - 1
        return (self._rows + rounding) // self._batch_size

    def __len__(self) -> int:
        return sys.maxsize if self._epochs is None else self._epochs * self.batches_per_epoch

    def _item(self, index: int) -> Batch:
        epoch, within = divmod(index, self.batches_per_epoch)
        start = within * self._batch_size
        size = min(self._batch_size, self._rows - start)
        share = size // self._parts
        mine = slice(self._part * share, (self._part + 1) * share)
        if self._transform is None:
            return self._gather(self._rows_of(epoch, start + mine.start, start + mine.stop))
        rng = np.random.default_rng((self._seed, index, 1))
        batch = self._transform(self._gather(self._rows_of(epoch, start, start + size)), index, rng)
        if self._parts == 1:
            return batch
        for name, column in batch.items():
            if len(column) != size:
                raise ValueError(
                    f"transform returned {len(column)} rows of {name!r} for a global batch of {size}; with "
                    f"process_count={self._parts} it must keep the number of rows."
                )
        return {name: column[mine] for name, column in batch.items()}

    def _rows_of(self, epoch: int, start: int, stop: int) -> np.ndarray | slice:
        if not self._shuffle:
            return slice(start, stop)
        order = self._order  # read once: grain may call from several threads
        if order is None or order[0] != epoch:
            order = self._order = (epoch, np.random.default_rng((self._seed, epoch, 0)).permutation(self._rows))
        return order[1][start:stop]


def batches(source: Any, batch_size: int, *, seed: int, prefetch: int = 0, **options: Any) -> ResumableIterator:
    """``Batches(source, batch_size, seed=seed, **options)``, read ahead onto the device if ``prefetch``.

    Args:
      source: columns or examples, as ``Batches`` takes them.
      batch_size: rows of a global batch.
      seed: of the order and of the transform.
      prefetch: batches a thread keeps ready on the default device; 0 for none.
      **options: of ``Batches``.

    Returns:
      A resumable iterator.

    Raises:
      ValueError: ``prefetch`` below 0, or what ``Batches`` refuses.

    Example:
      >>> data = batches({"x": np.arange(4)}, 2, seed=0, epochs=1, shuffle=False)
      >>> [batch["x"].tolist() for batch in data]
      [[0, 1], [2, 3]]
    """
    iterator = Batches(source, batch_size, seed=seed, **options)
    check_number("prefetch", prefetch, low=0, integer=True)
    return prefetch_to_device(iterator, size=prefetch) if prefetch else iterator


def process_share(index: int | None, count: int | None) -> tuple[int, int]:
    """Which of how many equal parts of a batch this process takes; by default as ``jax.distributed`` says."""
    if (index is None) != (count is None):
        raise ValueError(f"process_index={index} and process_count={count} go together: give both or neither.")
    if count is None:
        return jax.process_index(), jax.process_count()
    check_number("process_count", count, low=1, integer=True)
    return check_number("process_index", index, low=0, high=count - 1, integer=True), count


def check_source(argument: str, source: Any) -> None:
    """Raise ``TypeError`` for what holds several splits, or has no length by which an order could be planned."""
    kind = type(source).__name__
    if isinstance(source, Mapping) and source and all(hasattr(value, "with_format") for value in source.values()):
        first = next(iter(source))
        raise TypeError(f"{argument} is a {kind} of the splits {list(source)}. Choose one: {argument}[{first!r}].")
    if not hasattr(source, "__len__"):
        raise TypeError(
            f"{argument} is a {kind}, which has no length, so that neither order nor steps can be planned. Read it "
            "into memory, at once or in windows: datasets.Dataset.from_list(list(stream.take(n))) of a streamed data "
            "set, list(...) of a generator of examples."
        )


def _check_arrays(arrays: Mapping[str, np.ndarray]) -> int:
    if not arrays:
        raise ValueError("arrays={} has no columns. Give at least one array.")
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.ndim == 0 or array.dtype.kind not in "biuf":
            held = f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(
                f"arrays[{name!r}] is {held}; expected a NumPy array of numbers, one row per example. "
                "Tokenise texts and pad recordings first, or leave the column out."
            )
    sizes = {name: len(array) for name, array in arrays.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"arrays differ in length: {sizes}. Every column needs one row per example.")
    rows = next(iter(sizes.values()))
    if not rows:
        raise ValueError(f"arrays hold no rows: {sizes}.")
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.flatnonzero(~np.isfinite(array).reshape(rows, -1).all(axis=1))
            raise ValueError(
                f"arrays[{name!r}] has NaN or infinity in {len(bad)} of {rows} rows, the first at {bad[0]}. "
                "Drop or repair those rows."
            )
    return rows


def _gather_arrays(arrays: Mapping[str, np.ndarray], rows: np.ndarray | slice) -> Batch:
    if isinstance(rows, slice):  # copied, so that a batch is the caller's own in every case
        return {name: array[rows].copy() for name, array in arrays.items()}
    return {name: array.take(rows, axis=0) for name, array in arrays.items()}


def _gather_table(table: Any, rows: np.ndarray | slice) -> Batch:
    batch = table[rows]
    _check_arrays(batch)
    return batch


def _gather_examples(source: Any, rows: np.ndarray | slice) -> Batch:
    numbers = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
    examples = [source[number] for number in numbers]
    batch = {name: np.stack([np.asarray(example[name]) for example in examples]) for name in examples[0]}
    _check_arrays(batch)
    return batch


class _Ready(NamedTuple):
    batch: Any
    state: dict[str, Any] | None
    error: BaseException | None


def prefetch_to_device(iterator: ResumableIterator, size: int = 2, sharding: Any = None) -> "Prefetch":
    """Read ahead on a thread and start the copies to the device.

    ``get_state`` tells the state after the batches handed out, whatever was read ahead. What the
    iterator raises is raised by ``next`` with its own traceback.

    Args:
      iterator: a resumable iterator of pytrees of arrays; it belongs to the thread from now on.
      size: batches kept ready.
      sharding: where they go. With several processes each brings its part of the global batch
        (``jax.make_array_from_process_local_data``). ``None`` is the default device.

    Returns:
      A resumable iterator with ``close``; also a context manager.

    Raises:
      ValueError: ``size`` below 1.

    Example:
      >>> with prefetch_to_device(Batches({"x": np.arange(4)}, 2, seed=0, shuffle=False)) as data:
      ...     print(next(data)["x"], data.get_state()["next"])
      [0 1] 1
    """
    check_number("size", size, low=1, integer=True)
    return Prefetch(iterator, size, sharding)


def _default_device() -> Any:
    return getattr(jax.config, "jax_default_device", None)


class Prefetch(Iterator[Any]):
    """What ``prefetch_to_device`` returns."""

    def __init__(self, iterator: ResumableIterator, size: int, sharding: Any):
        self._iterator = iterator
        self._size = size
        # A thread does not see the `with jax.default_device(...)` of the thread that made it.
        self._put = functools.partial(put_batch, sharding=sharding, device=_default_device())
        self._state: Any = iterator.get_state()
        self._worker: _Worker | None = None
        self._stop: Callable[[], object] = lambda: None
        self._error: BaseException | None = None
        self._closed = False

    def __iter__(self) -> "Prefetch":
        return self

    def __next__(self) -> Any:
        if self._closed:
            raise ValueError("This prefetching iterator is closed.")
        if self._error is None:
            if self._worker is None:
                self._worker = _Worker(self._iterator, self._size, self._put)
                self._stop = weakref.finalize(self, self._worker.stop)
            ready = self._worker.get()
            if ready.error is None:
                self._state = ready.state
                return ready.batch
            self._error = ready.error
        raise self._error

    def get_state(self) -> dict[str, Any]:
        """The iterator's state after the batches handed out so far."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Drop what was read ahead and continue from ``state``."""
        self._halt()
        self._iterator.set_state(state)
        self._state = state
        self._error = None

    def close(self) -> None:
        """Stop the thread and wait for it; idempotent."""
        self._halt()
        self._closed = True

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _halt(self) -> None:
        self._stop()
        self._worker = None


def put_batch(batch: Any, *, sharding: Any = None, device: Any = None) -> Any:
    """Start copying one batch to the device.

    Args:
      batch: a pytree of arrays, of a global batch the rows of this process.
      sharding: where it goes; ``None`` is one device.
      device: that device; ``None`` is the default one.

    Returns:
      The batch on the device, with several processes as global arrays.

    Raises:
      ValueError: with several processes, a sharding that asks a process for other rows than its own, as where an axis
        that does not split the rows runs over processes.
    """
    if sharding is None:
        with jax.default_device(device or _default_device()):
            return jax.device_put(batch)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    for part in jax.tree.leaves(batch):
        _check_own_rows(np.shape(part), sharding, jax.process_count())
    return jax.tree.map(lambda part: jax.make_array_from_process_local_data(sharding, part), batch)


def _check_own_rows(shape: tuple[int, ...], sharding: Any, processes: int) -> None:
    """Refuse a layout in which JAX would take the rows of one process for those of another, or for all."""
    rows = shape[0] * processes
    indices = sharding.addressable_devices_indices_map((rows, *shape[1:])).values()
    held = {index[0].indices(rows)[:2] for index in indices if index is not None}
    if (asked := sum(end - start for start, end in held)) != shape[0]:
        raise ValueError(
            f"mesh: each of the {processes} processes reads {shape[0]} of a batch's {rows} rows, but its devices hold "
            f"{asked} of them. Give the axis 'data' a multiple of {processes} devices, and lay the other axes inside a "
            "process."
        )


class _Worker:
    """The thread of a ``Prefetch``; it holds no reference to it, so that dropping that stops this."""

    def __init__(self, iterator: ResumableIterator, size: int, put: Callable[[Any], Any]):
        self._ready: queue.SimpleQueue[_Ready] = queue.SimpleQueue()
        self._slots = threading.Semaphore(size)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, args=(iterator, put), name="effjax-prefetch", daemon=True)
        self._thread.start()

    def _run(self, iterator: ResumableIterator, put: Callable[[Any], Any]) -> None:
        try:
            while True:
                self._slots.acquire()
                if self._stopping:
                    return
                batch = next(iterator)
                self._ready.put(_Ready(put(batch), iterator.get_state(), None))
        except BaseException as error:  # else the consumer would wait for ever
            self._ready.put(_Ready(None, None, error))

    def get(self) -> _Ready:
        ready = self._ready.get()
        self._slots.release()
        return ready

    def stop(self) -> None:
        self._stopping = True
        self._slots.release()
        if threading.current_thread() is not self._thread:  # the garbage collector may run on it
            self._thread.join()
