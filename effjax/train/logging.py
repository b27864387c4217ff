"""JSON-lines logs that a resumed run continues without gaps or repeats, and JSON files."""

import json
import time
from collections.abc import Iterator
from typing import Any

from effjax.core.files import read_text
from effjax.core.storage import Folder, is_remote, make_folder, storage, storage_error, write_text

REMOTE_SECONDS = 30.0
"""Seconds between two copies of a log to a bucket, where nothing can be appended."""


class JsonlLog:
    """Appends records to a file; records past ``step`` (from a run that was killed) are dropped on opening.

    In a bucket nothing can be appended: there the log is written as a whole, now and then and when ``flush`` asks for
    it, as it must before a checkpoint that follows the records.
    """

    def __init__(self, path: Folder, *, step: int = 0):
        self._path = storage(path)
        make_folder(self._path.parent)
        kept = [json.dumps(record) + "\n" for record in read_jsonl(self._path) if record["step"] <= step]
        write_text(self._path, "".join(kept))
        self._lines, self._file = kept, None
        self._copied = (len(kept), time.monotonic())
        if not is_remote(self._path):
            self._file = self._path.open("a")

    def write(self, **record: Any) -> None:
        """Append one record; it must hold ``step``. Non-finite numbers are written as null."""
        text = json.dumps(jsonable(record)) + "\n"
        if self._file is None:
            self._lines.append(text)
            if time.monotonic() - self._copied[1] > REMOTE_SECONDS:
                self.flush()
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise storage_error(error, self._path, len(text)) from None

    def flush(self) -> None:
        """See that all records are in their place."""
        if self._file is None and self._copied[0] < len(self._lines):
            write_text(self._path, "".join(self._lines))
            self._copied = (len(self._lines), time.monotonic())

    def close(self) -> None:
        """Close the file."""
        if self._file is None:
            self.flush()
            return
        try:
            self._file.close()
        except OSError as error:  # what could not be written before
            raise storage_error(error, self._path) from None


def read_jsonl(path: str | Folder) -> Iterator[dict]:
    """The complete records of a log; a last line cut short by a kill is left out."""
    path = storage(path)
    if not path.exists():
        return
    lines = read_text(path, "Delete it; a new one is begun.").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}: line {number} is no record of a step. Delete the file; a new one is begun.")
        yield record


def jsonable(value: Any) -> Any:
    """``value`` with NaN and infinities as None and NumPy scalars as Python numbers."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value


def write_json(path: Folder, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null."""
    write_text(path, json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")
