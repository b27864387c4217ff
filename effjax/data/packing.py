"""Sequence packing: several texts in a row of one fixed length, kept apart by segment ids."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Integer

from effjax.core.errors import check_number
from effjax.data.pipeline import Batch
from effjax.data.planned import Columns, PlannedBatches
from effjax.data.ragged import Ragged

__all__ = ["PackedBatches"]


def best_fit(
    lengths: Integer[np.ndarray, "n"], capacity: int, *, max_segments: int | None = None
) -> Int[np.ndarray, "n"]:
    """Pack items, in the order given, each into the fullest row that still holds it, or else into a new one.

    Args:
      lengths: tokens of every item, 1 or more.
      capacity: tokens of a row.
      max_segments: most items in a row; None for no limit.

    Returns:
      Int64 ``[n]``: the row of every item, numbered as they are opened.

    Raises:
      ValueError: an item is longer than ``capacity``, or arguments out of range.

    Example:
      >>> best_fit(np.array([5, 7, 3, 1, 2]), 8).tolist()
      [0, 1, 0, 1, 2]
    """
    lengths = np.asarray(lengths)
    check_number("capacity", capacity, low=1, integer=True)
    limit = len(lengths) if max_segments is None else check_number("max_segments", max_segments, low=1, integer=True)
    if lengths.max(initial=0) > capacity:
        raise ValueError(
            f"capacity={capacity}: {int((lengths > capacity).sum())} of {len(lengths)} items are longer, the longest "
            f"has {lengths.max()} tokens. Choose capacity >= {lengths.max()} or truncate when tokenising."
        )
    # Open rows by the space left in them, and a bit set of the spaces that occur: the fullest row that fits is one
    # shift away.
    open_rows: list[list[tuple[int, int]]] = [[] for _ in range(capacity + 1)]
    spaces = 0
    rows, opened = [], 0
    for length in lengths.tolist():
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row, items = open_rows[space].pop()
            if not open_rows[space]:
                spaces ^= 1 << space
        else:
            space, row, items = capacity, opened, 0
            opened += 1
        rows.append(row)
        left = space - length
        if left and items + 1 < limit:
            open_rows[left].append((row, items + 1))
            spaces |= 1 << left
    return np.array(rows, np.int64)


class PackPlan(NamedTuple):
    """One packed batch.

    Attributes:
      length: tokens of a row.
      size: rows.
      rows: int64 ``[m]``, the examples, row by row of the batch.
      places: int64 ``[m]``, the row of the batch that holds each.
    """

    length: int
    size: int
    rows: Int[np.ndarray, "m"]
    places: Int[np.ndarray, "m"]


class PackedBatches(PlannedBatches):
    r"""Batches of one shape whose rows hold several texts each, by best fit in random order.

    A model needs the batch's ``segment_ids`` (attention within a segment only), its ``position_ids`` (from 0 in every
    segment) and a head for each segment. With S texts in a row at most (``segments``), a batch holds ``input_ids``,
    ``segment_ids`` (0 at padding, 1, 2, ... in a row) and ``position_ids`` int32 [B, L], ``mask`` bool [B, L],
    ``weight`` float32 [B, S] (0 where there is no text) and the other columns [B, S].

    Args:
      columns: token ids and labels, or ``epoch -> columns``, as for ``PlannedBatches``.
      seed: of the order.
      epochs: passes over the data; a number, for all are planned ahead.
      length: tokens of a row; by default those of the longest text.
      batch_size: rows of a batch; the last of an epoch is filled up with empty rows.
      max_segments: most texts in a row, and then S whatever the seed; None for no limit.
      **options: ``pad_id``, ``pad_values``, ``process_index`` and ``process_count`` of ``PlannedBatches``.

    Raises:
      ValueError: texts longer than ``length``, a batch size that does not divide among the processes, or arguments
        out of range.

    Example:
      >>> data = PackedBatches({"input_ids": [[5, 6], [7], [8, 9, 4]]}, seed=1, epochs=1, length=4, batch_size=2)
      >>> next(data)["segment_ids"]
      array([[1, 1, 2, 0],
             [1, 1, 1, 0]], dtype=int32)

    Grain packs streams too (``grain.experimental.FirstFitPackIterDataset``), a window of rows at a time; here whole
    epochs are planned, so that steps and S are known ahead and a state is one number.
    """

    def __init__(
        self,
        columns: Columns | Callable[[int], Columns] | Any,
        *,
        seed: int,
        epochs: int,
        length: int | None = None,
        batch_size: int = 16,
        max_segments: int | None = None,
        **options: Any,
    ):
        super().__init__(columns, seed=seed, epochs=epochs, **options)
        check_number("batch_size", batch_size, low=1, integer=True)
        longest = max(int(self._epoch_lengths(epoch).max()) for epoch in range(epochs))
        length = longest if length is None else check_number("length", length, low=1, integer=True)

        def plan(epoch: int) -> list[PackPlan]:
            lengths = self._epoch_lengths(epoch)
            rng = np.random.default_rng((seed, epoch, 0))
            order = rng.permutation(len(lengths))
            rows = best_fit(lengths[order], length, max_segments=max_segments)
            rows = rng.permutation(rows.max() + 1)[rows]  # the last ones opened are the emptiest
            by_row = np.argsort(rows, kind="stable")
            order, rows = order[by_row], rows[by_row]
            ends = np.searchsorted(rows, np.arange(batch_size, rows[-1] + 1, batch_size))
            parts = zip(np.split(order, ends), np.split(rows % batch_size, ends), strict=True)
            return [PackPlan(length, batch_size, texts, places) for texts, places in parts]

        self._set_plan(plan, length=length, batch_size=batch_size, max_segments=max_segments)
        self._segments = max_segments or max(int(np.bincount(batch.places).max()) for batch in self._batches)

    @property
    def segments(self) -> int:
        """S: ``max_segments``, which no seed changes, or the most texts in any row of the run."""
        return self._segments

    def _gather(self, columns: Mapping[str, Any], plan: PackPlan) -> Batch:
        share = plan.size // self._parts
        mine = plan.places // share == self._part
        rows, places = plan.rows[mine], plan.places[mine] % share
        ids = columns["input_ids"].take(rows)
        # Where each text stands in its row, by number and by tokens.
        segment = np.arange(len(rows)) - np.searchsorted(places, places)
        start = ids.offsets[:-1] - ids.offsets[np.searchsorted(places, places)]
        at = np.repeat(places * plan.length + start, ids.lengths) + ids.positions

        def tokens(values: np.ndarray, fill: int = 0) -> np.ndarray:
            out = np.full(share * plan.length, fill, np.int32)
            out[at] = values
            return out.reshape(share, plan.length)

        def texts(values: np.ndarray) -> np.ndarray:
            out = np.zeros((share, self._segments, *values.shape[1:]), values.dtype)
            out[places, segment] = values
            return out

        segment_ids = tokens(np.repeat(segment + 1, ids.lengths))
        batch = {
            "mask": segment_ids > 0,
            "segment_ids": segment_ids,
            "position_ids": tokens(ids.positions),
            "weight": texts(np.ones(len(rows), np.float32)),
        }
        for name, column in columns.items():
            if isinstance(column, Ragged):
                batch[name] = tokens(column.take(rows).values, self._fills[name])
            else:
                batch[name] = texts(column[rows])
        return batch
