"""Texts of the user's own, from tables."""

import os
from collections.abc import Mapping

import numpy as np

from effjax.data.facts import spread, unread
from effjax.data.labels import known_splits, read_labels, read_scores
from effjax.data.sets import DataSet
from effjax.data.splits import data_set, own_splits, part
from effjax.data.tables import Column, Table, missing, pick, read_splits, rows_text

_TEXTS = ("text", "sentence", "sentence1", "body", "message", "content")
LABELS = ("label", "class", "target")


def text_data(
    path: str | os.PathLike,
    *,
    text: str | None = None,
    text_b: str | None = None,
    label: str | None = None,
    score: str | None = None,
    test: str | os.PathLike | None = None,
    split: float | None = None,
    seed: int = 0,
    quotes: bool = True,
) -> DataSet:
    r"""Texts, or pairs of texts, with a class or a score per row.

    Args:
      path: a table as ``read_table`` takes it, or a folder or named set with the splits ``train`` and ``test``
        (or ``validation``).
      text: the column of the texts; a column called ``text`` and the like when None.
      text_b: the column of the second text of a pair.
      label: the column of the classes: texts, integers from any number on, or booleans. ``label`` when None.
      score: the column of numbers to predict, in place of ``label``.
      test: another file with the same columns to test on.
      split: the share to hold out where there is no test file, of every class alike; 0.2 when None.
      seed: of the draw of the held-out rows.
      quotes: whether ``"`` quotes a field of a CSV file.

    Returns:
      A ``DataSet`` with the splits ``train`` and ``test`` (and ``validation`` where stored) and the columns ``text``,
      or ``sentence1`` and ``sentence2``, and int32 ``label`` or float32 ``score``. ``facts`` describes it.

    Raises:
      ValueError: a column is not there or holds something else, texts or labels are missing, there is one class only,
        or a class has one row and no test file is given.
      FileNotFoundError: nothing is there.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "messages.csv"
      >>> _ = path.write_text("body,kind\nWin now,7\nHi,3\nFree,7\nSee you,3\n")
      >>> data = text_data(path, text="body", label="kind", split=0.5)
      >>> data.classes, sorted(data.splits["train"]), str(data.splits["train"]["label"].dtype)
      (('3', '7'), ['label', 'text'], 'int32')
    """
    if label is not None and score is not None:
        raise ValueError(f"label={label!r} and score={score!r}: give one of them, a class or a number to predict.")
    tables, others = own_splits(path, test, split, lambda file: read_splits(file, quotes=quotes))
    first = tables["train"]
    text = pick(first, "text", text, _TEXTS)
    text_b = pick(first, "text_b", text_b, ()) if text_b is not None else None
    if text_b is None and text == "sentence1" and "sentence2" in first.columns:
        text_b = "sentence2"
    target, named = ("label", label) if score is None else ("score", score)
    column = pick(first, target, named, LABELS)
    if text == column or text_b in (text, column):
        second = "" if text_b is None else f"text_b={text_b!r}, "
        raise ValueError(f"text={text!r}, {second}{target}={column!r}: give a column of its own to each.")
    tables, hidden = known_splits(tables, column) if test is None else (tables, ())
    splits, classes = {}, ()
    for name, table in tables.items():
        columns: dict[str, Column] = {"text" if text_b is None else "sentence1": _texts(table, "text", text)}
        if text_b is not None:
            columns["sentence2"] = _texts(table, "text_b", text_b)
        splits[name] = columns
        if target == "score":
            columns["score"] = read_scores(table, pick(table, "score", column))
        else:
            columns["label"], classes = read_labels(table, pick(table, "label", column), classes or None)
    parted = part(splits, target, classes, split, seed, f"{target}={column!r} of {first.where}")
    notes = [*others, *hidden, *unread(first, (text, text_b, column)), *_repeated(parted.splits)]
    return data_set(path, parted, classes, "text", target, _lengths(parted.splits), notes)


def _texts(table: Table, argument: str, name: str) -> list[str]:
    column = table.columns[pick(table, argument, name)]
    where = f"{argument}={name!r} of {table.where}"
    if isinstance(column, np.ndarray):
        raise ValueError(f"{where}: holds {column.dtype}, not texts.")
    if rows := missing(column):
        raise ValueError(f"{where}: {rows_text(rows)} without a text. Remove or fill them.")
    if wrong := [row for row, value in enumerate(column) if not isinstance(value, str)]:
        kind = type(column[wrong[0]]).__name__
        raise ValueError(f"{where}: {rows_text(wrong)} with a {kind}, not a text. Join lists of words into texts.")
    return list(column)


def _lengths(splits: Mapping[str, Mapping[str, Column]]) -> str:
    names = [name for name in ("text", "sentence1", "sentence2") if name in splits["train"]]
    rows = [zip(*(columns[name] for name in names), strict=True) for columns in splits.values()]
    kind = "Texts" if len(names) == 1 else "Pairs"
    return f"{kind} of {spread((sum(map(len, row)) for split in rows for row in split), 'characters')}."


def _repeated(splits: Mapping[str, Mapping[str, Column]]) -> tuple[str, ...]:
    def rows(columns: Mapping[str, Column]) -> list[tuple]:
        return list(
            zip(*(columns[name] for name in ("text", "sentence1", "sentence2") if name in columns), strict=True)
        )

    seen = set(rows(splits["train"]))
    twice = sum(row in seen for row in rows(splits["test"]))
    return (f"{twice} of {len(rows(splits['test']))} test texts stand among the training texts too.",) if twice else ()
