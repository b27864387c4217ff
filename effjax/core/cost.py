"""Parameters, ahead-of-time compiled steps with their cost and memory, compile counts, and the machine."""

import contextlib
import math
import os
import platform
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.core.beside import Beside, cores
from effjax.core.macs import MacCount, count_jaxpr_macs, holds_loop

PyTree = Any
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def count_params(tree: PyTree) -> int:
    """Numbers held by the leaves of a tree of arrays or ``jax.ShapeDtypeStruct``.

    Args:
      tree: parameters only; pass ``nnx.state(model, nnx.Param)`` of an NNX model.

    Returns:
      The sum of the leaves' sizes.

    Example:
      >>> count_params({"kernel": np.ones((3, 4)), "bias": np.ones(4)})
      16
    """
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


class StepAnalysis(NamedTuple):
    """What XLA says of one executable, per device; None where the backend does not say.

    Attributes:
      flops: floating-point operations of one call; None where the program holds a loop, as XLA
        counts a loop's body once.
      bytes_accessed: memory traffic of one call in bytes; None like ``flops``.
      argument_bytes: inputs.
      output_bytes: outputs.
      alias_bytes: outputs that live in a donated input.
      temp_bytes: scratch.
    """

    flops: float | None
    bytes_accessed: float | None
    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    temp_bytes: int | None

    @property
    def peak_bytes(self) -> int | None:
        """Arguments + outputs - aliased + temporaries."""
        if self.argument_bytes is None or self.output_bytes is None:
            return None
        if self.alias_bytes is None or self.temp_bytes is None:
            return None
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


class Executables:
    """A function compiled ahead of time, once for each input signature; called like ``jax.jit(function)``.

    Compilation is apart from execution, so it can be counted, timed and analysed. A call finds its
    executable by the shapes and dtypes of every argument but the first: that is the training state,
    whose structure is fixed. An executable refuses what it was not compiled for before it touches
    any buffer; the whole signature (structure, shapes, dtypes, weak types, shardings) then decides.

    Args:
      function: traceable, with positional arguments only; bind static ones by ``functools.partial``.
      donate_argnums: arguments whose buffers the call consumes.
      in_shardings: as in ``jax.jit``; None leaves it to the arguments.
      out_shardings: as in ``jax.jit``; None leaves it to the compiler, which on a mesh may move the
        state and so cost a second compilation.

    Attributes:
      compile_s: seconds spent so far in tracing, lowering and compiling.

    Example:
      >>> step = Executables(lambda state, batch: (state + batch.sum(), {"loss": state}))
      >>> state, metrics = step(jax.numpy.zeros(()), jax.numpy.ones(3))
      >>> state, metrics = step(state, jax.numpy.ones(3))
      >>> step.compiles, float(state)
      (1, 6.0)
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        donate_argnums: int | Sequence[int] = (0,),
        in_shardings: PyTree = None,
        out_shardings: PyTree = None,
    ):
        shardings = {"in_shardings": in_shardings, "out_shardings": out_shardings}
        given = {name: value for name, value in shardings.items() if value is not None}
        self._begin(jax.jit(function, donate_argnums=donate_argnums, **given))

    @classmethod
    def of(cls, jitted: Any) -> "Executables":
        """The executables of what ``jax.jit`` returned, with its donation and shardings; no static arguments."""
        made = cls.__new__(cls)
        made._begin(jitted)
        return made

    def _begin(self, jitted: Any) -> None:
        self._jitted = jitted
        self._compiled: dict[Any, tuple[jax.stages.Compiled, Any]] = {}  # with the jaxpr
        self._by_shapes: dict[Any, jax.stages.Compiled] = {}
        self._beside: Beside | None = None
        self.compile_s = 0.0

    @property
    def compiles(self) -> int:
        """Executables compiled so far."""
        return len(self._compiled)

    @property
    def pending(self) -> int:
        """Executables that threads are to compile and that no call has needed so far."""
        return 0 if self._beside is None else len(self._beside)

    def __call__(self, *args: Any) -> Any:
        if self._beside is not None:
            self._beside.check()
        shapes = _shapes(args)
        executable = self._by_shapes.get(shapes)
        if executable is not None:
            try:
                return executable(*args)
            except (TypeError, ValueError):
                other = self.compile(*args)
                if other is executable:
                    raise
        else:
            other = self.compile(*args)
        self._by_shapes[shapes] = other
        return other(*args)

    def compile(self, *args: Any) -> jax.stages.Compiled:
        """The executable for these arguments, compiled if it is new; nothing is run.

        Args:
          *args: arrays, or ``jax.ShapeDtypeStruct`` with shardings where they matter.

        Returns:
          The compiled function.
        """
        signature = _whole_signature(args)
        if signature not in self._compiled:
            start = time.perf_counter()
            if self._beside is not None and signature in self._beside:
                self._keep(*self._beside.take(signature))
            else:
                traced = self._jitted.trace(*args)
                self._keep(signature, _shapes(args), traced.lower().compile(), traced.jaxpr)
            self.compile_s += time.perf_counter() - start
        return self._compiled[signature][0]

    def _keep(self, signature: Any, shapes: Any, compiled: jax.stages.Compiled, jaxpr: Any) -> None:
        self._compiled[signature] = compiled, jaxpr
        self._by_shapes.setdefault(shapes, compiled)

    def compile_all(
        self, arguments: Sequence[tuple[Any, ...]], on_done: Callable[[int], None] = lambda done: None
    ) -> None:
        """The executables for several arguments, as many compiled at a time as there are pairs of cores.

        XLA compiles outside of Python's lock; tracing, which does not, is done here, one after the other.
        ``compile_s`` grows by the seconds that all of it takes.

        Args:
          arguments: as for ``compile``, a tuple for each.
          on_done: called with the number that are compiled, after each.

        Raises:
          CompileError: one of them could not be compiled.
        """
        self.compile_beside(arguments)
        assert self._beside is not None
        start = time.perf_counter()
        done = len(arguments) - len(self._beside)
        for signature in self._beside.as_completed():
            self._keep(*self._beside.take(signature))
            done += 1
            on_done(done)
        self.compile_s += time.perf_counter() - start

    def compile_beside(self, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Begin to compile the executables for several arguments on threads, in this order, and return.

        A call waits for the one that it needs. ``compile_s`` grows by the seconds that the caller spends on tracing and
        waiting. A program that cannot be compiled is an error of the next call, whichever executable it needs.

        Args:
          arguments: as of ``compile``, a tuple for each.
        """
        start = time.perf_counter()
        if self._beside is None:
            self._beside = Beside()
        for args in arguments:
            signature = _whole_signature(args)
            if signature not in self._compiled and signature not in self._beside:
                traced = self._jitted.trace(*args)
                self._beside.add(signature, _shapes(args), traced)
        self.compile_s += time.perf_counter() - start

    def settle(self) -> None:
        """Wait for every program that threads are to compile; the time counts as compiling.

        Raises:
          CompileError: one of them could not be compiled.
        """
        if self.pending:
            self.compile_all([])

    def cancel(self) -> None:
        """Leave out what threads have not begun to compile, and wait for the rest; idempotent."""
        if self._beside is not None:
            self._beside.cancel()

    def analysis(self, *args: Any) -> StepAnalysis:
        """Cost and memory of the executable for these arguments; without any, of the one with the largest peak memory.

        Args:
          *args: as for ``compile``.

        Returns:
          A ``StepAnalysis``.

        Raises:
          RuntimeError: nothing is compiled yet.
        """
        if args:
            self.compile(*args)
            return _analyse(*self._compiled[_whole_signature(args)])
        if not self._compiled:
            raise RuntimeError("Nothing is compiled yet: call the function or its compile(*args) first.")
        analyses = [_analyse(compiled, jaxpr) for compiled, jaxpr in self._compiled.values()]
        return max(analyses, key=lambda analysis: analysis.peak_bytes or 0)

    def macs(self, *args: Any) -> MacCount:
        """Multiply-accumulates of a call with these arguments, as ``count_macs`` counts them; it is not traced again.

        Args:
          *args: as for ``compile``.

        Returns:
          A ``MacCount``.
        """
        self.compile(*args)
        return count_jaxpr_macs(self._compiled[_whole_signature(args)][1])


def _shapes(args: tuple[Any, ...]) -> Any:
    leaves, structure = jax.tree.flatten(args[1:])
    return (structure, *[(getattr(x, "shape", ()), getattr(x, "dtype", type(x))) for x in leaves])


def _whole_signature(args: tuple[Any, ...]) -> Any:
    leaves, structure = jax.tree.flatten(args)
    return (structure, *map(_signature, leaves))


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding
    aval = jax.typeof(leaf)
    sharding = leaf.sharding if getattr(leaf, "committed", False) else None
    return aval.shape, aval.dtype, aval.weak_type, sharding


def _analyse(compiled: jax.stages.Compiled, jaxpr: Any) -> StepAnalysis:
    cost = {} if holds_loop(jaxpr) else compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    sizes = (getattr(memory, f"{part}_size_in_bytes", None) for part in ("argument", "output", "alias", "temp"))
    return StepAnalysis(cost.get("flops"), cost.get("bytes accessed"), *sizes)


class CompileLog:
    """Backend compilations seen by ``count_compiles``.

    Attributes:
      names: of the compiled functions, in order.
      seconds: spent in the backend compiler.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.seconds = 0.0

    @property
    def count(self) -> int:
        """How many there were."""
        return len(self.names)


@contextlib.contextmanager
def count_compiles() -> Generator[CompileLog]:
    """Count every compilation by the backend inside the block, whoever asks for it.

    A program read from the persistent compilation cache counts too: it was not in memory.

    Yields:
      A ``CompileLog`` that fills up.

    Example:
      >>> double = jax.jit(lambda x: 2 * x)
      >>> x = jax.numpy.ones(3)
      >>> with count_compiles() as log:
      ...     y = double(double(x))
      >>> log.count
      1
    """
    log = CompileLog()

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == _COMPILE_EVENT:
            log.names.append(str(details.get("fun_name", "")))
            log.seconds += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield log
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


_from_folder = [0]


def _count_hits(event: str, **details: str | int) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _from_folder[0] += 1


jax.monitoring.register_event_listener(_count_hits)


def programs_from_folder() -> int:
    """Programs of this process that came from JAX's folder of compiled programs."""
    return _from_folder[0]


def hardware() -> dict[str, Any]:
    """What this process computes on, as JSON-able values; starts the JAX backend.

    Returns:
      Accelerator (``platform``, ``device_kind``, ``devices`` and ``processes`` of the whole job,
      ``device_memory_bytes`` of one device or None), host (``cpu``, ``cores`` this process may use,
      ``memory_bytes``, ``system``) and the version of ``jax``.

    Example:
      >>> hardware()["cores"] >= 1
      True
    """
    device = jax.local_devices()[0]
    memory = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "device_memory_bytes": memory.get("bytes_limit"),
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "jax": jax.__version__,
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
