"""One folder, one run: a lock file that names its holder; in a bucket a lease."""

import contextlib
import datetime
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from effjax.core.storage import Folder, create, is_remote, storage
from effjax.study.lease import Lease
from effjax.train.signals import AT_EXIT

NAME = ".lock"
PATIENCE = 2.0
"""Seconds after which a lock file without a holder's name is what a crash left, and not one that is being written."""


class FolderInUse(ValueError):
    """Another run holds the folder.

    Attributes:
      holder: ``{"pid", "host", "since", "started"}`` of its process.
    """

    def __init__(self, message: str, holder: Mapping[str, Any]):
        super().__init__(message)
        self.holder = dict(holder)


class FolderLock:
    """Holds a folder while a ``with`` block runs.

    The lock is a file that is created only where there is none. A file left by a process of this host that is no
    longer there is taken over; one left by another host cannot be judged from here and is refused. In a bucket the
    holder renews the file, and one of another host that is not renewed for a minute is taken over.

    Args:
      folder: created if missing.
      first: whether this process takes the lock; the other processes of a distributed run do not.
      say: told when a lock is taken over.

    Raises:
      FolderInUse: on entering, at once.
      ValueError: on entering, a folder that cannot be made, or a bucket that cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder, FolderLock(folder):
      ...     (Path(folder) / ".lock").exists()
      True
    """

    def __init__(self, folder: str | Folder, *, first: bool = True, say: Callable[[str], None] | None = None):
        self._path = storage(folder) / NAME
        self._first = first
        self._lease: Lease | None = None
        self._say = say or (lambda note: print(note, file=sys.stderr, flush=True))
        self._mine: dict[str, Any] | None = None
        self._made = False

    def __enter__(self) -> "FolderLock":
        if not self._first:
            return self
        if is_remote(self._path):
            self._take_lease(_this_process())
            return self
        self._made = not self._path.parent.exists()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a file stands there, or the place is not ours
            raise ValueError(
                f"--out {self._path.parent} cannot be a folder: {error.strerror}. Choose another."
            ) from None
        mine = _this_process()
        while not (create(self._path, json.dumps(mine).encode()) or self._take_over(mine)):
            time.sleep(0.02)
        self._mine = mine
        AT_EXIT.append(self._release)  # another host could not tell that the holder is gone
        return self

    def _take_lease(self, mine: dict[str, Any]) -> None:
        def refuse(holder: Mapping[str, Any]) -> None:
            holder = dict.fromkeys(("pid", "host", "since", "started"), "unknown") | dict(holder)
            raise FolderInUse(self._refusal(holder), holder)

        def gone(holder: Mapping[str, Any]) -> bool | None:
            here = isinstance(holder.get("pid"), int) and holder.get("host") == socket.gethostname()
            return not _alive(holder) if here else None

        lease = Lease(self._path, mine, gone=gone, refuse=refuse, say=self._say)
        try:
            lease.take()
        except FolderInUse:
            raise
        except Exception as error:  # each driver has errors of its own
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"--out {self._path.parent} cannot be written ({why}). Check the bucket's name and your rights, or "
                "choose another."
            ) from error
        self._lease = lease
        AT_EXIT.append(self._release)

    def _release(self) -> bool:
        """Give the lock back; whether it was still ours."""
        if self._lease is not None:
            return self._lease.release()
        mine, self._mine = self._mine, None
        if mine is None or _read(self._path) != mine:
            return False
        self._path.unlink(missing_ok=True)
        return True

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._release in AT_EXIT:
            AT_EXIT.remove(self._release)
        if self._release() and error is not None and self._made:
            with contextlib.suppress(OSError):  # something is in it
                self._path.parent.rmdir()

    def _take_over(self, mine: Mapping[str, Any]) -> bool:
        """Take over a stale lock; False to try again from the start.

        The file is written anew in its place, by one process at a time. So nobody can remove what another has just
        written.
        """
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(self._path.open("r+"))
                stack.enter_context(_alone(file.fileno()))
                if not os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    return False
            except FileNotFoundError:
                return False
            except PermissionError:  # another user's
                holder = _read(self._path) or dict.fromkeys(("pid", "host", "since", "started"), "unknown")
                raise FolderInUse(self._refusal(holder), holder) from None
            holder = _parse(file.read())
            if holder is None and time.time() - os.fstat(file.fileno()).st_mtime < PATIENCE:
                return False
            if holder is not None and _alive(holder):
                raise FolderInUse(self._refusal(holder), holder)
            file.seek(0)
            file.truncate()
            file.write(json.dumps(mine))
            file.flush()
        who = "nobody" if holder is None else f"process {holder['pid']}, which is gone (it began {holder['since']})"
        self._say(f"{self._path.parent} was held by {who}; this run takes over")
        return True

    def _refusal(self, holder: Mapping[str, Any]) -> str:
        folder = self._path.parent
        text = (
            f"{str(folder)!r} is in use by process {holder['pid']} on {holder['host']} since {holder['since']}. "
            "Wait for it, or choose another --out."
        )
        if holder["host"] != socket.gethostname() and not is_remote(self._path):
            text += f" Whether that process still runs cannot be seen from here: if it does not, delete {self._path}."
        return text


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "started": _started(os.getpid()),
    }


@contextlib.contextmanager
def _alone(handle: int) -> Generator[None]:
    """Keep other processes of this host out of the same block; without effect where the file system cannot."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)  # closing the file ends it
    except (ImportError, OSError):
        pass
    yield


def _read(path: Folder) -> dict[str, Any] | None:
    try:
        return _parse(path.read_text())
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(found, dict) and {"pid", "host", "since", "started"} <= set(found)
    return found if whole and isinstance(found["pid"], int) else None


def _alive(holder: Mapping[str, Any]) -> bool:
    """Whether the holder may still run: True for another host, which cannot be asked."""
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # there, but another user's
    started = _started(holder["pid"])
    unknown = started is None and not Path("/proc/self/stat").exists()
    return unknown or started == holder["started"]


def _started(pid: int) -> str | None:
    """When a process began, in whatever unit the system has; None if it is gone (a zombie too) or cannot be asked."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold anything
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
