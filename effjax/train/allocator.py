"""Memory that a program gives back and takes again at every step: kept by the process, on Linux."""

import ctypes
import os
import platform
import sys
from collections.abc import Mapping

__all__ = ["keep_freed_memory"]

# Numbers of <malloc.h>, and what they become.
_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}

_SMALL_BLOCKS = 2**26


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, so that a step on a CPU does not map and zero its temporaries anew.

    XLA takes the temporaries of a program from ``malloc`` at every call and frees them after it. By default glibc
    returns blocks of that size to the system, and the next call takes a page fault for every 4 KiB: tens of thousands a
    step. Here one arena serves all threads (``M_ARENA_MAX`` 1), large blocks come from it too (``M_MMAP_MAX`` 0), and
    it never shrinks (``M_TRIM_THRESHOLD`` at its maximum). Small blocks get a place of their own, 64 MiB of addresses
    that cost nothing until they are used, so that they do not cut up the large one between two steps.

    What it costs: the process holds the most memory that it ever held at once until it ends, compilation included, and
    more where the sizes of temporaries change; threads that allocate at the same moment wait for one lock. Call it
    once, before JAX computes: threads keep the arenas that they began with. The command ``effjax`` calls it by itself.

    Returns:
      Whether it holds now. False where there is nothing to do so with (no Linux, another C library), and where the
      environment sets glibc's allocator already (``MALLOC_ARENA_MAX``, ``GLIBC_TUNABLES=glibc.malloc...`` and others).

    Raises:
      RuntimeError: JAX has computed in this process.

    Example::

        import effjax
        effjax.train.keep_freed_memory()  # at the top of a script
    """
    if _has_computed():
        raise RuntimeError(
            "keep_freed_memory() was called after JAX computed, when its threads have their memory. Call it at the top "
            "of the program, in a notebook after a restart of the kernel."
        )
    if platform.libc_ver()[0] != "glibc" or not sys.platform.startswith("linux") or _is_set(os.environ):
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    kept = all(libc.mallopt(number, value) == 1 for number, value in _SETTINGS.values())
    # The smallest free block that fits is taken. The second one, which stays, keeps the first from joining the rest;
    # as large, it comes from the same end. Both are addresses alone until something is written.
    place, _ = libc.malloc(_SMALL_BLOCKS), libc.malloc(_SMALL_BLOCKS)
    libc.free(place)
    return kept


def _has_computed() -> bool:
    if "jax" not in sys.modules:
        return False
    from jax._src import xla_bridge  # no public function tells without starting the backends

    return xla_bridge.backends_are_initialized()


def _is_set(variables: Mapping[str, str]) -> bool:
    """Whether the user has set glibc's allocator."""
    tunables = variables.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(
        (name.startswith("MALLOC_") and name.endswith("_")) or name == "MALLOC_ARENA_MAX" for name in variables
    )
