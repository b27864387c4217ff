"""Tables from files: CSV, TSV, JSON lines, JSON, Parquet, npz, and saved or named Hugging Face data sets."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effjax.core.errors import near
from effjax.core.files import first_line
from effjax.data.npz_files import FREE, MOST_TIMES, READ_ERRORS, check_unpacked, read_arrays

Column = np.ndarray | list
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_SAMPLE_ROWS, _SAMPLE_SIZE = 50, 1 << 18
SPLITS = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("validation", "valid", "val", "dev"), "validation"
)
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLITS)})([-_.]\d+(-of-\d+)?)?", re.IGNORECASE)
_SIGNATURES = {b"PAR1": "Parquet", b"PK\x03\x04": "a zip archive", b"\x1f\x8b": "gzip", b"\x89PNG": "a PNG image"}


class Table(NamedTuple):
    """The columns of a file.

    Attributes:
      where: the file, for messages.
      columns: name -> values: a numeric array where every value is a number, else a list. CSV and TSV hold texts
        only, as they are written.
      class_names: column -> names of the classes 0, 1, ..., of the columns for which the file has them.
    """

    where: str
    columns: dict[str, Column]
    class_names: Mapping[str, tuple[str, ...]] = {}

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), ()))


def read_table(path: str | os.PathLike, *, quotes: bool = True) -> Table:
    r"""Read one table.

    The format follows from the name: ``.csv`` (delimiter comma, semicolon, tab or bar, whichever fits), ``.tsv``,
    ``.jsonl`` or ``.ndjson`` (one object per line), ``.json`` (an array of objects, an object of columns, or lines),
    ``.parquet``, ``.npz``; texts may be compressed (``.csv.gz``). A folder is a data set saved by
    ``Dataset.save_to_disk``. ``hf:owner/name`` or ``hf:owner/name:config`` is a set of the Hugging Face hub.

    Args:
      path: the file, folder or name.
      quotes: whether ``"`` quotes a field of CSV and TSV. False for files in which it is a plain character.

    Returns:
      A ``Table``.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: the file is damaged, is not what its name says, has rows of unlike width, two columns of one name,
        several splits, or holds no rows.

    Example:
      >>> import pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "messages.csv"
      >>> _ = path.write_text('body;kind\n"Win; now";spam\nHi;ham\n')
      >>> read_table(path).columns
      {'body': ['Win; now', 'Hi'], 'kind': ['spam', 'ham']}
    """
    splits = read_splits(path, quotes=quotes)
    if len(splits) > 1:
        raise ValueError(f"{os.fspath(path)} holds the splits {sorted(splits)}; one table is wanted. Give one file.")
    return next(iter(splits.values()))


def read_splits(path: str | os.PathLike, *, quotes: bool = True) -> dict[str, Table]:
    """Read a file, or a folder or named set with splits: ``train``, ``validation``, ``test``, or ``""`` for one table.

    A folder may also hold ``train.csv`` and ``test.csv``, or shards such as ``train-00000-of-00002.parquet``, of any
    format of ``read_table``; or such Parquet files in a folder of its own, as a copy of a hub's set does.
    """
    given = os.fspath(path)
    if given.startswith("hf:"):
        return _only_or_all(hub_splits(given.removeprefix("hf:")))
    file = existing(given)
    splits = _folder(file, quotes) if file.is_dir() else {"": read_file(file, quotes)}
    for table in splits.values():
        if not table.rows:
            raise ValueError(f"{table.where}: holds no rows.")
    return splits


def existing(path: str | os.PathLike, argument: str = "path") -> Path:
    """The file or folder, or an error that says what else could be meant."""
    found = Path(path).expanduser()
    if found.exists():
        return found
    beside = [item.name for item in found.parent.iterdir()] if found.parent.is_dir() else []
    hint = (
        f" A set of the Hugging Face hub is written 'hf:{path}'." if re.fullmatch(r"[\w.-]+/[\w.-]+", f"{path}") else ""
    )
    raise FileNotFoundError(f"{argument}={os.fspath(path)!r} is not a file or folder.{near(found.name, beside)}{hint}")


def pick(table: Table, argument: str, name: str | None, defaults: Sequence[str] = ()) -> str:
    """The column that an argument names, or the first default that the table has.

    Raises:
      ValueError: there is none; the message lists near names and all columns.
    """
    if not isinstance(name, str | None):
        raise TypeError(f"{argument}={name!r} must be the name of one column, not {type(name).__name__}.")
    if name is not None and name in table.columns:
        return name
    held = f"It has: {', '.join(repr(column) for column in table.columns)}."
    if name is not None:
        raise ValueError(f"{argument}={name!r} is not a column of {table.where}.{near(name, table.columns)} {held}")
    for default in defaults:
        if default in table.columns:
            return default
    raise ValueError(f"{table.where}: which column is the {argument}? Name it: {argument}=COLUMN. {held}")


def numbers(where: str, column: Column) -> np.ndarray:
    """A column of numbers, also of those that a CSV file wrote as text, as int64 or float64.

    Raises:
      ValueError: a value is missing, is no number, or is not finite; the message names the rows.
    """
    if isinstance(column, np.ndarray):
        values = column
    else:
        if rows := missing(column):
            raise ValueError(f"{where}: {rows_text(rows)} without a value. Remove or fill them.")
        parsed = [_number(value) for value in column]
        if bad := [row for row, value in enumerate(parsed) if value is None]:
            raise ValueError(f"{where}: {rows_text(bad)} without a number; the first holds {column[bad[0]]!r:.80}.")
        values = np.asarray(parsed)
    if values.dtype.kind not in "biuf" or values.ndim != 1:
        raise ValueError(f"{where}: holds {values.dtype}{list(values.shape[1:])}; expected one number per row.")
    if values.dtype.kind == "f":
        if (bad := np.flatnonzero(~np.isfinite(values))).size:
            raise ValueError(f"{where}: {rows_text(bad)} with NaN or infinity. Remove or fill them.")
        return values.astype(np.float64)
    return values.astype(np.int64) if values.dtype != np.uint64 else values


def missing(column: Column) -> list[int]:
    """The rows of a column without a value: None, NaN, or an empty text."""
    if isinstance(column, np.ndarray):
        return np.flatnonzero(np.isnan(column)).tolist() if column.dtype.kind == "f" and column.ndim == 1 else []
    return [
        row
        for row, value in enumerate(column)
        if value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and value != value)
    ]


def rows_text(rows: Sequence[int] | np.ndarray) -> str:
    """``2 rows (3, 7; the first row is 0)``."""
    listed = ", ".join(str(int(row)) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
    return f"{len(rows)} row{'s' * (len(rows) > 1)} ({listed}; the first row is 0)"


def _number(value: Any) -> int | float | None:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float):
        return value
    if isinstance(value, str):
        for kind in (int, float):
            with contextlib.suppress(ValueError):
                # Python takes 1_000; no table means that by it.
                return kind(value) if "_" not in value else None
    return None


# Files


def read_file(path: Path, quotes: bool = True) -> Table:
    """Read one file of a table; its format follows from its name."""
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if suffix not in _READERS:
        known = ", ".join(f".{name}" for name in _READERS)
        raise ValueError(
            f"{path}: cannot tell its format from its name. Files of tables end in {known} (or .gz of them)."
        )
    if suffix in ("parquet", "npz"):
        table = _READERS[suffix](path)
    elif suffix in ("csv", "tsv", "txt"):
        table = Table(str(path), _csv(path, _text(path), "\t" if suffix == "tsv" else None, quotes))
    else:
        table = Table(str(path), _READERS[suffix](path, _text(path)))
    sizes = {name: len(column) for name, column in table.columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"{path}: its columns differ in length: {sizes}.")
    return table


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = _unzipped(data)
    except (OSError, EOFError, zlib.error, ValueError, MemoryError) as error:
        raise ValueError(f"{path}: cannot be read ({first_line(error)}).") from error
    for start, kind in _SIGNATURES.items():
        if data.startswith(start):
            raise ValueError(f"{path}: begins like {kind}, which its name does not say. Rename or export it again.")
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error


def _unzipped(data: bytes) -> bytes:
    with gzip.open(io.BytesIO(data)) as file:
        text = file.read(max(FREE, MOST_TIMES * len(data)) + 1)
    check_unpacked(len(text), len(data))
    return text


def _csv(path: Path, text: str, delimiter: str | None, quotes: bool) -> dict[str, Column]:
    delimiter = delimiter or _delimiter(text, quotes)
    header, rows = None, []
    for line, row in _records(path, text, delimiter, quotes):
        if header is None:
            header = row
        elif len(row) != len(header):
            raise ValueError(
                f"{path}: line {line} has {len(row)} fields, the header {len(header)} ({header}), separated by "
                f"{_DELIMITERS[delimiter]}. Quote fields that hold the separator, or repair the line."
            )
        else:
            rows.append(row)
    if header is None:
        raise ValueError(f"{path}: is empty.")
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"{path}: has more than one column named {repeated}. Rename them.")
    if all(_number(name) is not None for name in header):
        raise ValueError(
            f"{path}: its first line {header} holds numbers, not names. Add a header line of column names."
        )
    columns = zip(*rows, strict=True) if rows else ((),) * len(header)
    return {name: list(column) for name, column in zip(header, columns, strict=True)}


def _records(path: Path, text: str, delimiter: str, quotes: bool) -> Iterable[tuple[int, list[str]]]:
    # The C reader refuses an open quote at the end of the file; Arrow's reads the rest of the file as one field.
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
    )
    start = 1
    try:
        for row in reader:
            if row:
                yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{path}: the record from line {start} on is not CSV ({error}). Repair its quotes, or give quotes=False "
            'where " is a plain character.'
        ) from error
    finally:
        csv.field_size_limit(limit)


def _delimiter(text: str, quotes: bool) -> str:
    """The separator that cuts the first records into the most fields, as many in each; a comma where none does."""
    found, sample = {}, text[:_SAMPLE_SIZE]
    for delimiter in _DELIMITERS:
        widths = []
        with contextlib.suppress(ValueError):  # an open quote, also one that the sample cuts
            for _, row in itertools.islice(_records(Path(), sample, delimiter, quotes), _SAMPLE_ROWS):
                widths.append(len(row))
        if len(sample) < len(text) and len(widths) > 1:
            widths.pop()
        if widths and widths[0] > 1:
            found[delimiter] = (sum(width == widths[0] for width in widths) / len(widths), widths[0])
    return max(found, key=lambda delimiter: found[delimiter]) if found else ","


def _lines(path: Path, text: str) -> dict[str, Column]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            record = _json(path, line, f"line {number} ")
            if not isinstance(record, dict):
                raise ValueError(f"{path}: line {number} is {line.strip()!r:.60}, not an object of columns.")
            records.append(record)
    return _of_records(records)


def _array(path: Path, text: str) -> dict[str, Column]:
    if text.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            held = json.loads(text)
            if isinstance(held, dict) and held and all(isinstance(column, list) for column in held.values()):
                return {name: _typed(column) for name, column in held.items()}
        return _lines(path, text)
    records = _json(path, text, "")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path}: expected an array of objects, an object of columns, or one object per line.")
    return _of_records(records)


def _json(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {where}is not JSON ({first_line(error)}).") from error


def _of_records(records: list[dict]) -> dict[str, Column]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: _typed([record.get(name) for record in records]) for name in names}


def _typed(values: list) -> Column:
    """An array where all values are numbers of a kind, else the list."""
    kinds = set(map(type, values))
    if kinds == {bool} or kinds == {int} or kinds in ({float}, {int, float}):
        with contextlib.suppress(OverflowError):
            array = np.asarray(values)
            return array if array.dtype.kind in "biuf" else values
    return values


def _parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (*READ_ERRORS, TypeError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: damaged, or not a Parquet file ({first_line(error)}). Copy it again.") from error
    return _arrow(str(path), table, _class_names(str(path), table.schema))


def _npz(path: Path) -> Table:
    columns = {name: array if array.dtype.kind != "U" else array.tolist() for name, array in read_arrays(path).items()}
    if scalars := [name for name, column in columns.items() if isinstance(column, np.ndarray) and not column.ndim]:
        raise ValueError(f"{path}: {scalars} hold one value, not one per row. Leave them out of the file.")
    return Table(str(path), columns)


_READERS: dict[str, Callable] = {
    "csv": _csv,
    "tsv": _csv,
    "txt": _csv,
    "jsonl": _lines,
    "ndjson": _lines,
    "json": _array,
    "parquet": _parquet,
    "npz": _npz,
}


# Folders and Hugging Face data sets


def _folder(path: Path, quotes: bool) -> dict[str, Table]:
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _saved(path)
    files = _split_files(path, tuple(_READERS))
    if "train" not in files and (within := parquet_folder(path)):
        files = _split_files(within, ("parquet",))
    if "train" not in files:
        raise ValueError(
            f"{path}: a folder of tables holds train.csv (and test.csv), train.jsonl, train-00000-of-00002.parquet or "
            "the like, or was saved by Dataset.save_to_disk; found "
            f"{sorted(item.name for item in path.iterdir())[:10]}."
        )
    return {split: join_tables([read_file(file, quotes) for file in parts]) for split, parts in files.items()}


def parquet_folder(path: Path) -> Path | None:
    """Where the Parquet files of splits lie: the folder or, as in copies of a hub's sets, one in it; None for nowhere.

    Raises:
      ValueError: several folders in it hold such files.
    """
    if "train" in _split_files(path, ("parquet",)):
        return path
    found = [item for item in sorted(path.iterdir()) if item.is_dir() and "train" in _split_files(item, ("parquet",))]
    if len(found) > 1:
        raise ValueError(f"{path}: holds several sets, {[item.name for item in found]}. Give the folder of one.")
    return found[0] if found else None


def _split_files(folder: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    """The files that are named after splits, such as ``train-00000-of-00002.parquet``."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        name, _, ending = file.name.lower().removesuffix(".gz").rpartition(".")
        match = _SPLIT_FILE.fullmatch(name)
        if match and ending in endings and file.is_file():
            found.setdefault(SPLITS[match[1].lower()], []).append(file)
    return found


def join_tables(tables: list[Table]) -> Table:
    """The shards of one table, end to end."""
    first = tables[0]
    if len(tables) == 1:
        return first
    for other in tables[1:]:
        if other.columns.keys() != first.columns.keys() or other.class_names != first.class_names:
            raise ValueError(f"{other.where}: its columns {list(other.columns)} differ from {first.where}'s.")
    columns: dict[str, Column] = {}
    for name in first.columns:
        held = [table.columns[name] for table in tables]
        arrays = [column for column in held if isinstance(column, np.ndarray)]
        alike = len(arrays) == len(held) and len({column.dtype for column in arrays}) == 1
        columns[name] = np.concatenate(arrays) if alike else _typed([value for column in held for value in column])
    return Table(f"{first.where} and {len(tables) - 1} more", columns, first.class_names)


def _saved(path: Path) -> dict[str, Table]:
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises its own errors, pyarrow's and the system's
        raise ValueError(f"{path}: a damaged Hugging Face data set ({first_line(error)}). Save it again.") from error
    return _only_or_all(_named(str(path), found))


def hub_splits(address: str) -> dict[str, Table]:
    """The splits of a set of the Hugging Face hub, under their own names.

    Args:
      address: ``owner/name`` or ``owner/name:config``.

    Raises:
      FileNotFoundError: it did not load; the message says why.
    """
    import datasets

    name, _, config = address.partition(":")
    try:
        found = datasets.load_dataset(name, config or None)
    except Exception as error:  # the hub client raises its own, urllib's, httpx's and the system's errors
        raise FileNotFoundError(
            f"'hf:{address}' did not load: {type(error).__name__}: {first_line(error)}. Check the name. Without a "
            "network, load it once where there is one, call .save_to_disk(FOLDER), and give the folder."
        ) from error
    return _named(f"hf:{address}", found)


def _named(where: str, found: Any) -> dict[str, Table]:
    if not isinstance(found, dict):
        return {"": _of_dataset(where, found)}
    splits = {}
    for name, rows in found.items():
        if (split := SPLITS.get(name.lower(), name)) in splits:
            raise ValueError(f"{where}: has two splits {split!r}, one of them called {name!r}. Rename or remove one.")
        splits[split] = _of_dataset(f"{where}[{name}]", rows)
    return splits


def _only_or_all(splits: dict[str, Table]) -> dict[str, Table]:
    return splits if len(splits) > 1 else {"": next(iter(splits.values()))}


def _of_dataset(where: str, rows: Any) -> Table:
    names = {key: tuple(feature.names) for key, feature in rows.features.items() if getattr(feature, "names", None)}
    return _arrow(where, rows.with_format("arrow")[:], names)


def _arrow(where: str, table: Any, class_names: Mapping[str, tuple[str, ...]]) -> Table:
    if len(set(table.column_names)) < len(table.column_names):
        raise ValueError(f"{where}: has two columns of one name in {table.column_names}. Rename them.")
    return Table(where, {name: _arrow_column(table[name]) for name in table.column_names}, class_names)


def _class_names(where: str, schema: Any) -> dict[str, tuple[str, ...]]:
    """The names of classes that Hugging Face ``datasets`` wrote into a file; read without its second of importing."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        return {key: tuple(feature["names"]) for key, feature in features.items() if "names" in feature}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{where}: its Hugging Face feature metadata cannot be read ({error}).") from error


def _arrow_column(column: Any) -> Column:
    import pyarrow.types as types

    plain = types.is_integer(column.type) or types.is_floating(column.type) or types.is_boolean(column.type)
    if plain and not column.null_count:
        return column.to_numpy()
    return column.to_pylist()
