"""Columns of tokenised texts, checked once."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from effjax.data.pipeline import check_source
from effjax.data.ragged import Ragged, narrow_integers

__all__: list[str] = []

Columns = Mapping[str, Any]
_MADE = ("mask", "segment_ids")  # batches have their own
_BY_TOKEN = ("attention_mask", "token_type_ids")


class _Lists(NamedTuple):
    """Lists of integers of a table, as in ``Ragged``; whether they go by tokens is not yet known."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def token_columns(source: Columns | Sequence[Columns] | Any) -> dict[str, Any]:
    """``input_ids`` and what else has one integer per token as ``Ragged``, all else as arrays of 32 bits.

    Lists have one integer per token where they are as long as ``input_ids`` in every row; lists of one length, other
    than that, are vectors ``[n, k]``. Beside a ``Ragged`` an array ``[n, k]`` always holds vectors. What
    ``attention_mask`` masks is padding, and is cut off.
    """
    check_source("columns", source)
    columns = _of_table(source) if hasattr(source, "with_format") else _of_rows(source)
    columns = {name: column for name, column in columns.items() if column is not None}
    if "input_ids" not in columns:
        raise ValueError(f"columns={sorted(columns)} lack 'input_ids', the token ids. Tokenise the texts first.")
    if made := [name for name in _MADE if name in columns]:
        raise ValueError(f"columns hold {made}, which every batch makes itself. Call a mask 'attention_mask'.")
    given = columns["input_ids"]
    ids = Ragged(*given) if isinstance(given, _Lists) else given if isinstance(given, Ragged) else Ragged.of(given)
    if not len(ids):
        raise ValueError("columns hold no rows.")
    found: dict[str, Any] = {"input_ids": ids}
    for name, column in columns.items():
        if len(column) != len(ids):
            raise ValueError(f"columns[{name!r}] has {len(column)} rows and 'input_ids' {len(ids)}. They must agree.")
        if name != "input_ids":
            vectors = isinstance(given, Ragged) and isinstance(column, np.ndarray) and name != "attention_mask"
            found[name] = _narrow(name, column) if vectors else _column(name, column, ids)
    found = _without_padding(found)
    ids = found["input_ids"]
    if not ids.lengths.all():
        empty = np.flatnonzero(ids.lengths == 0)
        raise ValueError(
            f"'input_ids' is empty in {len(empty)} of {len(ids)} rows, the first at {empty[0]}. Drop those texts, or "
            "add special tokens."
        )
    return found


def _of_rows(source: Any) -> dict[str, Any]:
    """The columns of a mapping, or of a list of examples."""
    if isinstance(source, Mapping) or hasattr(source, "keys"):
        return dict(source)
    if (
        not isinstance(source, Sequence)
        or isinstance(source, str)
        or not all(isinstance(row, Mapping) for row in source)
    ):
        raise TypeError(
            f"columns is a {type(source).__name__}; expected columns by name, a Hugging Face Dataset, a list of "
            "examples, or a function from the epoch to columns."
        )
    if not source:
        raise ValueError("columns hold no rows.")
    names = list(source[0])
    for row, example in enumerate(source):
        if set(example) != set(names):
            raise ValueError(f"columns: example {row} has {sorted(example)}, and the first {sorted(names)}.")
    return {name: [example[name] for example in source] for name in names}


def _column(name: str, column: Any, ids: Ragged) -> Any:
    """A ``Ragged`` of one integer per token, or an array with one number or vector per row."""
    if isinstance(column, Ragged):
        return _along(name, column, ids)
    if isinstance(column, _Lists):
        return _integers(name, column.values, np.diff(column.offsets), ids)
    if isinstance(column, np.ndarray) and column.dtype != object and column.ndim != 2:
        return _narrow(name, column)
    rows = list(column)
    nested = [isinstance(value, list | tuple | np.ndarray) for value in rows]
    if not any(nested):
        return _narrow(name, _array(name, rows))
    if not all(nested):
        missing = nested.index(False)
        raise ValueError(f"columns[{name!r}] holds lists, but {rows[missing]!r} in row {missing}. Fill it, or drop it.")
    parts = [_array(name, row) for row in rows]
    lengths = np.asarray([len(part) for part in parts])
    integers = all(part.ndim == 1 and (part.dtype.kind in "iub" or not part.size) for part in parts)
    if integers:
        return _integers(name, np.concatenate([part.astype(np.int64, copy=False) for part in parts]), lengths, ids)
    if len(set(lengths.tolist())) > 1:
        raise ValueError(
            f"columns[{name!r}] holds rows of unlike lengths that are no integers; batches pad integers alone, one for "
            "each token. Leave the column out, or repair it."
        )
    return _narrow(name, _array(name, parts))


def _integers(name: str, values: np.ndarray, lengths: np.ndarray, ids: Ragged) -> Any:
    """Lists of integers, end to end: one for each token, or vectors of one length."""
    if np.array_equal(lengths, ids.lengths):
        return Ragged(narrow_integers(f"columns[{name!r}]", values, np.int32), ids.offsets)
    if len(set(lengths.tolist())) == 1 and lengths[0] and name not in _BY_TOKEN:
        return _narrow(name, values.reshape(len(ids), -1))
    row = int(np.flatnonzero(lengths != ids.lengths)[0])
    raise ValueError(
        f"columns[{name!r}] and 'input_ids' have rows of other lengths. They must agree: row {row} has {lengths[row]} "
        f"values for {ids.lengths[row]} tokens. Leave the column out, or repair it."
    )


def _along(name: str, column: Ragged, ids: Ragged) -> Ragged:
    if not np.array_equal(column.offsets, ids.offsets):
        raise ValueError(f"columns[{name!r}] and 'input_ids' have rows of other lengths. They must agree.")
    return column


def _array(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(
            f"columns[{name!r}] holds rows of unlike shapes. Leave the column out, or repair it."
        ) from error


def _without_padding(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns without the tokens that ``attention_mask`` masks, and without it."""
    mask = columns.pop("attention_mask", None)
    if mask is None:
        return columns
    if not isinstance(mask, Ragged):
        raise ValueError("columns['attention_mask'] must hold one number, 0 or 1, for every token of 'input_ids'.")
    if not np.isin(mask.values, (0, 1)).all():
        raise ValueError(
            f"columns['attention_mask'] runs from {mask.values.min()} to {mask.values.max()}; expected 0 or 1."
        )
    kept = mask.values == 1
    if kept.all():
        return columns
    starts = np.flatnonzero(np.diff(np.concatenate([[0], kept.astype(np.int8)])) == 1)
    # Ones that begin a row begin a run of their own, though those of the row before end there.
    begins = np.zeros(len(kept), bool)
    begins[starts] = True
    begins[mask.offsets[:-1][mask.lengths > 0]] |= kept[mask.offsets[:-1][mask.lengths > 0]]
    runs = np.bincount(mask.rows[begins], minlength=len(mask))
    if (runs > 1).any():
        raise ValueError(
            f"columns['attention_mask'] has zeros between ones in {int((runs > 1).sum())} rows, the first is row "
            f"{int(np.argmax(runs > 1))}: such tokens are no padding, and batches know only that. Leave the column "
            "out, or take these tokens out of 'input_ids'."
        )
    return {name: column.keep(kept) if isinstance(column, Ragged) else column for name, column in columns.items()}


def _narrow(name: str, values: Any) -> np.ndarray:
    column = np.asarray(values)
    if column.dtype.kind in "USO" and column.size and isinstance(column.ravel()[0], str):
        raise ValueError(
            f"columns[{name!r}] holds texts, such as {column.ravel()[0][:30]!r}; batches hold numbers. Of labels make "
            f"classes: numpy.unique(labels, return_inverse=True)[1], or dataset.class_encode_column({name!r}). Leave "
            f"other texts out: dataset.remove_columns({name!r})."
        )
    if column.dtype.kind not in "biuf" or (column.dtype.kind == "f" and not np.isfinite(column).all()):
        raise ValueError(
            f"columns[{name!r}] is {column.dtype}{list(column.shape)}; expected finite numbers, one row per example. "
            "Leave the column out, or repair it."
        )
    if column.dtype.itemsize <= 4:
        return column
    return column.astype(np.float32) if column.dtype.kind == "f" else narrow_integers(name, column, np.int32)


def _of_table(table: Any) -> dict[str, Any]:
    """The columns of a Hugging Face ``Dataset``, its lists without a Python object per token."""
    arrow = table.with_format("arrow")[:]
    return {name: _of_arrow(name, arrow[name].combine_chunks()) for name in arrow.column_names}


def _of_arrow(name: str, column: Any) -> Any:
    listed = hasattr(column, "flatten") and hasattr(column, "offsets")
    if not listed:
        return column.to_pylist() if hasattr(column, "flatten") else column.to_numpy(zero_copy_only=False)
    values = column.flatten()
    if column.null_count or values.null_count:
        raise ValueError(f"columns[{name!r}] holds None. Fill it, or drop those rows.")
    offsets = column.offsets.to_numpy().astype(np.int64)
    flat = values.to_numpy(zero_copy_only=False)
    if flat.dtype.kind not in "iu":
        return column.to_pylist()
    return _Lists(flat, offsets - offsets[0])
