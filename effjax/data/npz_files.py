"""Archives of plain arrays; nothing is ever unpickled."""

import math
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from effjax.core.files import first_line

__all__: list[str] = []

FREE = 1 << 30
"""Bytes that a file may unpack to, however small it is."""
MOST_TIMES = 100
"""Above ``FREE`` a file may unpack to so many times its own size."""
READ_ERRORS = (
    *(OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error),
    *(NotImplementedError, OverflowError, MemoryError),
)
"""What reading a damaged file raises."""


def read_arrays(path: Path, leave_out: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Every array of an ``.npz`` file but those to leave out.

    What the headers say is compared with ``FREE`` and ``MOST_TIMES`` before anything is unpacked.

    Raises:
      ValueError: the file is damaged, holds something else, or unpacks to too much; the array is named where there is
        one.
    """
    arrays, key = {}, None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            kept = [key for key in archive.files if key not in leave_out]
            sizes = {}
            for key in kept:
                sizes[key] = _claimed(archive.zip, key)
            key = None
            largest = max(sizes, key=lambda name: sizes[name], default="")
            check_unpacked(sum(sizes.values()), path.stat().st_size, largest)
            for key in kept:
                arrays[key] = archive[key]
    except (*READ_ERRORS, TypeError, AttributeError) as error:  # the last two: a .npy under this name, no archive
        named = "" if key is None else f"array {key!r}: "
        raise ValueError(
            f"{path}: {named}damaged, or not an .npz archive of plain arrays ({first_line(error)}). "
            "Pickled objects are never loaded: save numeric arrays with numpy.savez."
        ) from error
    return arrays


def read_array(path: Path) -> np.ndarray:
    """The one array of an ``.npy`` file.

    Raises:
      ValueError: the file is damaged or holds something else.
    """
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive of several")
    except (*READ_ERRORS, TypeError) as error:
        raise ValueError(f"{path}: damaged, or not one plain array ({first_line(error)}).") from error
    return array


def check_unpacked(size: int, packed: int, largest: str = "") -> None:
    """Refuse what unpacks to far more than it is, as a few MB of zeros do."""
    if size > max(FREE, MOST_TIMES * packed):
        of = f", most of them in {largest!r}" if largest else ""
        raise ValueError(
            f"it unpacks to {size:,} bytes{of}, above {FREE:,} and above {MOST_TIMES} times its size of {packed:,}; "
            "save it uncompressed if that is meant"
        )


def _claimed(archive: zipfile.ZipFile, key: str) -> int:
    """Bytes of an array by its header, which must be those that the archive holds."""
    name = key if key in archive.namelist() else f"{key}.npy"
    held = archive.getinfo(name).file_size
    with archive.open(name) as member:
        if member.read(6) != b"\x93NUMPY":
            raise ValueError("it is no array")
        version = tuple(member.read(2))
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"it is no array of a known version, but {version}")
        shape, _, dtype = readers[version](member)
        if dtype.hasobject:
            raise ValueError("it holds Python objects")
        size = math.prod(shape) * dtype.itemsize
        if size != held - member.tell():
            raise ValueError(f"its header says {size:,} bytes, it holds {held - member.tell():,}")
    return size
