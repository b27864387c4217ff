"""Real data sets by name, from the package itself, a folder of files, or Hugging Face ``datasets``.

A name is looked up in this order: the folder ``root`` if one is given (and nowhere else), the folder
in the environment variable ``EFFJAX_DATA``, the sets built into the package, the Hugging Face hub.
A folder holds ``<name>/<split>.parquet`` (or ``<split>-00000-of-00002.parquet``, or ``<split>.npz``)
and ``graphs/<graph>.npz``. Nothing is ever unpickled, and a file that is damaged or holds something
else is refused by its name.
"""

import collections
import functools
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effjax.core.errors import near
from effjax.data.facts import Facts
from effjax.data.graph_files import read_graph
from effjax.data.labels import known_splits
from effjax.data.pictures import Options, decode_pictures
from effjax.data.ragged import narrow_integers
from effjax.data.registry import BUILTIN_NAMES, GRAPHS, NAMES, SPECS, Spec
from effjax.data.tables import Column, Table, hub_splits, join_tables, read_file

__all__ = ["DataSet", "load_data"]

BUILTIN = Path(__file__).parent / "builtin"
_SPLIT_FILE = re.compile(r"(train|validation|test)(-\d+-of-\d+)?\.(parquet|npz)")


@dataclass(frozen=True)
class DataSet:
    """A data set in memory.

    Attributes:
      name: the registered name, or ``hf:owner/name``.
      splits: split -> column -> values. Images are uint8 ``[n, height, width, channel]`` in 0..255,
        labels int32 ``[n]``, texts lists of ``str``; recordings are lists of float32 arrays with an
        int32 column ``length``. A graph has the one split ``graph``, whose arrays differ in length.
        Arrays are read-only, for they are shared between calls.
      classes: the names of the classes in the order of their labels, or ``()``.
      licence: under which terms the data may be used.
      source: where they came from and how many rows each split has.
      modality: ``image``, ``text``, ``audio``, ``series`` or ``graph``.
      facts: what a report says of data read from the user's own files; None of a registered set.
    """

    name: str
    splits: Mapping[str, Mapping[str, Any]] = field(repr=False)
    classes: tuple[str, ...]
    licence: str
    source: str
    modality: str
    facts: Facts | None = field(default=None, repr=False)


def load(name: str, *, root: str | os.PathLike | None = None) -> DataSet:
    """Load a real data set by name into memory.

    Built in, so that they need no network: ``digits``, ``fashion_mnist`` (12,000 / 3,000 of its
    images), ``fsdd`` (1,500 of its recordings), ``sms_spam``, ``tiny_shakespeare``, ``graphs/cora``
    and ``graphs/citeseer``. A wheel has 6,000 / 3,000 of ``fashion_mnist`` and no ``fsdd``.
    ``EFFJAX_DATA`` comes before them, and ``source`` tells which was read, and from how many of its
    shards where some are not there.
    ``hf:owner/name`` or ``hf:owner/name:config`` is any other set of the Hugging Face hub, all of it
    decoded into memory; splits without labels (all -1) are left out.

    Args:
      name: a registered name (``cora`` means ``graphs/cora``), or ``hf:owner/name``.
      root: a folder to read from instead of ``EFFJAX_DATA``, the built-in sets and the hub.

    Returns:
      A ``DataSet``. Decoded arrays are kept in memory and shared between calls, hence read-only.

    Raises:
      ValueError: the name is not registered, or a file is damaged or holds something else.
      FileNotFoundError: no place has the set; the message says what to do.

    Example:
      >>> digits = load("digits")
      >>> digits.splits["train"]["image"].shape, str(digits.splits["train"]["label"].dtype)
      ((1437, 8, 8, 1), 'int32')
    """
    if name.startswith("hf:"):
        if root is not None:
            raise ValueError(f"root={os.fspath(root)!r} cannot hold {name!r}: a hub set has no folder. Drop root.")
        return _fresh(_load_hub(name, name.removeprefix("hf:")))
    name = name if name in SPECS else f"graphs/{name}"
    if name not in SPECS:
        given = name.removeprefix("graphs/")
        raise ValueError(
            f"name={given!r} is not a registered data set.{near(given, (*NAMES, *GRAPHS))} Registered: "
            f"{', '.join(NAMES)}. Any set of the Hugging Face hub loads as 'hf:owner/name'."
        )
    for place, folder in _places(root):
        if files := _find(name, folder):
            marks = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
            return _fresh(_load_files(name, place, marks))
    if root is None and SPECS[name].hub:
        try:
            return _fresh(_load_hub(name, SPECS[name].hub))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_missing(name, None)} {error}") from error.__cause__
    raise FileNotFoundError(_missing(name, root))


load_data = load  # its public name: effjax.load_data


# Where a set lies


def _places(root: str | os.PathLike | None) -> list[tuple[str, Path]]:
    if root is not None:
        return [("root", _existing("root", root))]
    from_environment = os.environ.get("EFFJAX_DATA")
    places = [("EFFJAX_DATA", _existing("EFFJAX_DATA", from_environment))] if from_environment else []
    return [*places, ("built-in", BUILTIN)]


def _existing(argument: str, folder: str | os.PathLike) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(f"{argument}={os.fspath(folder)!r} is not a folder. Give one that exists, or unset it.")
    return path


def _find(name: str, folder: Path) -> list[Path]:
    if name.startswith("graphs/"):
        path = folder / f"{name}.npz"
        return [path] if path.is_file() else []
    inside = folder / name
    if not inside.is_dir():
        return []
    files = sorted(path for path in inside.iterdir() if _SPLIT_FILE.fullmatch(path.name))
    if not files:
        raise FileNotFoundError(
            f"{inside} holds no split of {name!r}. Expected train.parquet, validation.parquet, test.parquet, "
            "shards such as train-00000-of-00002.parquet, or the same names ending in .npz."
        )
    counts = inside / "test_human_counts.parquet"
    return [*files, counts] if name == "cifar10" and counts.is_file() else files


def _left_out(files: Sequence[Path]) -> dict[str, str]:
    """By split, `` from 1 of 2 files`` where other shards are not there: a cut, or a copy that was not finished."""
    shards = [match.groups() for path in files if (match := re.fullmatch(r"(\w+)-\d+-of-(\d+)\.\w+", path.name))]
    return {
        split: f" from {held} of {int(count)} files"
        for (split, count), held in collections.Counter(shards).items()
        if held != int(count)
    }


def _missing(name: str, root: str | os.PathLike | None) -> str:
    looked = [f"{place} ({folder})" if place != "built-in" else "the built-in sets" for place, folder in _places(root)]
    if root is None and not os.environ.get("EFFJAX_DATA"):
        looked.insert(0, "EFFJAX_DATA (not set)")
    file = f"{name}.npz" if name.startswith("graphs/") else f"{name}/train.parquet"
    return (
        f"Data set {name!r} was not found. Looked in: {', '.join(looked)}. Ways out: set EFFJAX_DATA to a folder that "
        f"holds {file}; or load another set of the Hugging Face hub as 'hf:owner/name'; or choose a built-in set: "
        f"{', '.join(held for held in BUILTIN_NAMES if _find(held, BUILTIN))}."
    )


def _source(place: str, splits: Mapping[str, Mapping[str, Column]], left_out: Mapping[str, str]) -> str:
    def rows(columns: Mapping[str, Column]) -> str:
        return f"{len(columns['y'])} nodes" if "edge_index" in columns else f"{len(next(iter(columns.values())))} rows"

    said = (f"{split} {rows(columns)}{left_out.get(split, '')}" for split, columns in splits.items())
    return f"{place} ({', '.join(said)})"


def _fresh(data: DataSet) -> DataSet:
    """The cached set with containers of the caller's own; only the read-only arrays stay shared."""
    splits = {
        split: {name: list(column) if isinstance(column, list) else column for name, column in columns.items()}
        for split, columns in data.splits.items()
    }
    return DataSet(data.name, splits, data.classes, data.licence, data.source, data.modality)


# Reading


@functools.lru_cache(maxsize=8)
def _load_files(name: str, place: str, marks: tuple[tuple[str, int, int], ...]) -> DataSet:
    """Decode the files once per process; ``marks`` (path, time, size) notices a file that changed."""
    spec = SPECS[name]
    files = [Path(mark[0]) for mark in marks]
    if spec.modality == "graph":
        graph = read_graph(files[0])
        columns: dict[str, Column] = dict(graph)
        return _data_set(name, place, {"graph": columns}, tuple(str(i) for i in range(graph["y"].max() + 1)))
    tables: dict[str, list[Table]] = {}
    classes: dict[tuple[str, ...], str] = {}  # the names of the classes, and the first file that has them
    for path in files:
        if match := _SPLIT_FILE.fullmatch(path.name):
            table = read_file(path)
            tables.setdefault(match[1], []).append(table)
            if names := table.class_names.get("label"):
                classes.setdefault(names, table.where)
                if len(names) != spec.classes:
                    raise ValueError(f"{path}: names {len(names)} classes; this set has {spec.classes}.")
    if len(classes) > 1:
        raise ValueError(f"The files of {name!r} name its classes differently: {classes}. Take them from one release.")
    splits = {
        split: _decode(join_tables(tables[split]), spec) for split in ("train", "validation", "test") if split in tables
    }
    if files[-1].name == "test_human_counts.parquet" and "test" in splits:
        splits["test"]["human_counts"] = _human_counts(files[-1], splits["test"])
    named = next(iter(classes), tuple(str(i) for i in range(spec.classes)))
    return _data_set(name, place, splits, named, _left_out(files))


@functools.lru_cache(maxsize=2)
def _load_hub(name: str, address: str) -> DataSet:
    spec = SPECS.get(name)
    tables = hub_splits(address)
    if spec:
        renamed = lambda columns: {spec.hub_columns.get(key, key): column for key, column in columns.items()}
        tables = {split: table._replace(columns=renamed(table.columns)) for split, table in tables.items()}
    for target in ("label", "score"):
        tables, _ = known_splits(tables, target)
    splits = {split: _decode(table, spec) for split, table in tables.items()}
    classes = next((names for table in tables.values() if (names := table.class_names.get("label"))), ())
    return _data_set(name, f"Hugging Face {address}", splits, classes)


def _data_set(
    name: str,
    place: str,
    splits: dict[str, dict[str, Column]],
    classes: tuple[str, ...],
    left_out: Mapping[str, str] = types.MappingProxyType({}),
) -> DataSet:
    for columns in splits.values():
        for column in columns.values():
            for array in column if isinstance(column, list) else [column]:
                if isinstance(array, np.ndarray):
                    array.setflags(write=False)
    spec = SPECS.get(name)
    licence = spec.licence if spec else "see the data set's card on the hub"
    modality = spec.modality if spec else _modality(splits)
    return DataSet(name, splits, classes, licence, _source(place, splits, left_out), modality)


def _modality(splits: Mapping[str, Mapping[str, Column]]) -> str:
    arrays = [column for columns in splits.values() for column in columns.values() if isinstance(column, np.ndarray)]
    return "image" if any(array.ndim == 4 for array in arrays) else "text"


def _human_counts(path: Path, test: Mapping[str, Column]) -> np.ndarray:
    """How many people chose each class (CIFAR-10H), in the row order of the test split."""
    table = read_file(path)
    try:
        order, counts = table.columns["orig_index"], np.asarray(table.columns["counts"], np.uint8)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected the columns orig_index and counts (10 each): {error}.") from error
    if not np.array_equal(order, test.get("orig_index", ())):
        raise ValueError(f"{path}: its orig_index differs from test.parquet's. Take both files from one release.")
    return counts


# Decoding columns

_KINDS = {
    "image": ("encoded pictures", "bytes", "numbers"),
    **dict.fromkeys(("audio_mulaw", "acc"), ("bytes",)),
    **dict.fromkeys(
        ("label", "score", "n_samples", "length", "speaker", "take", "orig_index", "span1_index", "span2_index"),
        ("numbers",),
    ),
}


def _decode(table: Table, spec: Spec | None) -> dict[str, Column]:
    """The columns as ``DataSet`` promises them, each checked; all of them of a set that is not registered."""
    where = table.where
    if not table.rows:
        raise ValueError(f"{where}: holds no rows.")
    wanted = list(table.columns)
    if spec:
        required = [key for key in spec.columns.split() if not key.endswith("?")]
        if lacking := [key for key in required if key not in table.columns]:
            raise ValueError(f"{where}: lacks {lacking}; expected the columns {required}, found {wanted}.")
        wanted = [key for key in spec.columns.replace("?", "").split() if key in table.columns]
    out = {key: _column(where, key, table.columns[key], spec) for key in wanted}
    if not spec:
        return out
    if "audio_mulaw" in out:
        out["audio"], out["length"] = out.pop("audio_mulaw"), out.pop("n_samples")
    for key in {"audio", "acc"} & out.keys():
        held = [len(item) for item in out[key]]
        if not np.array_equal(held, out["length"]):
            row = int(np.flatnonzero(held != out["length"])[0])
            raise ValueError(f"{where}: row {row} holds {held[row]} samples and declares {out['length'][row]}.")
    if "label" in out:
        low, high = int(np.min(out["label"])), int(np.max(out["label"]))
        if low < 0 or high >= spec.classes:
            raise ValueError(f"{where}: labels lie in [{low}, {high}]; this set has the labels 0..{spec.classes - 1}.")
    return out


def _column(where: str, key: str, column: Column, spec: Spec | None) -> Column:
    kind = _kind(column)
    legal = _KINDS.get(key, ("text",))
    where = f"{where}: column {key!r}"
    if isinstance(column, list) and (empty := sum(value is None for value in column)) and (spec or kind != "text"):
        raise ValueError(f"{where} has {empty} empty rows of {len(column)}.")
    if spec and kind not in legal:
        held = column.dtype if isinstance(column, np.ndarray) else type(column[0]).__name__
        raise ValueError(f"{where} holds {held}; expected {' or '.join(legal)}.")
    if kind == "encoded pictures" or (spec and kind == "numbers" and key == "image"):
        return _pictures(where, column, spec)
    if isinstance(column, np.ndarray):
        return _numbers(where, key, column)
    decode: dict[str, Any] = {"image": _raw_pictures, "audio_mulaw": _mu_law, "acc": _acceleration}
    return decode[key](where, column, spec) if spec and kind == "bytes" else column


def _kind(column: Column) -> str:
    if isinstance(column, np.ndarray):
        return "numbers"
    first = next((value for value in column if value is not None), None)
    if isinstance(first, dict) and first.keys() == {"bytes", "path"}:
        return "encoded pictures"
    return "text" if isinstance(first, str) else "bytes" if isinstance(first, bytes) else "other"


def _numbers(where: str, key: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        if key in ("label", "length"):
            raise ValueError(f"{where} holds {values.dtype}; expected integers.")
        if bad := int(values.size - np.isfinite(values).sum()):
            raise ValueError(f"{where} has {bad} NaN or infinite values of {values.size}.")
        return values.astype(np.float32)
    if key in ("label", "speaker", "length", "n_samples"):
        return narrow_integers(where, values, np.int32)
    return np.array(values)


def _pictures(where: str, column: Column, spec: Spec | None) -> np.ndarray:
    """Encoded pictures or an array of pixels; grey or colour as the set is registered."""
    pixels = decode_pictures(where, column, Options(None, spec.image[2] if spec and spec.image else None, None, False))
    if spec and (pixels.dtype != np.uint8 or pixels.shape[1:] != spec.image):
        wanted = ["n", *(spec.image or ())]
        raise ValueError(f"{where} holds {pixels.dtype}{list(pixels.shape)}; expected uint8{wanted}.")
    return pixels


def _raw_pictures(where: str, blobs: list[bytes], spec: Spec) -> np.ndarray:
    shape = spec.image or ()
    size = math.prod(shape)
    for row, blob in enumerate(blobs):
        if len(blob) != size:
            raise ValueError(f"{where}: row {row} has {len(blob)} bytes; expected {size} for {shape}.")
    return np.frombuffer(b"".join(blobs), np.uint8).reshape(-1, *shape)


def _mu_law(where: str, blobs: list[bytes], spec: Spec) -> list[np.ndarray]:
    codes = np.arange(256) / 127.5 - 1
    wave = (np.sign(codes) * (256 ** np.abs(codes) - 1) / 255).astype(np.float32)
    return [wave[np.frombuffer(blob, np.uint8)] for blob in blobs]


def _acceleration(where: str, blobs: list[bytes], spec: Spec) -> list[np.ndarray]:
    """Codes 0..63 to metres per second squared, +-1.5 g."""
    out = []
    for row, blob in enumerate(blobs):
        codes = np.frombuffer(blob, np.uint8)
        if len(codes) % 3 or (len(codes) and codes.max() > 63):
            raise ValueError(f"{where}: row {row} is not (length, 3) codes in 0..63.")
        out.append((-14.709 + codes.reshape(-1, 3).astype(np.float32) / 63 * 29.418).astype(np.float32))
    return out
