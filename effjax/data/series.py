"""Series of unequal length of the user's own: tables of steps, tables of lists, padded arrays."""

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from effjax.core.errors import check_choice, check_number
from effjax.data.facts import Facts, class_counts, fingerprint, spread, unread
from effjax.data.labels import read_labels, read_scores
from effjax.data.sequences import SequenceData
from effjax.data.splits import own_name, own_splits, part
from effjax.data.tables import Table, missing, numbers, pick, read_splits, rows_text

_IDS = ("id", "series", "series_id", "sequence", "sequence_id", "subject", "recording")
_TIMES = ("time", "t", "step", "timestamp")
_LABELS = ("label", "class", "target", "y")
_VALUES = ("inputs", "values", "series", "x", "sequence")
_LENGTHS = ("lengths", "length")


class _Series(NamedTuple):
    """Series of one split: float64 ``[steps, features]`` each, and a table with one row per series."""

    values: list[np.ndarray]
    table: Table
    read: tuple[str, ...]


def series_data(
    path: str | os.PathLike,
    *,
    id: str | None = None,
    time: str | None = None,
    values: str | Sequence[str] | None = None,
    lengths: str | None = None,
    label: str | None = None,
    score: str | None = None,
    length: int | None = None,
    pad: Literal["end", "start"] = "end",
    standardize: bool = True,
    test: str | os.PathLike | None = None,
    split: float | None = None,
    seed: int = 0,
) -> SequenceData:
    r"""Series of numbers, one class or score per series.

    The path is a table as ``read_table`` takes it, of one of three shapes:

    - one row per step: a column ``id`` says which series a row belongs to, ``time`` orders its steps (without one they
      are taken in the order of the file), and the label is the same in all rows of a series;
    - one row per series, whose values are a list of numbers or of vectors (JSON lines, Parquet);
    - an ``.npz`` file with ``inputs`` [n, T] or [n, T, F], padded at the end, ``lengths`` [n] and ``label`` [n].

    Features are standardised by the mean and standard deviation of the training steps, then every series is filled up
    with zeros, the mean, to one length. Where lengths differ the splits have an int32 column ``lengths`` beside
    ``inputs`` and ``targets``, by which ``effjax.tasks.sequence_task`` tells the network where they end. With
    ``pad="start"`` the last step of every series is its own, and a network reads the filling before it.

    Args:
      path: see above.
      id: the column that tells series apart, in a table of steps; ``id`` and the like when None.
      time: the column that orders the steps of a series; ``time`` and the like when None.
      values: the columns of the features (of a table of steps; all other columns when None), or the one column of
        lists or arrays.
      lengths: the array of lengths in an ``.npz`` file; ``lengths`` when None.
      label: the column of the classes; ``label`` and the like when None.
      score: the column of numbers to predict, in place of ``label``.
      length: steps of a series afterwards; longer ones lose their last steps. None for the longest.
      pad: where zeros are filled in.
      standardize: whether to standardise the features.
      test: another file of the same shape to test on.
      split: the share of the series to hold out where there is no test file, of every class alike; 0.2 when None.
      seed: of the draw of the held-out series.

    Returns:
      A ``SequenceData`` of kind ``class`` or ``value``. ``facts`` describes it.

    Raises:
      ValueError: a column is not there, values are missing or no finite numbers, a series is empty, two steps have one
        time, a label changes within a series, or what ``text_data`` refuses of labels.
      FileNotFoundError: nothing is there.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "runs.jsonl"
      >>> rows = [f'{{"values": {[float(i)] * (i + 1)}, "label": {i % 2}}}' for i in range(8)]
      >>> _ = path.write_text("\n".join(rows))
      >>> data = series_data(path, split=0.25)
      >>> data.test["inputs"].shape, data.features, data.outputs
      ((2, 8, 1), 1, 2)
    """
    if label is not None and score is not None:
        raise ValueError(f"label={label!r} and score={score!r}: give one of them, a class or a number to predict.")
    check_choice("pad", pad, ("end", "start"))
    names = [values] if isinstance(values, str) else list(values or ())
    tables, notes = own_splits(path, test, split, read_splits)
    target, named = ("label", label) if score is None else ("score", score)
    column = pick(tables["train"], target, named, _LABELS)
    found = {name: _read(table, id, time, names, lengths, column) for name, table in tables.items()}
    widths = {name: series.values[0].shape[1] for name, series in found.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"{os.fspath(path)}: the splits have unlike numbers of features: {widths}.")
    splits, classes = {}, ()
    for name, series in found.items():
        splits[name] = {"row": np.arange(len(series.values))}
        if target == "score":
            splits[name]["score"] = read_scores(series.table, column)
        else:
            splits[name]["label"], classes = read_labels(series.table, column, classes or None)
    parted = part(splits, target, classes, split, seed, f"{target}={column!r} of {tables['train'].where}")
    chosen = {}
    for name in ("train", "test"):
        held = found["train"] if len(found) == 1 else found[name if name in found else "validation"]
        chosen[name] = [held.values[row] for row in parted.splits[name]["row"]]
    if "validation" in parted.splits:
        notes.append("Not read: the split 'validation', for there is a 'test'.")
    steps = {name: np.asarray([len(item) for item in series], np.int32) for name, series in chosen.items()}
    every = np.concatenate([*steps.values()])
    size = int(every.max()) if length is None else check_number("length", length, low=1, integer=True)
    short, cut = int((every < size).sum()), int((every > size).sum())
    scale = _scale(np.concatenate([item[:size] for item in chosen["train"]])) if standardize else (0.0, 1.0)
    columns = {}
    for name, series in chosen.items():
        inputs = _filled(series, size, pad, *scale)
        if not np.isfinite(inputs).all():
            raise ValueError(f"{os.fspath(path)}: holds values beyond float32. Scale them down.")
        columns[name] = {"inputs": inputs, "targets": parted.splits[name][target]}
        if short:
            columns[name]["lengths"] = np.minimum(steps[name], size)
    if cut:
        notes.append(f"{cut} of {len(every)} series are longer than {size} steps and lost their last steps.")
    if short:
        notes.append(f"{short} of {len(every)} series were filled with zeros at the {pad} to {size} steps.")
    if standardize:
        notes.append("Features were standardised by the training steps.")
    features = found["train"].values[0].shape[1]
    facts = Facts(
        rows={name: len(series) for name, series in chosen.items()},
        classes=class_counts({name: parted.splits[name]["label"] for name in chosen}, classes) if classes else {},
        sizes=f"Series of {spread(every, 'steps')}, {features} feature{'s' * (features > 1)}.",
        split=parted.sentence.replace("rows", "series"),
        notes=(*notes, *unread(tables["train"], found["train"].read)),
        fingerprint=fingerprint(columns, classes),
    )
    return SequenceData(
        name=own_name(path),
        source=facts.source(os.fspath(path)),
        kind="class" if classes else "value",
        train=columns["train"],
        test=columns["test"],
        length=size,
        features=features,
        vocabulary=0,
        outputs=len(classes) or 1,
        draw=None,
        facts=facts,
        pad=pad,
    )


def _scale(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every feature; 1 of one that is constant but for rounding."""
    std = steps.std(0)
    return steps.mean(0), np.where(std > 1e-9 * np.abs(steps).max(0), std, 1)


def _filled(
    series: list[np.ndarray], size: int, pad: str, mean: np.ndarray | float, std: np.ndarray | float
) -> np.ndarray:
    """Scaled series of one length, float32 [rows, size, features]."""
    inputs = np.zeros((len(series), size, series[0].shape[1]), np.float32)
    with np.errstate(over="ignore"):  # what becomes infinite is refused by name
        for row, item in zip(inputs, series, strict=True):
            kept = (item[:size] - mean) / std
            row[slice(0, len(kept)) if pad == "end" else slice(size - len(kept), size)] = kept
    return inputs


# Reading


def _read(
    table: Table, id: str | None, time: str | None, values: list[str], lengths: str | None, target: str
) -> _Series:
    pick(table, "label", target)
    listed = [name for name in values or _VALUES if name in table.columns and _nested(table, name)]
    if listed:
        if id is not None or time is not None:
            raise ValueError(f"{table.where}: {listed[0]!r} holds whole series; id= and time= are for tables of steps.")
        if len(values) > 1:
            raise ValueError(f"values={values!r}: {listed[0]!r} holds whole series. Give that one column.")
        return _whole(table, listed[0], lengths, target)
    if lengths is not None:
        raise ValueError(f"lengths={lengths!r} is for padded arrays; {table.where} has none.")
    return _steps(table, id, time, values, target)


def _nested(table: Table, name: str) -> bool:
    column = table.columns[name]
    if isinstance(column, np.ndarray):
        return column.ndim > 1
    return any(isinstance(value, list) for value in column)


def _whole(table: Table, name: str, lengths: str | None, target: str) -> _Series:
    """One row per series."""
    where = f"values={name!r} of {table.where}"
    column = table.columns[name]
    used = [name, target]
    if lengths is not None or any(key in table.columns for key in _LENGTHS):
        lengths = pick(table, "lengths", lengths, _LENGTHS)
        used.append(lengths)
        counts = numbers(f"lengths={lengths!r} of {table.where}", table.columns[lengths])
        full = np.asarray([len(item) if item is not None else 0 for item in column])
        if counts.dtype.kind == "f" or (bad := np.flatnonzero((counts < 1) | (counts > full))).size:
            row = int(bad[0]) if counts.dtype.kind != "f" else 0
            raise ValueError(
                f"lengths={lengths!r} of {table.where}: row {row} says {counts[row]}; expected an integer from 1 to "
                f"{full[row]}, the steps there are."
            )
        column = [item[:count] for item, count in zip(column, counts, strict=True)]
    found = [_vectors(f"{where}: row {row}", item) for row, item in enumerate(column)]
    widths = sorted({item.shape[1] for item in found})
    if len(widths) > 1:
        raise ValueError(f"{where}: its series have {widths} features per step. All must have as many.")
    return _Series(found, table, tuple(used))


def _vectors(where: str, item: object) -> np.ndarray:
    """One series, float64 [steps, features]."""
    if item is None or not isinstance(item, list | np.ndarray) or not len(item):
        raise ValueError(f"{where} holds an empty series. Remove it.")
    try:
        array = np.asarray(item)
    except ValueError:
        array = np.zeros(0, object)
    if array.dtype.kind == "U":
        raise ValueError(f"{where} holds texts. Series are of numbers; texts are read by text_data.")
    if array.dtype.kind not in "biuf" or array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"{where} must be a list of numbers, or of vectors of one length, without gaps.")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        step = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))[0])
        raise ValueError(f"{where} holds NaN or infinity at step {step}. Fill it, or remove the series.")
    return array.reshape(len(array), -1)


def _steps(table: Table, id: str | None, time: str | None, values: list[str], target: str) -> _Series:
    """One row per step."""
    id = pick(table, "id", id, _IDS)
    if time is not None or any(name in table.columns for name in _TIMES):
        time = pick(table, "time", time, _TIMES)
    values = [pick(table, "values", name) for name in values]
    values = values or [name for name in table.columns if name not in (id, time, target)]
    if not values:
        raise ValueError(f"{table.where}: no columns are left for the features. It has {list(table.columns)}.")
    keys = table.columns[id]
    if rows := missing(keys):
        raise ValueError(f"id={id!r} of {table.where}: {rows_text(rows)} without a series. Fill or remove them.")
    features = np.stack([_feature(table, name) for name in values], 1)
    when = None if time is None else _when(table, time)
    order = np.arange(len(keys)) if when is None else np.argsort(when, kind="stable")
    series: dict[object, list[int]] = {_plain(key): [] for key in keys}
    for row in order.tolist():
        series[_plain(keys[row])].append(row)
    labels = table.columns[target]
    for key, rows in series.items():
        held = list(dict.fromkeys(_plain(labels[row]) for row in sorted(rows)))
        if len(held) > 1:
            raise ValueError(
                f"label={target!r} of {table.where}: changes within series {key!r}, from {held[0]!r} to {held[1]!r}. "
                "One label per series is read, not labels per step; for those build a SequenceData of kind 'tokens'."
            )
        if time is not None and when is not None and (twice := np.flatnonzero(np.diff(when[rows]) == 0)).size:
            raise ValueError(
                f"time={time!r} of {table.where}: series {key!r} has two steps at "
                f"{_plain(table.columns[time][rows[twice[0]]])}. Remove one, or tell the series apart by id."
            )
    first = [rows[0] for rows in series.values()]
    column = labels[first] if isinstance(labels, np.ndarray) else [labels[row] for row in first]
    names = {target: table.class_names[target]} if target in table.class_names else {}
    one = Table(table.where, {target: column}, names)
    return _Series([features[rows] for rows in series.values()], one, (id, *filter(None, [time]), target, *values))


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def _feature(table: Table, name: str) -> np.ndarray:
    try:
        return numbers(f"column {name!r} of {table.where}", table.columns[name]).astype(np.float64)
    except ValueError as error:
        raise ValueError(
            f"{error} Features are chosen by values=; without it all other columns are features."
        ) from error


def _when(table: Table, name: str) -> np.ndarray:
    """Numbers that order the steps; also dates, which sort as ISO 8601 texts do."""
    where = f"time={name!r} of {table.where}"
    column = table.columns[name]
    try:
        return numbers(where, column)
    except ValueError:
        if missing(column):
            raise
    try:
        texts = [value if isinstance(value, str) else value.isoformat() for value in column]
        return np.asarray([np.datetime64(text) for text in texts]).astype("datetime64[us]").astype(np.int64)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{where}: expected numbers or ISO 8601 dates; it holds {column[0]!r}.") from error
