"""Studies in processes of their own, which inherit the settings and the store of programs of ``conftest.py``."""

import subprocess
import sys

_COMPARE = [sys.executable, "-m", "effjax.cli", "compare"]


def start(*words):
    """``effjax compare`` with these words."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*_COMPARE, *map(str, words)], stdout=pipe, stderr=pipe, text=True)


def finish(process, timeout=300):
    """Exit status, output and errors."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err
