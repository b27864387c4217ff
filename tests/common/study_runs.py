"""Studies in processes of their own, offline, with one folder of compiled programs for a module's tests."""

import os
import subprocess
import sys

import pytest

_COMPARE = [sys.executable, "-m", "effjax.cli", "compare"]
_OFFLINE = {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """One folder of compiled programs for all the processes that a study is started in."""
    _OFFLINE["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    _OFFLINE["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def start(*words):
    """``effjax compare`` with these words."""
    pipe = subprocess.PIPE
    return subprocess.Popen([*_COMPARE, *map(str, words)], stdout=pipe, stderr=pipe, text=True, env=_OFFLINE)


def finish(process, timeout=300):
    """Exit status, output and errors."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err
