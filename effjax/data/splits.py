"""Rows to train and to test on, for the user's own data."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from effjax.core.errors import check_number
from effjax.data.facts import Facts, class_counts, fingerprint
from effjax.data.sets import DataSet
from effjax.data.tables import Column, existing

OWN = "the user's own"
SPLIT = 0.2


def hold_out(
    labels: np.ndarray | None, rows: int, share: float, seed: int, classes: Sequence[str] = (), where: str = "label"
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers to train and to test on, both ascending: of every class the same share, drawn with a seed.

    Of a class with n rows, ``round(share * n)`` are held out, but at least one, and at least one is kept.

    Args:
      labels: int [rows]; None for a draw without classes.
      rows: number of rows.
      share: to hold out, in (0, 1).
      seed: of the draw.
      classes: names of the classes, for messages.
      where: for messages.

    Raises:
      ValueError: a class has one row only, or there are fewer than two rows.

    Example:
      >>> train, test = hold_out(np.array([0, 0, 0, 0, 1, 1]), 6, 0.25, seed=0)
      >>> len(train), len(test)
      (4, 2)
    """
    check_number("split", share, low=0, high=1, open_low=True, open_high=True)
    check_number("seed", seed, low=0, integer=True)
    groups = [np.arange(rows)] if labels is None else [np.flatnonzero(labels == label) for label in np.unique(labels)]
    single = [int(labels[group[0]]) for group in groups if len(group) == 1] if labels is not None else []
    if single:
        names = [classes[label] if label < len(classes) else str(label) for label in single]
        raise ValueError(
            f"{where}: {'class' if len(names) == 1 else 'classes'} {', '.join(map(repr, names[:5]))} "
            f"{'has' if len(names) == 1 else 'have'} one row only, so it cannot be both trained and tested on. Remove "
            "it, merge it with another class, or give a test file (test=FILE)."
        )
    if rows < 2:
        raise ValueError(f"{where}: {rows} row cannot be split. Give a test file (test=FILE).")
    draw = np.random.default_rng(seed)
    held = np.zeros(rows, bool)
    for group in groups:
        held[draw.permutation(group)[: min(max(round(share * len(group)), 1), len(group) - 1)]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def fixed_rows(argument: str, rows: int | None, held: int) -> Int[np.ndarray, "rows"]:
    """Numbers of some of the rows, ascending: the same random choice in every run.

    Args:
      argument: the name of ``rows``, for the message.
      rows: how many; None takes all.
      held: how many there are.

    Returns:
      int64 [rows].

    Raises:
      ValueError: more rows than there are, or fewer than one.

    Example:
      >>> fixed_rows("train_rows", 3, 8).tolist()
      [2, 3, 4]
    """
    if rows is None:
        return np.arange(held)
    check_number(argument, rows, low=1, high=held, integer=True, hint="None takes all.")
    return np.sort(np.random.default_rng(0).permutation(held)[:rows])


def split_sentence(train: int, test: int, share: float, seed: int, stratified: bool) -> str:
    """What was held out and how."""
    how = "the same share of every class, " if stratified else ""
    return f"{test} of {train + test} rows were held out to test on ({share:.0%}; {how}drawn with seed {seed})."


class Parted(NamedTuple):
    """Splits of columns, and a sentence on how they came about."""

    splits: Mapping[str, Mapping[str, Any]]
    sentence: str


def own_splits(
    path: str | os.PathLike,
    test: str | os.PathLike | None,
    split: float | None,
    read: Callable[[str | os.PathLike], dict[str, Any]],
) -> tuple[dict[str, Any], list[str]]:
    """The splits of the files, ``train`` alone where the rows are still to be split, and a note on what is left."""
    found = read(path)
    if test is not None:
        if split is not None:
            raise ValueError(f"split={split!r} and test={os.fspath(test)!r}: give one of them.")
        if len(found) > 1:
            raise ValueError(f"test={os.fspath(test)!r}: {os.fspath(path)} already has the splits {sorted(found)}.")
        if not os.fspath(test).startswith("hf:"):
            existing(test, "test")
        held = read(test)
        if len(held) > 1:
            raise ValueError(f"test={os.fspath(test)!r} holds the splits {sorted(held)}; expected one.")
        return {"train": next(iter(found.values())), "test": next(iter(held.values()))}, []
    if len(found) == 1:
        return {"train": next(iter(found.values()))}, []
    if "train" not in found or not {"test", "validation"} & found.keys():
        raise ValueError(
            f"{os.fspath(path)}: has the splits {sorted(found)}; expected 'train' and 'test'. Give one file."
        )
    if split is not None:
        raise ValueError(f"split={split!r}: {os.fspath(path)} already has the splits {sorted(found)}. Leave it out.")
    known = [name for name in ("train", "validation", "test") if name in found]
    others = [name for name in found if name not in known]
    notes = [f"Not read: the splits {', '.join(map(repr, others))}."] if others else []
    return {name: found[name] for name in known}, notes


def part(
    splits: Mapping[str, Mapping[str, Column]],
    target: str,
    classes: tuple[str, ...],
    split: float | None,
    seed: int,
    where: str,
) -> Parted:
    """Hold out rows where the files did not."""
    if len(splits) > 1:
        if "test" not in splits:
            held = f"The rows of 'validation' ({len(splits['validation'][target])}), as stored, are tested on."
            return Parted({"train": splits["train"], "test": splits["validation"]}, held)
        return Parted(splits, f"The test rows ({len(splits['test'][target])}) are the files' own.")
    columns = splits["train"]
    share = SPLIT if split is None else split
    labels = np.asarray(columns["label"]) if target == "label" else None
    train, test = hold_out(labels, len(columns[target]), share, seed, classes, where)
    chosen = {"train": train, "test": test}
    return Parted(
        {name: {key: _take(column, rows) for key, column in columns.items()} for name, rows in chosen.items()},
        split_sentence(len(train), len(test), share, seed, labels is not None),
    )


def data_set(
    path: str | os.PathLike,
    parted: Parted,
    classes: tuple[str, ...],
    modality: str,
    target: str,
    sizes: str,
    notes: list[str],
) -> DataSet:
    """A ``DataSet`` of the user's own with its facts; arrays become read-only."""
    splits = parted.splits
    for columns in splits.values():
        for column in columns.values():
            if isinstance(column, np.ndarray):
                column.setflags(write=False)
    facts = Facts(
        rows={name: len(columns[target]) for name, columns in splits.items()},
        classes=class_counts({name: c["label"] for name, c in splits.items()}, classes) if classes else {},
        sizes=sizes,
        split=parted.sentence,
        notes=tuple(notes),
        fingerprint=fingerprint(splits, classes),
    )
    return DataSet(own_name(path), splits, classes, OWN, facts.source(os.fspath(path)), modality, facts)


def own_name(path: str | os.PathLike) -> str:
    """The file's name without its ending."""
    given = os.fspath(path)
    return given if given.startswith("hf:") else Path(given).expanduser().resolve().name.partition(".")[0]


def _take(column: Column, rows: np.ndarray) -> Column:
    return column[rows] if isinstance(column, np.ndarray) else [column[row] for row in rows]
