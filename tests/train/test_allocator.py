"""Freed memory that the process keeps: page faults of a block that is taken again and again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.once, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")]

# 128 MiB are 32,768 pages, five times; smaller blocks that stay are taken before and meanwhile.
FAULTS = """
import ctypes, resource, sys
sys.modules["jax"] = None  # the function needs none
from effjax.train.allocator import keep_freed_memory
del sys.modules["jax"]
kept = keep_freed_memory() if {keep} else None
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use():
    libc.malloc(100_000)
    block = libc.malloc(2**27)
    libc.malloc(100_000)
    ctypes.memset(block, 1, 2**27)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def outcome(keep, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    words = [sys.executable, "-c", FAULTS.format(keep=keep)]
    root = Path(__file__).parents[2]
    run = subprocess.run(words, env=environment | variables, cwd=root, capture_output=True, text=True, check=True)
    kept, faults = run.stdout.split()
    return kept, int(faults)


def test_a_block_that_is_taken_again_takes_no_page_faults():
    kept, faults = outcome(True)
    if kept == "False":
        pytest.skip("another C library")
    assert faults < 1000
    assert outcome(False)[1] > 5 * 32000


@pytest.mark.parametrize(
    "variables", [{"MALLOC_ARENA_MAX": "4"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_what_the_user_has_set_stays(variables):
    kept, faults = outcome(True, **variables)
    assert kept == "False"
    assert faults > 5 * 32000


def test_it_comes_before_jax_computes():
    import jax

    from effjax.train.allocator import keep_freed_memory

    jax.devices()
    with pytest.raises(RuntimeError, match="Call it at the top of the program"):
        keep_freed_memory()
