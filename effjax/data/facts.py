"""What the user's own data hold, said for a report: rows, classes, sizes, the split, and a fingerprint."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from effjax.data.tables import Table

_LISTED = 12


class Facts(NamedTuple):
    """What a report says of data read from files.

    Attributes:
      rows: split -> number of rows (of a graph: ``nodes`` and ``edges``).
      classes: class -> its rows in each split, in the order of ``rows``; empty for scores.
      sizes: lengths of texts or series, sizes of images, features of nodes: one sentence.
      split: what was held out and how: one sentence.
      notes: further sentences: what was not read, what was changed.
      fingerprint: SHA-256 of the decoded columns, in hexadecimal. Two runs on equal data have equal ones.
    """

    rows: dict[str, int]
    classes: dict[str, tuple[int, ...]]
    sizes: str
    split: str
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def summary(self) -> str:
        """One line."""
        rows = ", ".join(f"{name} {count}" for name, count in self.rows.items())
        classes = f", {len(self.classes)} classes" if self.classes else ""
        return f"{rows}{classes}"

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of it, a sentence per item."""
        rows = ", ".join(f"{count} {name}" for name, count in self.rows.items())
        shown = [f"{name} ({' + '.join(map(str, counts))})" for name, counts in self.classes.items()]
        more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
        classes = f"{len(shown)} classes: {', '.join(shown[:_LISTED])}{more}." if shown else ""
        return tuple(filter(None, (f"Rows: {rows}.", classes, self.sizes, self.split, *self.notes)))

    def source(self, path: str) -> str:
        """What ``Task.source`` holds: the path, all sentences, and the begin of the fingerprint."""
        return f"{path} ({self.summary}): {' '.join(self.sentences)} SHA-256 {self.fingerprint[:12]}."


def fingerprint(*parts: Any) -> str:
    """SHA-256 of arrays, texts, numbers and nested containers of them.

    Example:
      >>> fingerprint({"a": np.arange(2)}) == fingerprint({"a": np.arange(2)}) != fingerprint({"a": np.arange(3)})
      True
    """
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, np.ndarray):
            digest.update(f"array {item.dtype.str} {item.shape}".encode())
            digest.update(np.ascontiguousarray(item).tobytes())
        elif isinstance(item, Mapping):
            digest.update(f"mapping {len(item)}".encode())
            for key in sorted(item):
                add(str(key))
                add(item[key])
        elif isinstance(item, list | tuple):
            digest.update(f"sequence {len(item)}".encode())
            for value in item:
                add(value)
        else:
            # Lengths keep the texts "a", "bc" apart from "ab", "c".
            text = str(item).encode("utf-8", "surrogatepass")
            digest.update(f"{type(item).__name__} {len(text)} ".encode() + text)

    add(parts)
    return digest.hexdigest()


def spread(lengths: Iterable[int], unit: str) -> str:
    """``5 to 80 characters, median 31``."""
    lengths = np.fromiter(lengths, np.int64)
    if lengths.min() == lengths.max():
        return f"{lengths[0]} {unit}"
    return f"{lengths.min()} to {lengths.max()} {unit}, median {np.median(lengths):g}"


def class_counts(splits: Mapping[str, Any], classes: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """class -> its rows in each split."""
    counts = [np.bincount(labels, minlength=len(classes)) for labels in splits.values()]
    return {name: tuple(int(count[index]) for count in counts) for index, name in enumerate(classes)}


def unread(table: Table, used: Iterable[str | None]) -> tuple[str, ...]:
    """A sentence about the columns that are not read."""
    left = [name for name in table.columns if name not in set(used)]
    return (f"Not read: the columns {', '.join(map(repr, left[:_LISTED]))}.",) if left else ()
