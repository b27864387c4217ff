"""The lock of a folder in a bucket: an object that its holder renews, as hosts cannot see each other's processes.

Whoever finds an object of another host watches it. It changes: the holder lives, and this run is refused. It does not
change for a minute by the watcher's own clock: the holder is gone, and this run takes over. So a job that was
killed and is restarted on another host goes on by itself.
"""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from effjax.core.storage import Folder, create, write_bytes

RENEW = 10.0
"""Seconds between two renewals."""
LEASE = 60.0
"""Seconds without one, after which the holder is gone."""
SETTLE = 2.0
"""Seconds after which one who has taken over looks whether another has too."""


class Lease:
    """One object that says who holds a folder.

    Args:
      path: of the object.
      mine: what identifies this process.
      gone: whether a holder is known to be gone (or to live: False), or None where that cannot be known.
      refuse: raises, given the holder.
      say: told when a lock is taken over or lost.
    """

    def __init__(
        self,
        path: Folder,
        mine: Mapping[str, Any],
        *,
        gone: Callable[[Mapping[str, Any]], bool | None],
        refuse: Callable[[Mapping[str, Any]], None],
        say: Callable[[str], None],
    ):
        self._path, self._mine, self._gone, self._refuse, self._say = path, dict(mine), gone, refuse, say
        self._renewed = 0
        self._ended = threading.Event()
        self._writing = threading.Lock()

    def take(self) -> None:
        """Become the holder, or be refused."""
        took_over = False
        while not create(self._path, self._content()):
            found = read(self._path)
            if found is not None:
                took_over |= self._end(found)
        if took_over:
            time.sleep(SETTLE)
            found = read(self._path)
            if not self._is_mine(found):
                self._refuse(found or {})
        threading.Thread(target=self._renew, daemon=True, name="lease").start()

    def release(self) -> bool:
        """Give the folder back; whether it was still ours."""
        self._ended.set()
        with self._writing:
            if not self._is_mine(read(self._path)):
                return False
            self._path.unlink(missing_ok=True)
        return True

    def _content(self) -> bytes:
        return json.dumps({**self._mine, "renewed": self._renewed}).encode()

    def _is_mine(self, found: Mapping[str, Any] | None) -> bool:
        return found is not None and {name: found.get(name) for name in self._mine} == self._mine

    def _end(self, found: Mapping[str, Any]) -> bool:
        """Remove the object of a holder that is gone; False where another was quicker."""
        gone = self._gone(found)
        if gone is False:
            self._refuse(found)
        deadline = time.monotonic() + (0.0 if gone else LEASE)
        if not gone:
            self._say(f"{self._path} is of {found.get('host')}; waiting up to {LEASE:g} s for a sign of life")
        while time.monotonic() < deadline:
            time.sleep(min(1.0, RENEW / 4))
            now = read(self._path)
            if now is None:
                return False
            if now != found:
                self._refuse(now)
        if read(self._path) != found:
            return False
        self._path.unlink(missing_ok=True)
        self._say(f"{self._path.parent} was held by process {found.get('pid')} on {found.get('host')}, which is gone")
        return True

    def _renew(self) -> None:
        while not self._ended.wait(RENEW):
            with contextlib.suppress(Exception), self._writing:  # a network that fails is tried again
                if self._ended.is_set():
                    return
                found = read(self._path)
                if found is not None and not self._is_mine(found):
                    self._say(
                        f"{self._path.parent} was taken over by process {found.get('pid')} on {found.get('host')}"
                    )
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._renewed += 1
                write_bytes(self._path, self._content())


def read(path: Folder) -> dict[str, Any] | None:
    """What the object says; None where there is none, and an empty holder where it cannot be read as one."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
