"""Real data sets by name, from the package itself, a folder of files, or Hugging Face ``datasets``.

A name is looked up in this order: the folder ``root`` if one is given (and nowhere else), the folder
in the environment variable ``EFFJAX_DATA``, the sets built into the package, the Hugging Face hub.
A folder holds ``<name>/<split>.parquet`` (or ``<split>-00000-of-00002.parquet``, or ``<split>.npz``)
and ``graphs/<graph>.npz``. Nothing is ever unpickled, and a file that is damaged or holds something
else is refused by its name.
"""

import functools
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effjax.core.errors import near
from effjax.data.facts import Facts
from effjax.data.graph_files import read_graph
from effjax.data.npz_files import READ_ERRORS, first_line, read_arrays
from effjax.data.ragged import narrow_integers

__all__ = ["DataSet", "load_data"]

Column = np.ndarray | list
BUILTIN = Path(__file__).parent / "builtin"
_SPLIT_FILE = re.compile(r"(train|validation|test)(-\d+-of-\d+)?\.(parquet|npz)")
_RESEARCH = "research use only, not redistributable"


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


class _Spec(NamedTuple):
    """What a registered set must hold; a column ending in ``?`` may be absent."""

    modality: str
    columns: str
    licence: str
    classes: int = 0
    image: tuple[int, int, int] | None = None
    hub: str = ""
    hub_columns: Mapping[str, str] = {}


def _image(height: int, channels: int, classes: int, licence: str, hub: str = "", **hub_columns: str) -> _Spec:
    return _Spec("image", "image label orig_index?", licence, classes, (height, height, channels), hub, hub_columns)


def _text(columns: str, classes: int = 0, licence: str = _RESEARCH, hub: str = "", **hub_columns: str) -> _Spec:
    return _Spec("text", columns, licence, classes, None, hub, hub_columns)


_PAIR = "sentence1 sentence2 label"
_GRAPHS = [
    "actor",
    "amazon_computers",
    "amazon_photo",
    "chameleon_musae",
    "citeseer",
    "citeseer_attacked",
    "coauthor_cs",
    "coauthor_physics",
    "cora",
    "cora_attacked",
    "cora_ml",
    "cora_ml_attacked",
    "cornell",
    "dblp",
    "polblogs_attacked",
    "pubmed",
    "squirrel_musae",
    "texas",
    "wisconsin",
]
_SPECS: dict[str, _Spec] = {
    "digits": _image(8, 1, 10, "BSD-3-Clause (scikit-learn)"),
    "fashion_mnist": _image(28, 1, 10, "MIT", "zalando-datasets/fashion_mnist"),
    "mnist": _image(28, 1, 10, "not stated; usually given as CC BY-SA 3.0", "ylecun/mnist"),
    "cifar10": _image(32, 3, 10, _RESEARCH, "uoft-cs/cifar10", img="image"),
    "cifar100_sample": _image(32, 3, 100, _RESEARCH),
    "imagenet_sample128": _Spec("image", "image label wnid?", _RESEARCH, 1000, (128, 128, 3)),
    "sst2": _text("sentence label", 2, hub="stanfordnlp/sst2"),
    "glue/cola": _text("sentence label", 2, hub="nyu-mll/glue:cola"),
    "glue/mrpc": _text(_PAIR, 2, hub="nyu-mll/glue:mrpc"),
    "glue/qnli": _text("question sentence label", 2, hub="nyu-mll/glue:qnli"),
    "glue/rte": _text(_PAIR, 2, hub="nyu-mll/glue:rte"),
    "glue/stsb": _text("sentence1 sentence2 score", hub="nyu-mll/glue:stsb", label="score"),
    "glue/wnli": _text(_PAIR, 2, hub="nyu-mll/glue:wnli"),
    "superglue/boolq": _text("question passage label", 2),
    "superglue/cb": _text("premise hypothesis label", 3),
    "superglue/copa": _text("premise choice1 choice2 question label", 2),
    "superglue/multirc": _text("paragraph question answer label", 2),
    "superglue/wic": _text("word sentence1 sentence2 label", 2),
    "superglue/wsc": _text("text span1_text span1_index span2_text span2_index label", 2),
    "ag_news": _text("text label", 4, hub="fancyzhx/ag_news"),
    "trec": _text("text label", 6, "not stated"),
    "imdb2k": _text("text label", 2),
    "sms_spam": _text("text label", 2, "free for all purposes"),
    "ptb": _text("text", licence="LDC, not redistributable"),
    "wikitext2": _text("text", licence="CC BY-SA 3.0", hub="Salesforce/wikitext:wikitext-2-v1"),
    "tiny_shakespeare": _text("text", licence="public domain"),
    "cmudict": _text("word phones", licence="CMU (BSD-like)"),
    "fsdd": _Spec("audio", "audio_mulaw n_samples label speaker take?", "CC BY-SA 4.0", 10),
    "hmp_accel": _Spec("series", "acc length label volunteer?", _RESEARCH, 14),
    **{f"graphs/{name}": _Spec("graph", "", "see the licence table of the graph folder") for name in _GRAPHS},
    "graphs/cora": _Spec("graph", "", "MIT (repackaged by tkipf/gcn and kimiyoung/planetoid)"),
    "graphs/citeseer": _Spec("graph", "", "MIT (repackaged by tkipf/gcn and kimiyoung/planetoid)"),
}
NAMES: tuple[str, ...] = tuple(sorted(_SPECS))
BUILTIN_NAMES: tuple[str, ...] = (
    "digits",
    "fashion_mnist",
    "fsdd",
    "graphs/citeseer",
    "graphs/cora",
    "sms_spam",
    "tiny_shakespeare",
)


def load(name: str, *, root: str | os.PathLike | None = None) -> DataSet:
    """Load a real data set by name into memory.

    Built in, so that they need no network: ``digits``, ``fashion_mnist`` (12,000 / 3,000 of its
    images), ``fsdd`` (1,500 of its recordings), ``sms_spam``, ``tiny_shakespeare``, ``graphs/cora``
    and ``graphs/citeseer``. ``EFFJAX_DATA`` comes before them, and ``source`` tells which was read.
    ``hf:owner/name`` or ``hf:owner/name:config`` is any other set of the Hugging Face hub, all of it
    decoded into memory; splits without labels (all -1) are left out.

    Args:
      name: one of ``effjax.data.sets.NAMES`` (``cora`` means ``graphs/cora``), or ``hf:owner/name``.
      root: a folder to read from instead of ``EFFJAX_DATA``, the built-in sets and the hub.

    Returns:
      A ``DataSet``. Decoded arrays are kept in memory and shared between calls, hence read-only.

    Raises:
      ValueError: the name is not registered, or a file is damaged or holds something else.
      FileNotFoundError: no place has the set; the message says where it looked and what to do.

    Example:
      >>> digits = load("digits")
      >>> digits.splits["train"]["image"].shape, str(digits.splits["train"]["label"].dtype)
      ((1437, 8, 8, 1), 'int32')
    """
    if name.startswith("hf:"):
        if root is not None:
            raise ValueError(f"root={os.fspath(root)!r} cannot hold {name!r}: a hub set has no folder. Drop root.")
        return _load_hub(name, name.removeprefix("hf:"), None)
    name = name if name in _SPECS else f"graphs/{name}"
    if name not in _SPECS:
        given = name.removeprefix("graphs/")
        raise ValueError(
            f"name={given!r} is not a registered data set.{near(given, (*NAMES, *_GRAPHS))} Registered: "
            f"{', '.join(NAMES)}. Any set of the Hugging Face hub loads as 'hf:owner/name'."
        )
    for place, folder in _places(root):
        if files := _find(name, folder):
            marks = tuple((str(f), f.stat().st_mtime_ns, f.stat().st_size) for f in files)
            return _fresh(_load_files(name, place, marks))
    if root is None and _SPECS[name].hub:
        return _load_hub(name, _SPECS[name].hub, _SPECS[name])
    raise FileNotFoundError(_missing(name, root))


load_data = load  # its public name: effjax.load_data


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


def _missing(name: str, root: str | os.PathLike | None) -> str:
    looked = [f"{place} ({folder})" if place != "built-in" else "the built-in sets" for place, folder in _places(root)]
    if root is None and not os.environ.get("EFFJAX_DATA"):
        looked.insert(0, "EFFJAX_DATA (not set)")
    file = f"{name}.npz" if name.startswith("graphs/") else f"{name}/train.parquet"
    return (
        f"Data set {name!r} was not found. Looked in: {', '.join(looked)}. Ways out: set EFFJAX_DATA to a folder that "
        f"holds {file}; or load another set of the Hugging Face hub as 'hf:owner/name'; or choose a built-in set: "
        f"{', '.join(BUILTIN_NAMES)}."
    )


def _source(place: str, splits: Mapping[str, Mapping[str, Column]]) -> str:
    def rows(columns: Mapping[str, Column]) -> str:
        return f"{len(columns['y'])} nodes" if "edge_index" in columns else f"{len(next(iter(columns.values())))} rows"

    return f"{place} ({', '.join(f'{split} {rows(columns)}' for split, columns in splits.items())})"


def _fresh(data: DataSet) -> DataSet:
    """The cached set with containers of the caller's own; only the read-only arrays stay shared."""
    splits = {
        split: {name: list(column) if isinstance(column, list) else column for name, column in columns.items()}
        for split, columns in data.splits.items()
    }
    return DataSet(data.name, splits, data.classes, data.licence, data.source, data.modality)


# Reading files


@functools.lru_cache(maxsize=8)
def _load_files(name: str, place: str, marks: tuple[tuple[str, int, int], ...]) -> DataSet:
    """Decode the files once a process; ``marks`` (path, time, size) notices a file that changed."""
    spec = _SPECS[name]
    files = [Path(mark[0]) for mark in marks]
    if spec.modality == "graph":
        splits = {"graph": read_graph(files[0])}
        classes = tuple(str(i) for i in range(splits["graph"]["y"].max() + 1))
        return _frozen(DataSet(name, splits, classes, spec.licence, _source(place, splits), spec.modality))
    parts: dict[str, list[dict[str, Column]]] = {}
    classes = ()
    for path in files:
        if match := _SPLIT_FILE.fullmatch(path.name):
            reader = _read_parquet if path.suffix == ".parquet" else _read_npz
            columns, names = reader(path, spec)
            if classes and names and names != classes:
                raise ValueError(f"{path}: its class names {names} differ from {classes} in {files[0].name}.")
            parts.setdefault(match[1], []).append(columns)
            classes = classes or names
    splits = {split: _join(parts[split], name) for split in ("train", "validation", "test") if split in parts}
    if files[-1].name == "test_human_counts.parquet" and "test" in splits:
        splits["test"]["human_counts"] = _human_counts(files[-1], splits["test"])
    classes = classes or tuple(str(i) for i in range(spec.classes))
    return _frozen(DataSet(name, splits, classes, spec.licence, _source(place, splits), spec.modality))


def _frozen(data: DataSet) -> DataSet:
    for columns in data.splits.values():
        for column in columns.values():
            for array in column if isinstance(column, list) else [column]:
                if isinstance(array, np.ndarray):
                    array.setflags(write=False)
    return data


def _join(parts: list[dict[str, Column]], name: str) -> dict[str, Column]:
    if len({frozenset(part) for part in parts}) > 1:
        raise ValueError(f"The shards of {name!r} hold different columns: {[sorted(part) for part in parts]}.")
    if len(parts) == 1:
        return parts[0]
    return {
        key: list(itertools.chain.from_iterable(part[key] for part in parts))
        if isinstance(parts[0][key], list)
        else np.concatenate([part[key] for part in parts])
        for key in parts[0]
    }


def _read_table(path: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path)
    except READ_ERRORS as error:
        raise ValueError(f"{path}: damaged, or not a Parquet file ({first_line(error)}). Copy it again.") from error


def _read_parquet(path: Path, spec: _Spec) -> tuple[dict[str, Column], tuple[str, ...]]:
    table = _read_table(path)
    try:
        info = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        names = tuple(info.get("info", {}).get("features", {}).get("label", {}).get("names", ()))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: its Hugging Face feature metadata cannot be read ({error}).") from error
    if names and len(names) != spec.classes:
        raise ValueError(f"{path}: names {len(names)} classes; this set has {spec.classes}.")
    wanted = _wanted(path, table.column_names, spec)
    return _decode(path, {key: table[key] for key in wanted}, spec), names


def _wanted(path: Path | str, present: list[str], spec: _Spec) -> list[str]:
    required = [key for key in spec.columns.split() if not key.endswith("?")]
    if lacking := [key for key in required if key not in present]:
        raise ValueError(f"{path}: lacks {lacking}; expected the columns {required}, found {present}.")
    return [key for key in spec.columns.replace("?", "").split() if key in present]


def _read_npz(path: Path, spec: _Spec) -> tuple[dict[str, Column], tuple[str, ...]]:
    arrays = read_arrays(path)
    return _decode(path, {key: arrays[key] for key in _wanted(path, list(arrays), spec)}, spec), ()


def _human_counts(path: Path, test: Mapping[str, Column]) -> np.ndarray:
    """How many people chose each class (CIFAR-10H), in the row order of the test split."""
    table = _read_table(path)
    try:
        order, counts = table["orig_index"].to_numpy(), np.asarray(table["counts"].to_pylist(), np.uint8)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected the columns orig_index and counts (10 each): {error}.") from error
    if not np.array_equal(order, test.get("orig_index", ())):
        raise ValueError(f"{path}: its orig_index differs from test.parquet's. Take both files from one release.")
    return counts


# Decoding columns


def _decode(where: Path | str, columns: Mapping[str, Any], spec: _Spec) -> dict[str, Column]:
    """Turn Arrow columns or plain arrays into what ``DataSet`` promises, checking each."""
    out = {key: _column(where, key, column, spec) for key, column in columns.items()}
    sizes = {key: len(column) for key, column in out.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{where}: columns differ in length: {sizes}.")
    if not sizes or not next(iter(sizes.values())):
        raise ValueError(f"{where}: holds no rows.")
    if "audio_mulaw" in out:
        out["audio"], out["length"] = out.pop("audio_mulaw"), out.pop("n_samples")
    for key in {"audio", "acc"} & out.keys():
        held = [len(item) for item in out[key]]
        if not np.array_equal(held, out["length"]):
            row = int(np.flatnonzero(held != out["length"])[0])
            raise ValueError(f"{where}: row {row} holds {held[row]} samples and declares {out['length'][row]}.")
    if "label" in out and spec.classes:
        low, high = int(out["label"].min()), int(out["label"].max())
        if low < 0 or high >= spec.classes:
            raise ValueError(f"{where}: labels lie in [{low}, {high}]; this set has the labels 0..{spec.classes - 1}.")
    return out


def _column(where: Path | str, key: str, column: Any, spec: _Spec) -> Column:
    kind = _kind(column)
    stored = isinstance(column, np.ndarray)
    legal = [name for name in _LEGAL_KINDS.get(key, ("text",)) if (key, name) != ("image", "number") or stored]
    if (kind not in legal and (spec is not _ANY or key == "image")) or kind == "other":
        held = column.dtype if stored else column.type
        raise ValueError(f"{where}: column {key!r} has type {held}; expected {' or '.join(legal)}.")
    if stored:
        if key == "image":
            return _image_array(where, column, spec.image)
        return column.tolist() if kind == "text" else _numbers(where, key, column)
    if column.null_count and (spec is not _ANY or kind != "text"):
        raise ValueError(f"{where}: column {key!r} has {column.null_count} empty rows of {len(column)}.")
    if kind == "number":
        return _numbers(where, key, column.to_numpy())
    values = column.to_pylist()
    if kind == "encoded image":
        return _encoded_images(where, key, values, spec.image)
    decode = {"image": _raw_images, "audio_mulaw": _mu_law, "acc": _acceleration}
    return values if spec is _ANY or kind == "text" else decode[key](where, values, spec)


_LEGAL_KINDS = {
    "image": ("encoded image", "bytes", "number"),
    "audio_mulaw": ("bytes",),
    "acc": ("bytes",),
    **dict.fromkeys(
        ("label", "score", "n_samples", "length", "speaker", "take", "orig_index", "span1_index", "span2_index"),
        ("number",),
    ),
}


def _kind(column: Any) -> str:
    if isinstance(column, np.ndarray):
        return {"U": "text", **dict.fromkeys("biuf", "number")}.get(column.dtype.kind, "other")
    import pyarrow.types as types

    if types.is_struct(column.type) and {member.name for member in column.type} == {"bytes", "path"}:
        return "encoded image"
    kinds = {
        "text": types.is_string(column.type) or types.is_large_string(column.type),
        "bytes": types.is_binary(column.type) or types.is_large_binary(column.type),
        "number": types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type),
        "nested": types.is_nested(column.type),
    }
    return next((kind for kind, holds in kinds.items() if holds), "other")


def _numbers(where: Path | str, key: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        if key in ("label", "length"):
            raise ValueError(f"{where}: column {key!r} has dtype {values.dtype}; expected integers.")
        if bad := int(values.size - np.isfinite(values).sum()):
            raise ValueError(f"{where}: column {key!r} has {bad} NaN or infinite values of {values.size}.")
        return values.astype(np.float32)
    if key in ("label", "speaker", "length", "n_samples"):
        return narrow_integers(f"{where}: column {key!r}", values, np.int32)
    return np.array(values)


def _raw_images(where: Path | str, blobs: list[bytes], spec: _Spec) -> np.ndarray:
    shape = spec.image
    size = math.prod(shape)
    for row, blob in enumerate(blobs):
        if len(blob) != size:
            raise ValueError(f"{where}: image {row} has {len(blob)} bytes; expected {size} for {shape}.")
    return np.frombuffer(b"".join(blobs), np.uint8).reshape(-1, *shape)


def _encoded_images(
    where: Path | str, key: str, items: list[dict[str, Any]], shape: tuple[int, int, int] | None
) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(f"{where} holds encoded images, which need Pillow: pip install 'effjax[study]'.") from error
    out = None
    for row, item in enumerate(items):
        try:
            picture = Image.open(io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"])
            grey = shape[2] == 1 if shape else (out.shape[3] == 1 if out is not None else picture.mode in ("1", "L"))
            pixels = np.asarray(picture.convert("L" if grey else "RGB"), np.uint8)
        except (OSError, SyntaxError, TypeError, AttributeError, Image.DecompressionBombError) as error:
            raise ValueError(f"{where}: {key} {row} is not a readable image ({first_line(error)}).") from error
        pixels = pixels.reshape(*pixels.shape[:2], -1)
        expected = shape or (out.shape[1:] if out is not None else pixels.shape)
        if pixels.shape != expected:
            raise ValueError(f"{where}: {key} {row} has shape {pixels.shape}; expected {expected}.")
        if out is None:
            out = np.empty((len(items), *expected), np.uint8)
        out[row] = pixels
    return out if out is not None else np.empty((0, 0, 0, 0), np.uint8)


def _image_array(where: Path | str, images: np.ndarray, shape: tuple[int, int, int] | None) -> np.ndarray:
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != shape:
        raise ValueError(
            f"{where}: 'image' is {images.dtype}{list(images.shape)}; expected uint8{['n', *(shape or ())]}."
        )
    return images


def _mu_law(where: Path | str, blobs: list[bytes], spec: _Spec) -> list[np.ndarray]:
    codes = np.arange(256) / 127.5 - 1
    wave = (np.sign(codes) * (256 ** np.abs(codes) - 1) / 255).astype(np.float32)
    return [wave[np.frombuffer(blob, np.uint8)] for blob in blobs]


def _acceleration(where: Path | str, blobs: list[bytes], spec: _Spec) -> list[np.ndarray]:
    """Codes 0..63 to metres per second squared, +-1.5 g."""
    out = []
    for row, blob in enumerate(blobs):
        codes = np.frombuffer(blob, np.uint8)
        if len(codes) % 3 or (len(codes) and codes.max() > 63):
            raise ValueError(f"{where}: 'acc' {row} is not (length, 3) codes in 0..63.")
        out.append((-14.709 + codes.reshape(-1, 3).astype(np.float32) / 63 * 29.418).astype(np.float32))
    return out


# Hugging Face hub

_ANY = _Spec("text", "", "see the data set's card on the hub")


@functools.lru_cache(maxsize=2)
def _hub_splits(address: str) -> Any:
    import datasets

    path, _, config = address.partition(":")
    return datasets.load_dataset(path, config or None)


def _load_hub(name: str, address: str, spec: _Spec | None) -> DataSet:
    try:
        found = _hub_splits(address)
    except Exception as error:  # the hub client raises its own, urllib's, httpx's and the system's errors
        answer = f"The Hugging Face hub ({address}) answered: {type(error).__name__}: {first_line(error)}."
        way_out = (
            _missing(name, None) if spec else "Check the name, or go online once: the hub client keeps what it got."
        )
        raise FileNotFoundError(f"{way_out} {answer}") from error
    splits, classes, modality = {}, (), spec.modality if spec else "text"
    for split, rows in found.items():
        where = f"{address}[{split}]"
        table = rows.with_format("arrow")[:]
        table = table.rename_columns([(spec or _ANY).hub_columns.get(key, key) for key in table.column_names])
        label = rows.features.get("label")
        classes = classes or tuple(getattr(label, "names", None) or ())
        kinds = {type(feature).__name__ for feature in rows.features.values()}
        if "Audio" in kinds:
            raise ValueError(f"{where}: encoded audio is not decoded here. Cast it to arrays first (datasets.Audio).")
        modality = "image" if "Image" in kinds else modality
        if any(set(table[key].unique().to_pylist()) == {-1} for key in {"label", "score"} & set(table.column_names)):
            continue
        wanted = _wanted(where, table.column_names, spec) if spec else table.column_names
        splits[split] = _decode(where, {key: table[key] for key in wanted}, spec or _ANY)
    if not splits:
        raise ValueError(f"{name}: every split of {address} is without labels.")
    licence = spec.licence if spec else _ANY.licence
    return _frozen(DataSet(name, splits, classes, licence, _source(f"Hugging Face {address}", splits), modality))
