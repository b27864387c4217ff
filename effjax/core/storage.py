"""Folders to write into, on a disk or in a bucket (``gs://``, ``s3://``, ``az://``); files are whole or not there.

A bucket has no folders, no renaming and no appending. What it has: an object appears whole, and can be created only
where there is none. Everything that effjax writes rests on these two.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, cast

__all__: list[str] = []

if TYPE_CHECKING:
    Folder = Path
else:  # etils has paths of its own, with the same methods
    Folder = PurePath

# Scheme -> what reads and writes it, the package and the extra of effjax.
_DRIVERS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3"), "az": ("adlfs", None)}


def storage(path: str | os.PathLike[str], argument: str = "--out") -> Folder:
    """A path to write to: a ``pathlib.Path``, or for a bucket ``etils.epath.Path``, which has the same methods.

    Args:
      path: of a folder or file.
      argument: its name in messages.

    Raises:
      ValueError: a scheme that is not known, one whose package is missing, or one that has lost a slash.

    Example:
      >>> storage("runs/one").parts, is_remote("runs/one"), is_remote("gs://bucket/one")
      (('runs', 'one'), False, True)
    """
    text = os.fspath(path)
    scheme, mark, rest = text.partition("://")
    if not mark:
        lost, colon, _ = text.partition(":/")
        if colon and lost in _DRIVERS:
            raise ValueError(
                f"{argument} {text!r} has lost a slash, as pathlib.Path does to a URL. Give it as a string, "
                f"'{lost}://...'."
            )
        return Path(path)
    if scheme not in _DRIVERS:
        raise ValueError(f"{argument} {text!r}: folders are paths, or begin with {'://, '.join(_DRIVERS)}://.")
    if not rest.strip("/"):
        raise ValueError(f"{argument} {text!r} names no bucket. Give {scheme}://BUCKET/FOLDER.")
    from etils import epath

    file_system(text, argument)
    return cast(Folder, epath.Path(text))


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket."""
    return "://" in os.fspath(path)


def file_system(path: str | os.PathLike[str], argument: str = "--out") -> Any:
    """The fsspec file system of a path in a bucket, which keeps no listings: other processes write there too.

    Raises:
      ValueError: its package is missing.
    """
    from etils.epath import backend

    scheme = os.fspath(path).partition("://")[0]
    package, extra = _DRIVERS[scheme]
    try:
        found = backend.fsspec_backend.fs(os.fspath(path))
    except ImportError as error:
        install = f'pip install "effjax[{extra}]"' if extra else f"pip install {package}"
        raise ValueError(f"{argument} {os.fspath(path)!r} needs {package}: {install}. ({error})") from None
    found.dircache.use_listings_cache = False
    found.invalidate_cache()
    return found


def make_folder(path: Folder) -> None:
    """Make a folder and those above it; in a bucket there is nothing to make."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def create(path: Folder, content: bytes) -> bool:
    """Write a file only where there is none; whether there was none.

    Raises:
      OSError: it cannot be written.
    """
    if is_remote(path):
        try:
            file_system(path).pipe_file(os.fspath(path), content, mode="create")
        except FileExistsError:
            return False
        return True
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError as error:
        path.unlink()
        raise storage_error(error, path, len(content)) from None
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file's content atomically, as ``write_bytes``."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file's content atomically, on a disk or in a bucket.

    Raises:
      OSError: naming the file, the bytes needed and the way out; the file is as it was.
    """
    path = storage(path)
    if is_remote(path):
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    try:
        make_folder(path.parent)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise storage_error(error, path, len(content)) from None


def remove_tree(path: Folder, last: str | None = None) -> None:
    """Remove a folder with all that is in it; nothing to do where there is none.

    Args:
      path: of the folder.
      last: name of the file in it that is removed after all others, as a mark of what is going on.
    """
    if last is not None and path.exists():
        for inner in path.iterdir():
            if inner.name == last:
                continue
            remove_tree(inner) if inner.is_dir() else inner.unlink(missing_ok=True)
    if is_remote(path):
        fs = file_system(path)
        with contextlib.suppress(FileNotFoundError):
            fs.rm(os.fspath(path), recursive=True)
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def written_locally(path: Folder) -> Generator[Folder]:
    """For a writer that knows only disks: a path on one, copied to ``path``, file or folder, when the block ends.

    A path on a disk is given as it is.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / path.name
        yield local
        files = [local] if local.is_file() else sorted(file for file in local.rglob("*") if file.is_file())
        fs = file_system(path)
        for file in files:
            inner = file.relative_to(local).as_posix()
            fs.put_file(str(file), os.fspath(path) if inner == "." else f"{os.fspath(path)}/{inner}")


_FULL = (errno.ENOSPC, errno.EDQUOT)


def storage_error(error: OSError, path: Folder, need: int | None = None) -> OSError:
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
