"""Sequences of unequal length as two flat arrays."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Integer

from effjax.core.errors import check_number

__all__ = ["Ragged"]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Sequence ``i`` is ``values[offsets[i]:offsets[i + 1]]``.

    Two arrays instead of a list of arrays: every operation on a whole data set is one NumPy call.

    Attributes:
      values: int32 ``[total]``, all sequences end to end.
      offsets: int64 ``[n + 1]``, from 0 to ``total``.

    Raises:
      ValueError: arrays of other kinds, or offsets that do not climb from 0 to ``len(values)``.

    Example:
      >>> tokens = Ragged.of([[5, 6, 7], [], [8]])
      >>> len(tokens), tokens.lengths.tolist(), tokens[0].tolist()
      (3, [3, 0, 1], [5, 6, 7])
      >>> tokens.pad([0, 2], 4)
      array([[5, 6, 7, 0],
             [8, 0, 0, 0]], dtype=int32)
    """

    values: Int[np.ndarray, "total"]
    offsets: Int[np.ndarray, "n_plus_1"]

    def __post_init__(self) -> None:
        for name, dtype in (("values", np.int32), ("offsets", np.int64)):
            array = np.asarray(getattr(self, name))
            if array.ndim != 1 or array.dtype.kind not in "iu":
                raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; it must be one axis of integers.")
            object.__setattr__(self, name, narrow_integers(name, array, dtype))
        if len(self.offsets) < 1 or self.offsets[0] != 0 or (np.diff(self.offsets) < 0).any():
            raise ValueError(f"offsets={self.offsets[:5].tolist()}... must begin with 0 and never fall.")
        if self.offsets[-1] != len(self.values):
            raise ValueError(
                f"offsets end at {self.offsets[-1]}, but values holds {len(self.values)}. They must agree."
            )

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int] | np.ndarray]) -> "Ragged":
        """From lists, arrays, or a column of lists (of a Hugging Face ``Dataset``, say)."""
        rows = [np.asarray(sequence) for sequence in sequences]
        for i, row in enumerate(rows):
            if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
                raise ValueError(
                    f"sequences[{i}] is {row.dtype}{list(row.shape)}; it must be one axis of integers. Tokenise first."
                )
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
        full = [row for row in rows if row.size]
        return cls(np.concatenate(full) if full else np.zeros(0, np.int32), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Int[np.ndarray, "length"]:
        """A view of one sequence."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index={index} is outside [0, {len(self) - 1}].")
        index %= len(self)
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> Int[np.ndarray, "n"]:
        """Int32 ``[n]``."""
        return np.diff(self.offsets).astype(np.int32)

    @property
    def rows(self) -> Int[np.ndarray, "total"]:
        """Int64 ``[total]``: which sequence each value belongs to."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    @property
    def positions(self) -> Int[np.ndarray, "total"]:
        """Int64 ``[total]``: where each value stands in its sequence."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def take(self, rows: Sequence[int] | Integer[np.ndarray, "m"]) -> "Ragged":
        """The sequences of these rows, in this order; a row may come twice."""
        rows = np.asarray(rows, np.int64)
        sizes = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        moved = np.repeat(self.offsets[:-1][rows] - offsets[:-1], sizes)
        return Ragged(self.values[moved + np.arange(offsets[-1])], offsets)

    def keep(self, kept: np.ndarray) -> "Ragged":
        """Without the values where ``kept`` (bool ``[total]``) is False; as many sequences as before."""
        counts = np.concatenate([[0], np.cumsum(kept)])
        return Ragged(self.values[kept], counts[self.offsets])

    def pad(
        self, rows: Sequence[int] | Integer[np.ndarray, "m"], length: int, value: int = 0
    ) -> Int[np.ndarray, "m length"]:
        """The sequences of these rows, filled up at the end.

        Args:
          rows: which, in this order.
          length: of every row afterwards.
          value: what to fill with.

        Returns:
          Int32 ``[len(rows), length]``.

        Raises:
          ValueError: a sequence is longer than ``length``.
        """
        check_number("length", length, low=0, integer=True)
        taken = self.take(rows)
        lengths = taken.lengths
        if (lengths > length).any():
            first = int(np.argmax(lengths > length))
            raise ValueError(
                f"length={length}: {int((lengths > length).sum())} of {len(taken)} rows are longer, the first is row "
                f"{int(np.asarray(rows)[first])} with {lengths[first]}. Choose length >= {lengths.max()} or truncate."
            )
        out = np.full((len(taken), length), value, np.int32)
        out[np.arange(length) < lengths[:, None]] = taken.values
        return out


def narrow_integers(name: str, array: np.ndarray, dtype: type) -> np.ndarray:
    """``array`` in ``dtype``, refused where a value would wrap around."""
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        raise ValueError(f"{name} runs from {array.min()} to {array.max()}, which does not fit {np.dtype(dtype)}.")
    return array.astype(dtype, copy=False)


# What fills a column of one integer per token; any other gets -100, which losses leave out, as it may hold classes.
_FILLS = {"input_ids": 0, "token_type_ids": 0, "special_tokens_mask": 1, "position_ids": 0}


def fill_value(name: str) -> int:
    """What the column is padded with: as Hugging Face tokenizers do, and -100 where it may hold classes of tokens."""
    return _FILLS.get(name, -100)


def padded_columns(columns: Mapping[str, Any], length: int, pad_id: int = 0) -> dict[str, Any]:
    """Columns of texts as arrays of one length, with a ``mask`` that is True at real tokens.

    Args:
      columns: ``input_ids`` (``Ragged``) and others; those that are not ragged stay as they are.
      length: of a row; None of the texts may be longer.
      pad_id: what fills ``input_ids``; other ragged columns are filled as ``PlannedBatches`` fills them.

    Example:
      >>> padded_columns({"input_ids": Ragged.of([[5], [6, 7]])}, 2)["mask"].tolist()
      [[True, False], [True, True]]
    """
    lengths = columns["input_ids"].lengths
    found = {"mask": np.arange(length) < lengths[:, None]}
    for name, column in columns.items():
        value = pad_id if name == "input_ids" else fill_value(name)
        found[name] = column.pad(np.arange(len(lengths)), length, value) if isinstance(column, Ragged) else column
    return found


def pad_ragged(sequences: Iterable[np.ndarray], length: int) -> np.ndarray:
    """Cut or zero-pad sequences ``[t_i, ...]`` to one array ``[n, length, ...]``.

    Args:
      sequences: arrays that differ at most in their first axis, such as the column ``audio``.
      length: the common length in samples.

    Returns:
      An array ``[n, length, ...]`` of their dtype.

    Example:
      >>> pad_ragged([np.ones(3), np.ones(1)], 2)
      array([[1., 1.],
             [1., 0.]])
    """
    sequences = list(sequences)
    out = np.zeros((len(sequences), length, *sequences[0].shape[1:]), sequences[0].dtype)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence[:length]
    return out
