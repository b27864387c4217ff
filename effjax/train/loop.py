"""The generic training loop: any ``Program``, resumable bit for bit, the host never blocking the device."""

import contextlib
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax.core.cost import count_compiles
from effjax.core.errors import near
from effjax.core.storage import Folder, storage
from effjax.core.tree import leaf_paths
from effjax.data.pipeline import prefetch_to_device
from effjax.train.checkpoint import CheckpointError, Checkpoints
from effjax.train.grad import all_finite
from effjax.train.logging import JsonlLog, jsonable
from effjax.train.options import TrainOptions
from effjax.train.prepared import Prepared
from effjax.train.program import Program
from effjax.train.signals import Preempted, StopSignal
from effjax.train.step_books import Books
from effjax.train.trace import Trace

__all__ = ["FitResult", "fit"]

PyTree = Any


class NonFiniteError(RuntimeError):
    """The loss, or the parameters about to be saved or returned, are not finite.

    Attributes:
      train_s: seconds spent stepping until this was noticed.
    """

    train_s: float = 0.0


class FitResult(NamedTuple):
    """What a finished run leaves.

    Attributes:
      state: the final state.
      steps: executed; fewer than planned where a phase ended early.
      train: means over all steps of the step metrics, through ``Program.train_metrics``.
      train_s: seconds spent stepping and between phases, over all interruptions, without compiling, evaluating and
        saving. Where threads compile beside the first steps, these share the processor with them.
      skipped: updates dropped because their loss, their gradients or the parameters after them were not finite.
      curve: one record an evaluation during training, ``{"step", "train_s", metric: value, ...}``.
    """

    state: PyTree
    steps: int
    train: dict[str, float]
    train_s: float
    skipped: int
    curve: list[dict[str, float]]


_all_finite = jax.jit(all_finite)


def fit(
    program: Program,
    seed: int,
    *,
    options: TrainOptions | None = None,
    prepared: Prepared | None = None,
    directory: str | Folder | None = None,
    identity: Mapping[str, Any] | None = None,
    on_steps: Callable[[int], None] = lambda done: None,
    on_compile: Callable[[int, int], None] = lambda done, total: None,
    compile_first: bool = False,
) -> FitResult:
    """Train ``program`` from ``seed`` to its last step, continuing from the newest checkpoint in ``directory``.

    Order of the start: checkpoint if there is one, else ``program.init``.

    Args:
      program: what to train.
      seed: of the parameters, the step keys and the data order.
      options: how to execute it.
      prepared: of the same program and options, to share executables between seeds.
      directory: of checkpoints and ``log.jsonl``, on a disk or in a bucket (``gs://``); None keeps nothing.
      identity: JSON-able description of the run, checked on resume.
      on_steps: called now and then with the number of steps done.
      on_compile: called with (done, total) before the executables of a program with several batch shapes are compiled,
        and once all of them are, or are left to threads.
      compile_first: compile them all before the first step, as many at a time as there are pairs of cores, with a call
        of ``on_compile`` after each. Else threads compile them in the order in which the run comes to them, while it
        trains; a step waits for its own. Several processes always compile first. The bits of a run are the same.

    Returns:
      A ``FitResult``.

    Raises:
      ValueError: the batches end early, or have a shape that ``Program.shapes`` does not declare.
      NonFiniteError: and ``options.nonfinite == 'stop'``; the newest checkpoint is still good.
      Preempted: after saving, when SIGTERM arrived.
      CheckpointError: the newest checkpoint is damaged or foreign.
      CompileError: a program that a thread was to compile could not be; the message names its shapes.
    """
    options = options or TrainOptions()
    prepared = prepared or Prepared(program, options)
    run = _Run(program, seed, options, prepared, directory, dict(identity or {}, seed=seed))
    run.beside = not compile_first and jax.process_count() == 1
    with StopSignal(signal.SIGTERM, signal.SIGINT) as stop:
        run.stop = stop
        try:
            run.start(on_compile)
            run.train(on_steps)
            stop.saving()
            result = run.finish()
        except NonFiniteError as error:
            error.train_s = run.train_s
            raise
        finally:
            run.close()
        if stop.requested:  # after the last step; what follows a run would not notice
            raise Preempted(run.stopped())
    return result


class _Run:
    """One seed of one program: its state, its place in the phases, its data and its books."""

    def __init__(self, program, seed, options, prepared, directory, identity):
        self.program, self.seed, self.options, self.prepared = program, seed, options, prepared
        self.checkpoints = None
        self.stop: StopSignal
        self.beside = False
        self.log = None
        self.batches = None
        self.trace = Trace(None, 0, 0)
        self.directory = directory = None if directory is None else storage(directory, "directory")
        if directory is not None:
            self.checkpoints = Checkpoints(
                directory / "checkpoints", identity, keep=options.keep, best_metric=options.best_metric
            )
        self.total = program.total_steps
        self.done = 0  # steps executed
        self.phase = 0
        self.within = 0  # steps executed in this phase
        self.over = {phase.over: jax.jit(phase.over) for phase in program.phases if phase.over is not None}
        self.train_s = 0.0
        self._started: float | None = None
        self._host_compile_s = 0.0
        self.saved_at = time.monotonic()

    @property
    def finished(self) -> bool:
        return self.phase == len(self.program.phases)

    @property
    def reached(self) -> int:
        """Steps done or saved by phases that ended early."""
        return sum(phase.steps for phase in self.program.phases[: self.phase]) + self.within

    def start(self, on_compile: Callable[[int, int], None]) -> None:
        source = self.program.loader.open(self.seed) if self.program.has_batches else None
        books = None
        if self.checkpoints is not None and self.checkpoints.latest() is not None:
            self.done, self.state, extra = self.checkpoints.restore(self.prepared.abstract)
            if source is not None:
                source.set_state(extra["iterator"])
            self._take_place(**extra["place"])
            self.train_s = extra["train_s"]
            books = extra["books"]
        else:
            self.state = self.prepared.init(jax.random.key(self.seed))
        if self.directory is not None and jax.process_index() == 0:
            self.log = JsonlLog(self.directory / "log.jsonl", step=self.done)
        self.books = Books(self.options, self.log, books)
        if source is not None:
            self.batches = prefetch_to_device(source, size=self.options.prefetch, sharding=self.prepared.batch_sharding)
        if self.options.best_metric and not self.done:
            self._check_best_metric(self.options.best_metric.removeprefix("-"))
        self.on_compile = on_compile
        self.began = self.done
        self.trace = Trace(self.options.profile, self.began, self.total)
        self._begin_phase()
        self._warm_up()

    def _check_best_metric(self, name: str) -> None:
        known = self.program.judged(self.state)
        if name not in known:
            raise ValueError(
                f"train.best_metric={self.options.best_metric!r} is not measured; the evaluation gives "
                f"{', '.join(known)}.{near(name, known)}"
            )

    def _lengths(self) -> list[int]:
        return [phase.steps for phase in self.program.phases]

    def _take_place(self, phases: list[int], phase: int, within: int) -> None:
        """Go on where the checkpoint stood, if the phases up to there are those of this program."""
        lengths = self._lengths()
        if phases[:phase] != lengths[:phase] or (phase < len(phases) and not within <= lengths[phase]):
            raise CheckpointError(
                f"{self.directory} was written by a run with phases of {phases} steps, in phase {phase}; "
                f"this run has phases of {lengths} steps. Use another output folder, or delete this one."
            )
        self.phase, self.within = phase, within

    def train(self, on_steps: Callable[[int], None]) -> None:
        lag = self.options.read_lag
        if not self.finished:
            self._resume_clock()
        while not self.finished:
            self.trace.before(self.done)
            self._step()
            self.trace.after(self.done, self.state)
            self.stop.unsaved()
            self._maybe_leave()
            if self.done % lag == 0 or self.finished:
                self._check_books()
                on_steps(self.reached)
            self._maybe_evaluate()
            if self.stop.requested:
                self._stop()
            if self._save_due():
                self._save()
        self._pause_clock()

    def _step(self) -> None:
        batch = self._next_batch()
        self.state, metrics = self.prepared.step(self.program.phases[self.phase])(self.state, batch, self.aux)
        self.done += 1
        self.within += 1
        if self.prepared.begun > self.declared:
            raise ValueError(
                f"step {self.done} compiled an executable after the warm-up, for the batch "
                f"{_shapes(batch)}. The loader's shapes must declare it."
            )
        self.books.push(self.done, metrics)

    def _maybe_leave(self) -> None:
        phase = self.program.phases[self.phase]
        early = phase.over is not None and bool(self.over[phase.over](self.state))
        if self.within < phase.steps and not early:
            return
        self.prepared.settle()  # what threads compile would count as this phase's
        with count_compiles() as log:
            self._leave_phase()
            self._begin_phase()
        self._host_compile_s += log.seconds
        self._warm_up()

    def _leave_phase(self) -> None:
        leave = self.program.phases[self.phase].leave
        self.state = self.state if leave is None else self.prepared.in_place(leave(self.state))
        self.phase, self.within = self.phase + 1, 0

    def _begin_phase(self) -> None:
        """Make what the phase's step reads; phases without steps are passed."""
        while not self.finished and self.program.phases[self.phase].steps <= 0:
            self._leave_phase()
        aux = None if self.finished else self.program.phases[self.phase].aux
        self.aux = None if aux is None else aux(self.state)

    def _warm_up(self) -> None:
        if not self.finished:
            phase = self.program.phases[self.phase]
            self.prepared.warm_up(phase, self.state, self.aux, self._compiling, beside=self.beside)
        self.declared = self.prepared.begun if self.program.shapes else np.inf

    def _compiling(self, done: int, total: int) -> None:
        """Between two compilations, each of which may take long."""
        if self.stop.requested:
            self._stop()
        self.on_compile(done, total)

    def finish(self) -> FitResult:
        self._check_books(everything=True)
        self.books.end_window(self.done)
        if self.done and self.books.skipped == self.done:
            raise NonFiniteError(
                f"all {self.done} updates were skipped, from step 1 on: their losses, gradients or parameters were not "
                "finite. Check the data and the learning rate."
            )
        self._check_params()
        if self.checkpoints is not None:
            self._write_checkpoint(None)
        return FitResult(
            self.state,
            self.done,
            dict(self.program.train_metrics(self.books.means())),
            self.train_s,
            self.books.skipped,
            self.books.curve,
        )

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each of them, whatever another one raises
            stack.callback(self.prepared.cancel)
            for part in (self.checkpoints, self.log, self.batches, self.trace):
                if part is not None:
                    stack.callback(part.close)

    def _next_batch(self) -> PyTree:
        if self.batches is None:
            return None
        try:
            return next(self.batches)
        except StopIteration:
            raise ValueError(
                f"the batches ended after {self.done} of {self.total} steps. "
                "Let them repeat (epochs=None), or give fewer steps."
            ) from None

    def _check_books(self, everything: bool = False) -> None:
        bad = self.books.read(0 if everything else self.options.read_lag)
        if bad is not None and self.options.nonfinite == "stop":
            self._pause_clock()
            raise NonFiniteError(self._explain(bad))

    def _explain(self, step: int) -> str:
        norm = float(optax.tree.norm(_floating(self.program.params(self.state))))
        last = ", ".join(f"{name}={value:.4g}" for name, value in self.books.last.items())
        since = self.books.last_finite
        saved = self.checkpoints.latest() if self.checkpoints is not None else None
        return (
            f"the loss is not finite at step {step} (last finite at step {since}). Metrics there: {last}; "
            f"norm of the parameters now: {norm:.4g}. Newest good checkpoint: {saved}. "
            "Lower the learning rate, or set train.nonfinite=skip to drop such updates and count them."
        )

    def _maybe_evaluate(self) -> None:
        every = self.options.evaluate_steps
        if not every or self.done % every:
            return
        self._pause_clock()
        metrics = self.program.judged(self.state)
        self.books.curve.append(jsonable({"step": self.done, "train_s": self.train_s, **metrics}))
        if self.log is not None:
            self.log.write(step=self.done, evaluation=metrics)
        if self.checkpoints is not None:
            self._write_checkpoint(metrics)
        self._resume_clock()

    def _stop(self) -> None:
        self.stop.saving()
        if self.checkpoints is not None and self.done > self.began:
            self._save()
        raise Preempted(self.stopped())

    def stopped(self) -> str:
        """What to say of a run that was told to stop."""
        where = f"stopped after step {self.done} of {self.total}"
        if self.checkpoints is None:
            return f"{where}; nothing was saved, since the run has no directory."
        return f"{where}; the same command continues from there."

    def _save_due(self) -> bool:
        if self.checkpoints is None or self.finished:
            return False
        every = self.options.checkpoint_steps
        if every is None and jax.process_count() > 1:
            every = max(1, self.total // 20)
        if every is not None:
            return self.done % every == 0
        return time.monotonic() - self.saved_at >= self.options.checkpoint_seconds

    def _save(self) -> None:
        self._pause_clock()
        self._check_books(everything=True)
        self._write_checkpoint(None)
        self._resume_clock()

    def _write_checkpoint(self, metrics: dict[str, float] | None) -> None:
        assert self.checkpoints is not None
        if self.checkpoints.latest() == self.done:
            return
        self._check_books(everything=True)
        self._check_params()
        if self.log is not None:
            self.log.flush()
        self.checkpoints.save(
            self.done,
            self.state,
            {
                "iterator": None if self.batches is None else self.batches.get_state(),
                "place": {"phases": self._lengths(), "phase": self.phase, "within": self.within},
                "books": self.books.snapshot(),
                "train_s": self.train_s,
            },
            metrics,
        )
        self.saved_at = time.monotonic()

    def _check_params(self) -> None:
        if not bool(_all_finite(self.program.params(self.state))):
            raise NonFiniteError(
                f"the parameters at step {self.done} are not finite; they were not saved. Lower the learning rate, or "
                "set train.nonfinite=skip to drop updates that are not finite and count them."
            )

    def _resume_clock(self) -> None:
        self._started, self._compiled_before = time.perf_counter(), self._compile_s()

    def _compile_s(self) -> float:
        return self.prepared.compile_s + self._host_compile_s

    def _pause_clock(self) -> None:
        if self._started is not None:
            jax.block_until_ready(self.state)
            compiling = self._compile_s() - self._compiled_before
            self.train_s += max(0.0, time.perf_counter() - self._started - compiling)
            self._started = None


def _shapes(batch: PyTree) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(leaf) for name, leaf in zip(leaf_paths(batch), jax.tree.leaves(batch), strict=True)}


def _floating(tree: PyTree) -> list[jax.Array]:
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
