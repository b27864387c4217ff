"""Archives of plain arrays; nothing is ever unpickled."""

import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

READ_ERRORS = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged file raises."""


def read_arrays(path: Path, leave_out: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Every array of an ``.npz`` file but those to leave out.

    Raises:
      ValueError: the file is damaged, or holds something else; the array is named where there is one.
    """
    arrays, key = {}, None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for key in archive.files:
                if key not in leave_out:
                    arrays[key] = archive[key]
                    if not isinstance(arrays[key], np.ndarray):
                        raise ValueError("it is no array")
    except (*READ_ERRORS, TypeError) as error:  # TypeError: a .npy under this name, no archive
        named = "" if key is None else f"array {key!r}: "
        raise ValueError(
            f"{path}: {named}damaged, or not an .npz archive of plain arrays ({first_line(error)}). "
            "Pickled objects are never loaded: save numeric arrays with numpy.savez."
        ) from error
    return arrays


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]
