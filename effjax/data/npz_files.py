"""Archives of plain arrays; nothing is ever unpickled."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

READ_ERRORS = (OSError, ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged file raises."""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Every array of an ``.npz`` file.

    Raises:
      ValueError: the file is damaged, or holds something else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except (*READ_ERRORS, TypeError) as error:  # TypeError: a .npy under this name, no archive
        raise ValueError(
            f"{path}: damaged, or not an .npz archive of plain arrays ({first_line(error)}). "
            "Pickled objects are never loaded: save numeric arrays with numpy.savez."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error) or type(error).__name__).splitlines()[0]
