"""Settings of all tests: offline, eight virtual devices, one store of compiled programs for all processes.

It stands here and not in ``tests`` because the doctests in ``effjax`` need it too.
"""

import ctypes
import functools
import gc
import inspect
import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
# Workers and the processes that tests start inherit these; `pytest --cache-clear` empties the store.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "d" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Tiny programs: compiling takes longer than running them, and a third of the time so.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if "XLA_FLAGS" not in os.environ:
    # XLA ends the process for a flag that it does not know.
    probe = [sys.executable, "-c", "import jax; jax.numpy.zeros(1)"]
    known = subprocess.run(probe, env=os.environ | {"XLA_FLAGS": _QUICK}, capture_output=True).returncode == 0
    os.environ["XLA_FLAGS"] = _QUICK if known else ""

import jax  # noqa: E402  the settings above are read when it is imported
import typecheck  # noqa: E402
from blocked import blocked  # noqa: E402

typecheck.install()

# Not by the environment: a process that a test starts has one device, as a user's has.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Commands of their own, which import one another as such.
collect_ignore_glob = ["tests/faults/*", "tests/mutations/*"]

# Above it the programs of finished files are dropped.
_RESIDENT = 3.5 * 2**30
_REFERENCE = ROOT / "tests" / "reference"


@pytest.fixture(autouse=True)
def _only_jax_flax_and_optax(request: pytest.FixtureRequest) -> Iterator[None]:
    """The doctests of a method run where nothing optional can be imported."""
    doctest = getattr(request.node, "dtest", None)
    if doctest is None or doctest.globs["__name__"] not in _method_modules():
        yield
        return
    with blocked():
        yield


_PURE = tuple(
    str(ROOT / "tests" / folder) for folder in ("core", "graph", "hardness", "recurrent", "transformers", "vision")
)


@pytest.fixture(autouse=True)
def _strict_dtypes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Mixed dtypes raise in tests of pure functions, unless they are marked ``promotes``.

    Optax and Flax mix dtypes themselves: a count of steps and a rate, or narrow activations and wide statistics.
    """
    module = getattr(request.node, "module", None)
    path = request.node.path
    pure = str(path).startswith(_PURE) and not path.stem.endswith("_study") and not hasattr(module, "optax")
    strict = pure and not request.node.get_closest_marker("promotes")
    with jax.numpy_dtype_promotion("strict" if strict else "standard"):
        yield


@functools.cache
def _method_modules() -> frozenset[str]:
    import effjax

    return frozenset(module for method in effjax.METHODS.values() for module in method.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what the second Python runs: doctests, what reads reference vectors, and matrices not marked ``once``.

    Tests marked ``optimized`` come last in their file: other settings of the compiler drop all programs.
    """
    items.sort(key=lambda item: (str(item.path), item.get_closest_marker("optimized") is not None))
    for item in items:
        path = item.path.relative_to(ROOT).parts
        matrix = path[:2] == ("tests", "common") and not item.get_closest_marker("once")
        if path[0] == "effjax" or matrix or _reads_reference(item):
            item.add_marker(pytest.mark.everywhere)


def _reads_reference(item: pytest.Item) -> bool:
    """Whether a test uses a path below ``tests/reference``, itself or by what it uses of its file."""
    spaces = vars(getattr(item, "module", item))
    waiting = [getattr(item, "function", None), *(spaces.get(name) for name in item.fixturenames)]
    seen: dict[int, None] = {}
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen[id(one)] = None
        if isinstance(one, Path | np.lib.npyio.NpzFile) and str(_REFERENCE) in repr(one):
            return True
        if isinstance(one, type) and one.__module__ == spaces["__name__"]:
            waiting += vars(one).values()
        one = inspect.unwrap(one)  # fixtures and jitted functions too
        if isinstance(one, types.FunctionType):
            waiting += [spaces[name] for name in _names(one.__code__) if name in spaces]
    return False


def _names(code: types.CodeType) -> set[str]:
    """Global names in a function and in those defined in it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def pytest_collection_finish() -> None:
    """What has been imported stays; looking for cycles in it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def _one_mlir_context() -> None:
    """One MLIR context for all programs of a thread; making one for each is a seventh of the time of tiny programs."""
    from jax._src.interpreters import mlir  # nothing public makes it

    make, kept = getattr(mlir, "make_ir_context", None), threading.local()

    def context() -> Any:
        if not hasattr(kept, "context"):
            kept.context = make()
        return kept.context

    if make is not None:
        mlir.make_ir_context = context


_one_mlir_context()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Compile a test marked ``optimized`` as a user's programs are."""
    quick = not item.get_closest_marker("optimized")
    if jax.config.read("jax_disable_most_optimizations") != quick:
        jax.config.update("jax_disable_most_optimizations", quick)
        jax.clear_caches()  # no program that was compiled otherwise


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between files, give memory back where compiled programs have filled it."""
    if (nextitem is None or nextitem.path != item.path) and _resident() > _RESIDENT:
        jax.clear_caches()
        gc.collect()
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    """Bytes of memory in use; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
