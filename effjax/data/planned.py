"""Token batches of a run whose epochs are all planned before it starts."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from effjax.core.cursor import Cursor
from effjax.core.errors import check_number
from effjax.core.shapes import pad_to
from effjax.data.columns import Columns, token_columns
from effjax.data.pipeline import Batch, process_share
from effjax.data.ragged import Ragged, fill_value

__all__: list[str] = []

PLANNED = "Every epoch is planned before the first one: None, for ever, is for Batches."


class BatchPlan(NamedTuple):
    """One batch of a plan.

    Attributes:
      length: tokens of a row, padding included.
      size: rows, dummy ones included.
      rows: int64 ``[valid]``, the examples; ``size - valid`` dummy rows follow them.
    """

    length: int
    size: int
    rows: Int[np.ndarray, "valid"]

    @property
    def valid(self) -> int:
        """Rows that hold an example."""
        return len(self.rows)


class PlannedBatches(Cursor[Batch]):
    """Token batches of a run whose epochs are all planned ahead; a subclass says how.

    By index and as a resumable iterator, like ``effjax.data.pipeline.Batches``: global batch ``i`` is the same on any
    number of processes, and process ``p`` of ``P`` gets the ``p``-th of ``P`` equal contiguous parts of its rows. It is
    also a grain random-access source.

    Args:
      columns: ``input_ids``, a ``Ragged`` or sequences of integers; optionally others like it, with one integer per
        token (``token_type_ids``, ``labels``); and arrays of numbers with one row per example (``label``, or ``[n, k]``
        of several). Lists of one length are such rows of numbers, unless they are as long as ``input_ids`` in every
        row. What ``attention_mask`` masks is cut off. Or a Hugging Face ``Dataset`` of such columns, or a list of
        examples. Or ``epoch -> columns``, for data that change from epoch to epoch (``token_drop``): it must return the
        same for the same epoch, for it is called at the start to plan and again when the epoch is reached.
      seed: of the order.
      epochs: passes over the data; a number, for all are planned ahead. A state of fewer epochs is taken too, where
        the plan begins with the same ones.
      pad_id: what ``input_ids`` are padded with.
      pad_values: what other columns of one integer per token are padded with, by name: by default 0
        (``token_type_ids``, ``position_ids``), 1 (``special_tokens_mask``), and -100 for any other, as it may hold
        classes.
      process_index: this process; by default ``jax.process_index()``.
      process_count: how many there are; by default ``jax.process_count()``.

    A batch holds ``input_ids`` int32 [B, L], ``mask`` bool [B, L] (True at real tokens), ``weight`` float32 [B] (0 in
    dummy rows, which have no real token) and the other columns, zero in dummy rows. A loss is
    ``(weight * each).sum() / weight.sum()`` over the global batch.
    """

    def __init__(
        self,
        columns: Columns | Callable[[int], Columns] | Any,
        *,
        seed: int,
        epochs: int,
        pad_id: int = 0,
        pad_values: Mapping[str, int] | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        check_number("seed", seed, low=0, integer=True)
        check_number("epochs", epochs, low=1, integer=True, hint=PLANNED)
        self._part, self._parts = process_share(process_index, process_count)
        self._pad_id = check_number("pad_id", pad_id, low=0, integer=True)
        self._epochs = epochs
        if callable(columns):
            self._read, self._fixed = columns, None
        else:
            self._read, self._fixed = None, token_columns(columns)
        self._cache: dict[int, dict[str, Any]] = {}
        self._lengths: list[np.ndarray] = []  # of every epoch, or once where the columns are fixed
        self._lengths = [self._columns(e)["input_ids"].lengths for e in range(epochs if self._read else 1)]
        rows = [len(lengths) for lengths in self._lengths]
        if len(set(rows)) > 1:
            raise ValueError(f"columns(epoch) holds {rows} rows in the epochs. Keep their number: shorten, never drop.")
        self._fills = self._checked_fills(pad_values or {})
        self._settings = {"rows": rows[0], "seed": seed, "epochs": epochs, "pad_id": pad_id}
        if pad_values:
            self._settings["pad_values"] = dict(sorted(pad_values.items()))
        self._digest = zlib.crc32(self._columns(0)["input_ids"].values)

    def _checked_fills(self, pad_values: Mapping[str, int]) -> dict[str, int]:
        """What every column of one integer per token is padded with."""
        by_token = [name for name, column in self._columns(0).items() if isinstance(column, Ragged)]
        for name, value in pad_values.items():
            if name == "input_ids" or name not in by_token:
                way = "pad_id is for these" if name == "input_ids" else f"such columns are {by_token[1:]}"
                raise ValueError(f"pad_values has {name!r}, but is for columns of one integer per token; {way}.")
            check_number(f"pad_values[{name!r}]", value, low=-(2**31), high=2**31 - 1, integer=True)
        return {name: fill_value(name) for name in by_token} | {"input_ids": self._pad_id} | dict(pad_values)

    def _set_plan(self, plan: Callable[[int], list[Any]], **settings: Any) -> None:
        """Plan every epoch; ``settings`` are what the state must agree in, JSON-able."""
        plans = [plan(epoch) for epoch in range(self._epochs)]
        self._batches = [batch for batches in plans for batch in batches]
        self._ends = np.cumsum([len(batches) for batches in plans])
        odd = next((batch.size for batch in self._batches if batch.size % self._parts), None)
        if odd:
            raise ValueError(
                f"A global batch of {odd} rows does not divide among process_count={self._parts}. Choose batch sizes "
                f"that are multiples of {self._parts}."
            )
        self._digests = []  # after every epoch
        for batches in plans:
            for batch in batches:
                self._digest = zlib.crc32(batch.rows, self._digest)
            self._digests.append(f"{self._digest:08x}")
        self._settings = self.settings | {**settings, "plan": self._digests[-1]}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state`` was taken, also that of a run of fewer epochs whose plan begins this one.

        Raises:
          ValueError: the state belongs to other data or settings, with the difference.
        """
        before = state.get("epochs")
        if isinstance(before, int) and 0 < before < self._epochs and state.get("plan") == self._digests[before - 1]:
            same = (
                "epochs",
                "plan",
                *(["caps"] if state.get("caps") == self.settings.get("caps", [])[:before] else []),
            )
            state = {**state, **{name: self._settings[name] for name in same if name in self._settings}}
        super().set_state(state)

    @property
    def total_steps(self) -> int:
        """Batches of the whole run."""
        return len(self._batches)

    @property
    def steps_per_epoch(self) -> tuple[int, ...]:
        """Batches of each epoch."""
        return tuple(np.diff(self._ends, prepend=0).tolist())

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every ``(rows, tokens)`` of a global batch in the run: one executable each."""
        return tuple(sorted({(batch.size, batch.length) for batch in self._batches}, key=lambda shape: shape[::-1]))

    @property
    def use_of_shapes(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Steps and examples of the run in each of ``shapes``."""
        found = dict.fromkeys(self.shapes, (0, 0))
        for batch in self._batches:
            steps, examples = found[batch.size, batch.length]
            found[batch.size, batch.length] = (steps + 1, examples + len(batch.rows))
        return found

    @property
    def first_uses(self) -> dict[tuple[int, int], int]:
        """The index of the first batch of each of ``shapes``, in the order of the run."""
        found: dict[tuple[int, int], int] = {}
        for index, batch in enumerate(self._batches):
            found.setdefault((batch.size, batch.length), index)
        return found

    @property
    def real_tokens(self) -> int:
        """Tokens of the run, padding left out."""
        sums = [int(lengths.sum()) for lengths in self._lengths]
        return sum(sums) if self._read else sums[0] * self._epochs

    @property
    def processed_tokens(self) -> int:
        """Tokens of the run, padding and dummy rows included; over ``real_tokens`` it is the price of padding."""
        return sum(batch.size * batch.length for batch in self._batches)

    def example_batches(self) -> Iterator[Batch]:
        """One batch of the run for every shape, in the order in which a run comes to them.

        For compiling all executables before the first step, or ahead of it (``effjax.train.compile_ahead``).
        """
        for index in self.first_uses.values():
            yield self[index]

    def __len__(self) -> int:
        return len(self._batches)

    def _item(self, index: int) -> Batch:
        columns = self._columns(int(np.searchsorted(self._ends, index, side="right")))
        return self._gather(columns, self._batches[index])

    def _epoch_lengths(self, epoch: int) -> np.ndarray:
        return self._lengths[epoch if self._read else 0]

    def _gather(self, columns: Mapping[str, Any], plan: Any) -> Batch:
        share = plan.size // self._parts
        rows = plan.rows[self._part * share : (self._part + 1) * share]
        lengths = pad_to(columns["input_ids"].lengths[rows], share)
        batch = {"mask": np.arange(plan.length) < lengths[:, None], "weight": np.ones(len(rows), np.float32)}
        for name, column in columns.items():
            if isinstance(column, Ragged):
                value = self._fills[name]
                batch[name] = pad_to(column.pad(rows, plan.length, value), share, value=value)
            else:
                batch[name] = column[rows]
        return {name: pad_to(array, share) for name, array in batch.items()}

    def _columns(self, epoch: int) -> dict[str, Any]:
        if self._fixed is not None or self._read is None:
            return self._fixed or {}
        cache = self._cache  # read once: grain may call from several threads
        if epoch not in cache:
            columns = token_columns(self._read(epoch))
            if self._lengths and not np.array_equal(columns["input_ids"].lengths, self._lengths[epoch]):
                raise ValueError(
                    f"columns({epoch}) returned other lengths than when the run was planned. It must depend on the "
                    "epoch alone: draw with a generator made from a seed and the epoch."
                )
            # Two epochs, for reading ahead across their boundary.
            cache = self._cache = {**dict(list(cache.items())[-1:]), epoch: columns}
        return cache[epoch]
