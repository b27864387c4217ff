"""Processes of their own that start at once: forks of a server that has imported everything and run nothing.

A fresh interpreter takes seconds to import what a command needs. What a test of starting or importing is about is
started by ``subprocess``.
"""

import atexit
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_FORKED = multiprocessing.get_context("forkserver")
# Packages that are installed: the server does not know the paths that pytest adds.
_FORKED.set_forkserver_preload(
    ["matplotlib.backends.backend_agg", "orbax.checkpoint", "tyro", "effjax.study.compare", "effjax.study.single"]
    + [f"effjax.recipes.{stem}" for stem in ("samuel", "irnn", "cola", "geeni")]
)


class Command:
    """A process, as of ``subprocess.Popen``.

    Args:
      target: Python source, run with ``sys.argv`` as ``python -c`` runs it; or what ``effjax`` on a command line does.
      *words: its arguments.
      environment: variables to set. Of JAX's, those that are read after its import, and ``JAX_NUM_CPU_DEVICES``.
    """

    def __init__(self, *words: Any, target: str | None = None, environment: Mapping[str, str] | None = None):
        self._files = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]  # noqa: SIM115  they live as long as the command
        given = [str(word) for word in words], target, dict(environment or {}), [file.name for file in self._files]
        self._process = _FORKED.Process(target=_become, args=given, daemon=True)
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 300.0) -> tuple[str, str]:
        """Output and errors, once the process has ended; TimeoutError, and the process is killed, where it does not."""
        self._process.join(timeout)
        late = self.poll() is None
        if late:
            self._process.kill()
            self._process.join()
        said = self.said()
        for file in self._files:
            file.close()
        if late:
            raise TimeoutError(f"still running after {timeout} s; it printed {said}")
        return said

    def said(self) -> tuple[str, str]:
        """Output and errors up to now."""
        out, err = (Path(file.name).read_text() for file in self._files)
        return out, err

    def wait_for(self, found: Callable[[], Any], every: float = 0.01) -> None:
        """Until something is so, or the process has ended."""
        while self.poll() is None and not found():
            time.sleep(every)


def _become(words: list[str], target: str | None, environment: Mapping[str, str], files: list[str]) -> None:
    for descriptor, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), descriptor)
    os.environ.update(environment)
    import jax

    if "JAX_NUM_CPU_DEVICES" in environment:
        jax.config.update("jax_num_cpu_devices", int(environment["JAX_NUM_CPU_DEVICES"]))
    sys.argv = ["effjax" if target is None else "-c", *words]
    code: Any = 0
    try:
        if target is None:
            from effjax.cli import main

            code = main()
        else:
            exec(compile(target, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        threading._shutdown()  # as an interpreter that ends does
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
