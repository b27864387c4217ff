"""Label and score columns of the user's own tables."""

import re
from collections.abc import Sequence

import numpy as np

from effjax.core.errors import near
from effjax.data.tables import Column, Table, missing, numbers, rows_text

_LISTED = 12


def read_scores(table: Table, name: str) -> np.ndarray:
    """A column of numbers to predict, float32."""
    found = numbers(f"score={name!r} of {table.where}", table.columns[name])
    if (found == found[0]).all():
        raise ValueError(f"score={name!r} of {table.where}: every row holds {found[0]:g}. There is nothing to predict.")
    return found.astype(np.float32)


def read_labels(table: Table, name: str, classes: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """A label column as int32 ``[rows]`` and the names of its classes.

    Names come from the file where it has them. Integers keep their order and need not begin at 0; texts are sorted.

    Args:
      table: the table.
      name: of the column.
      classes: the names of the training rows' classes, in order; others are refused.

    Raises:
      ValueError: values are missing, are numbers with a fraction, lie beyond int32, are -1 beside 0, 1,
        2, ..., or are of one class only.
    """
    where = f"label={name!r} of {table.where}"
    column = table.columns[name]
    # "nan" is what pandas makes of a missing label among texts.
    nans = [row for row, value in enumerate(column) if isinstance(value, str) and value.strip().lower() == "nan"]
    if rows := sorted({*missing(column), *nans}):
        raise ValueError(f"{where}: {rows_text(rows)} without a label. Remove or fill them.")
    names = table.class_names.get(name)
    if names is not None:
        labels = numbers(where, column)
        if labels.min() < 0 or labels.max() >= len(names):
            raise ValueError(
                f"{where}: labels from {labels.min()} to {labels.max()} for {len(names)} classes. -1 means that the "
                "labels of this split are hidden: take another split."
            )
        values = [names[label] for label in labels.tolist()]
        order = tuple(names)
    else:
        values = _class_values(where, column)
        order = _ordered(where, values)
    if classes is not None:
        if strange := [value for value in order if value not in classes and (names is None or value in values)]:
            raise ValueError(
                f"{where}: classes {strange[:5]} do not occur in the training rows.{near(strange[0], classes)} "
                f"Those have: {', '.join(classes[:_LISTED])}."
            )
        order = tuple(classes)
    elif len(set(values)) < 2:
        raise ValueError(f"{where}: every row is of class {values[0]!r}. There is nothing to tell apart.")
    number = {value: index for index, value in enumerate(order)}
    return np.asarray([number[value] for value in values], np.int32), order


def _class_values(where: str, column: Column) -> list[str]:
    """Every label as the name of its class."""
    if isinstance(column, np.ndarray) and column.ndim != 1:
        one_hot = "One-hot labels become numbers by argmax(1); labels per token or per step are not read."
        way = "Give its column 0." if column.shape[1:] == (1,) else one_hot
        raise ValueError(f"{where}: has shape {column.shape}; expected one label per row. {way}")
    if isinstance(column, np.ndarray) and column.dtype.kind == "b":
        return [str(value).lower() for value in column.tolist()]
    if isinstance(column, list) and (
        nested := [row for row, value in enumerate(column) if isinstance(value, list | dict)]
    ):
        raise ValueError(
            f"{where}: {rows_text(nested)} with a list of labels. One label per row is read, not labels per token or "
            "per step; for those build the task in Python."
        )
    values = column.tolist() if isinstance(column, np.ndarray) else column
    texts = all(isinstance(value, str) for value in values)
    # "01" is the name of a class, not the number 1.
    if texts and not all(_is_number(value) and not re.match(r"\s*-?0\d", value) for value in values):
        return _texts(where, values)
    if not texts and not all(isinstance(value, int | float) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise ValueError(f"{where}: holds values of several kinds, {kinds}. Make them all texts or all integers.")
    found = numbers(where, column)
    if found.dtype.kind == "f" and (fractions := np.flatnonzero(found != np.round(found))).size:
        raise ValueError(
            f"{where}: holds {len(np.unique(found))} numbers such as {found[fractions[0]]:g}, which are no classes. "
            f"Predict numbers with score={name_of(where)}, or write classes as texts."
        )
    if max(found.max(), -found.min()) > 2**31 - 1:
        raise ValueError(
            f"{where}: runs from {found.min()} to {found.max()}, beyond int32. Numbers of that size are ids or "
            "hashes; write classes as texts or as 0, 1, ..."
        )
    whole = found.astype(np.int64)
    # -1, 0, 1 may be three classes, as -1, 1 may be two.
    classes = np.unique(whole)
    if len(classes) > 3 and np.array_equal(classes, np.arange(-1, len(classes) - 1)):
        raise ValueError(
            f"{where}: {rows_text(np.flatnonzero(whole == -1).tolist())} with -1, which beside the classes 0 to "
            f"{classes[-1]} means unknown. Remove them; if -1 is a class, give the classes names."
        )
    return [str(value) for value in whole.tolist()]


def name_of(where: str) -> str:
    """The quoted column in ``label='kind' of ...``."""
    return where.partition("=")[2].partition(" of ")[0]


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text)) and "_" not in text
    except ValueError:
        return False


def _texts(where: str, values: list[str]) -> list[str]:
    stripped: dict[str, str] = {}
    for value in dict.fromkeys(values):
        if (other := stripped.setdefault(value.strip(), value)) != value:
            raise ValueError(f"{where}: the classes {other!r} and {value!r} differ in spaces only. Make them one.")
    return values


def _ordered(where: str, values: list[str]) -> tuple[str, ...]:
    unique = sorted(set(values))
    whole = all(value.removeprefix("-").isdecimal() for value in unique)
    return tuple(sorted(unique, key=int) if whole else unique)


def known_splits(tables: dict[str, Table], name: str) -> tuple[dict[str, Table], tuple[str, ...]]:
    """Without the splits whose labels are hidden (all -1), as the test splits of benchmarks are, and a note on them."""
    hidden = [
        split
        for split, table in tables.items()
        if split != "train"
        and isinstance(column := table.columns.get(name), np.ndarray)
        and column.size
        and (column == -1).all()
    ]
    notes = tuple(f"Not read: the split {split!r}, whose labels are hidden (-1)." for split in hidden)
    left = {split: table for split, table in tables.items() if split not in hidden}
    return left, notes
