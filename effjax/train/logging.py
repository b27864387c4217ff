"""JSON-lines logs that a resumed run continues without gaps or repeats, and files that are whole or not there."""

import contextlib
import errno
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
        text = json.dumps(jsonable(record)) + "\n"
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise storage_error(error, self._path, len(text)) from None

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:  # what could not be written before
            raise storage_error(error, self._path) from None


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
    """Replace a file's content atomically, as ``write_bytes``."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file's content atomically.

    Raises:
      OSError: naming the file, the bytes needed and the way out; the file is as it was.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise storage_error(error, path, len(content)) from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinities become null."""
    write_text(path, json.dumps(jsonable(value), indent=1, allow_nan=False) + "\n")


_FULL = (errno.ENOSPC, errno.EDQUOT)


def storage_error(error: OSError, path: Path, need: int | None = None) -> OSError:
    """The error with the file, the bytes needed and what to do.

    Args:
      error: met while writing.
      path: of the file.
      need: bytes that were to be written, where they are known.

    Example:
      >>> str(storage_error(OSError(errno.ENOSPC, "No space left on device"), Path("log.jsonl"), 10**6))
      "[Errno 28] No space left on device, 1.0 MB needed; free some and give the same command again: 'log.jsonl'"
    """
    if error.errno not in _FULL:
        return OSError(error.errno, error.strerror, str(path))
    needed = "" if need is None else f", {megabytes(need)} needed"
    return OSError(error.errno, f"{error.strerror}{needed}; free some and give the same command again", str(path))


def megabytes(size: int) -> str:
    """Bytes in words.

    Example:
      >>> megabytes(2_500_000), megabytes(300)
      ('2.5 MB', '300 bytes')
    """
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"
