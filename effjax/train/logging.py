"""JSON-lines logs that a resumed run continues without gaps or repeats."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effjax.core.files import read_text


class JsonlLog:
    """Appends records to a file; records past ``step`` (from a run that was killed) are dropped on opening."""

    def __init__(self, path: Path, *, step: int = 0):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_jsonl(self._path) if record["step"] <= step]
        write_text(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = self._path.open("a")

    def write(self, **record: Any) -> None:
        """Append one record; it must hold ``step``. Non-finite numbers are written as null."""
        self._file.write(json.dumps(jsonable(record)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict]:
    """The complete records of a log; a last line cut short by a kill is left out."""
    path = Path(path)
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


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null."""
    write_text(path, json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")
