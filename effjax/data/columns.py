"""Columns of tokenised texts, checked once."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from effjax.data.ragged import Ragged, narrow_integers

__all__: list[str] = []

Columns = Mapping[str, Any]


def token_columns(source: Columns | Any) -> dict[str, Any]:
    """``input_ids`` (and ``token_type_ids``) as ``Ragged``, all else as arrays of 32 bits."""
    columns = _of_table(source) if hasattr(source, "with_format") else dict(source)
    if "input_ids" not in columns:
        raise ValueError(f"columns={sorted(columns)} lack 'input_ids', the token ids. Tokenise the texts first.")
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        if columns.get(name) is None:
            columns.pop(name, None)
        elif not isinstance(columns[name], Ragged):
            columns[name] = Ragged.of(columns[name])
    columns = _without_padding(columns)
    ids = columns["input_ids"]
    for name, column in columns.items():
        if len(column) != len(ids):
            raise ValueError(f"columns[{name!r}] has {len(column)} rows and 'input_ids' {len(ids)}. They must agree.")
        if isinstance(column, Ragged):
            if not np.array_equal(column.offsets, ids.offsets):
                raise ValueError(f"columns[{name!r}] and 'input_ids' have rows of other lengths. They must agree.")
        else:
            columns[name] = _narrow(name, np.asarray(column))
    if not len(ids):
        raise ValueError("columns hold no rows.")
    if not ids.lengths.all():
        empty = np.flatnonzero(ids.lengths == 0)
        raise ValueError(
            f"'input_ids' is empty in {len(empty)} of {len(ids)} rows, the first at {empty[0]}. Drop those texts, or "
            "add special tokens."
        )
    return columns


def _without_padding(columns: dict[str, Any]) -> dict[str, Any]:
    """The tokens that ``attention_mask``, as Hugging Face's tokenizers write it, marks with 1; ``mask`` replaces it."""
    mask = columns.pop("attention_mask", None)
    if mask is None:
        return columns
    ids = columns["input_ids"]
    if not np.array_equal(mask.offsets, ids.offsets):
        raise ValueError("columns['attention_mask'] and 'input_ids' have rows of other lengths. They must agree.")
    if not np.isin(mask.values, (0, 1)).all():
        bad = mask.values[~np.isin(mask.values, (0, 1))][0]
        raise ValueError(f"columns['attention_mask'] holds {bad}; expected 1 at tokens and 0 at padding.")
    if mask.values.all():
        return columns
    # Between two ones of a row nothing may be left out, or tokens would become neighbours that are none.
    ones = np.flatnonzero(mask.values)
    apart = (np.diff(mask.rows[ones]) == 0) & (np.diff(ones) > 1)
    if apart.any():
        row = int(mask.rows[ones[np.flatnonzero(apart)[0]]])
        raise ValueError(
            f"columns['attention_mask'] has a 0 between two 1 in row {row}. Padding stands at an end of a row; leave "
            "such tokens out of 'input_ids' yourself."
        )
    kept = mask.values.astype(bool)
    for name, column in columns.items():
        if isinstance(column, Ragged) and np.array_equal(column.offsets, ids.offsets):
            columns[name] = column.keep(kept)
    return columns


def _narrow(name: str, column: np.ndarray) -> np.ndarray:
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
    columns = {}
    for name in arrow.column_names:
        column = arrow[name].combine_chunks()
        if hasattr(column, "flatten") and hasattr(column, "offsets"):
            offsets = column.offsets.to_numpy().astype(np.int64)
            columns[name] = Ragged(column.flatten().to_numpy(), offsets - offsets[0])
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns
