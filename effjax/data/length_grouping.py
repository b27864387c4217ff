"""The usual ways to batch text: random batches, padded to one length or to their longest row, and length grouping."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from effjax.core.errors import check_number
from effjax.data.planned import BatchPlan, Columns, PlannedBatches

__all__ = ["PaddedBatches"]


def length_grouped_order(
    lengths: Integer[np.ndarray, "n"], batch_size: int, *, rng: np.random.Generator
) -> Int[np.ndarray, "n"]:
    """The order of Hugging Face's ``group_by_length``.

    A random order is cut into mega-batches of ``min(n // (4 batch_size), 50)`` batches, each sorted by falling length;
    the longest example of all comes first, to run out of memory at once or never.

    Args:
      lengths: tokens of every example.
      batch_size: rows of a batch.
      rng: of the random order.

    Returns:
      A permutation of the examples.

    Example:
      >>> length_grouped_order(np.array([3, 9, 4, 2]), 4, rng=np.random.default_rng(0)).tolist()
      [1, 2, 0, 3]

    As in ``transformers.trainer_pt_utils.get_length_grouped_indices``; the batches are not shuffled afterwards there
    either, so that the lengths fall in saw teeth.
    """
    lengths = np.asarray(lengths, np.int64)
    check_number("batch_size", batch_size, low=1, integer=True)
    order = rng.permutation(len(lengths))
    mega = max(min(len(order) // (batch_size * 4), 50), 1) * batch_size
    order = order[np.lexsort((-lengths[order], np.arange(len(order)) // mega))]
    # The longest leads its own mega-batch: change places with the leader of the first.
    leader = int(np.argmax(lengths[order[::mega]])) * mega
    order[[0, leader]] = order[[leader, 0]]
    return order


class PaddedBatches(PlannedBatches):
    r"""Batches of one size, each padded to a fixed length or to its longest row: what ``BucketSampler`` replaces.

    Args:
      columns: token ids and labels, or ``epoch -> columns``, as for ``PlannedBatches``.
      seed: of the order.
      epochs: passes over the data; a number, for all are planned ahead.
      batch_size: rows of every batch; the last of an epoch is filled up with dummy rows.
      length: pad every row to this many tokens (static padding: one shape). None: to the batch's longest, rounded up
        (dynamic padding: many shapes).
      length_multiple: what the longest is rounded up to.
      group_by_length: Hugging Face's ``group_by_length`` instead of a random order.
      **options: ``pad_id``, ``pad_values``, ``process_index`` and ``process_count`` of ``PlannedBatches``.

    Raises:
      ValueError: examples longer than ``length``, a batch size that does not divide among the processes, or arguments
        out of range.

    Example:
      >>> ids = {"input_ids": [[5, 6], [7], [8, 9, 4], [3]]}
      >>> PaddedBatches(ids, seed=0, epochs=1, batch_size=2, length=8).shapes
      ((2, 8),)
      >>> PaddedBatches(ids, seed=0, epochs=1, batch_size=2, length_multiple=1, group_by_length=True).shapes
      ((2, 1), (2, 3))
    """

    def __init__(
        self,
        columns: Columns | Callable[[int], Columns] | Any,
        *,
        seed: int,
        epochs: int,
        batch_size: int = 64,
        length: int | None = None,
        length_multiple: int = 8,
        group_by_length: bool = False,
        **options: Any,
    ):
        super().__init__(columns, seed=seed, epochs=epochs, **options)
        check_number("batch_size", batch_size, low=1, integer=True)
        check_number("length_multiple", length_multiple, low=1, integer=True)
        if length is not None:
            check_number("length", length, low=1, integer=True)
            if group_by_length:
                raise ValueError(f"group_by_length=True saves nothing with length={length}: every row is padded to it.")

        def plan(epoch: int) -> list[BatchPlan]:
            lengths = self._epoch_lengths(epoch)
            if length is not None and lengths.max() > length:
                raise ValueError(
                    f"length={length}: {int((lengths > length).sum())} of {len(lengths)} examples are longer, the "
                    f"longest has {lengths.max()} tokens. Choose length >= {lengths.max()} or truncate when tokenising."
                )
            rng = np.random.default_rng((seed, epoch, 0))
            if group_by_length:
                order = length_grouped_order(lengths, batch_size, rng=rng)
            else:
                order = rng.permutation(len(lengths))
            groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            longest = [-(-int(lengths[rows].max()) // length_multiple) * length_multiple for rows in groups]
            return [BatchPlan(length or n, batch_size, rows) for n, rows in zip(longest, groups, strict=True)]

        self._set_plan(
            plan,
            batch_size=batch_size,
            length=length,
            length_multiple=length_multiple,
            group_by_length=group_by_length,
        )
