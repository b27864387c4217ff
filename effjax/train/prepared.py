"""A program bound to devices: where its state lies, and its steps compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache

from effjax.core.cost import Executables
from effjax.data.pipeline import put_batch
from effjax.train.grad import all_finite
from effjax.train.mesh import batch_sharding, state_shardings
from effjax.train.options import TrainOptions
from effjax.train.program import Phase, Program

__all__: list[str] = []

PyTree = Any


class Prepared:
    """A program bound to devices: shardings, and ``init`` and the steps compiled when first used. Shared by seeds.

    Attributes:
      abstract: the state's shapes, dtypes and shardings.
      batch_sharding: where batches go; None on a single device.
      init: ``key -> state``; compiled on a mesh only, where the state must be born in its place.
    """

    def __init__(self, program: Program, options: TrainOptions):
        if options.compile_cache and options.compile_cache != getattr(jax.config, "jax_compilation_cache_dir", None):
            jax.config.update("jax_compilation_cache_dir", options.compile_cache)
            compilation_cache.reset_cache()  # JAX reads the name once, and the command's folder may be in use already
        self._program = program
        self._mesh = mesh = options.mesh.built
        self._split = mesh is not None and options.mesh.rules != "data"
        self._warm: set[Executables] = set()
        shapes = jax.eval_shape(program.init, jax.random.key(0))
        shardings = state_shardings(mesh, shapes, program.sharding, options.mesh.rules)
        self.abstract = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
        )
        self.batch_sharding = batch_sharding(mesh, program.batch_size) if program.has_batches else None
        # On one device the single operations are compiled once for all arms, a whole init for each.
        self.init = _copied(program.init) if mesh is None else jax.jit(program.init, out_shardings=shardings)
        self._steps = {
            step: Executables(
                self._current(_skip_nonfinite(step, program.params) if options.nonfinite == "skip" else step),
                donate_argnums=(0,) if options.donate else (),
                out_shardings=None if mesh is None else (shardings, None),
            )
            for step in dict.fromkeys(phase.step for phase in program.phases)
        }

    def _current(self, step: Callable) -> Callable:
        """The step, traced with the mesh current where parameters are split, so that activations keep their rows."""
        mesh = self._mesh
        if mesh is None or not self._split:
            return step

        def on_mesh(state, batch, aux):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return step(state, batch, aux)

        return on_mesh

    def step(self, phase: Phase) -> Executables:
        """The step of a phase, compiled ahead of time once per input signature; shared by phases with the same step."""
        return self._steps[phase.step]

    @property
    def compiles(self) -> int:
        """Executables compiled so far, of all steps."""
        return sum(step.compiles for step in self._steps.values())

    @property
    def begun(self) -> int:
        """Executables compiled so far, and those that threads are to compile."""
        return self.compiles + sum(step.pending for step in self._steps.values())

    @property
    def compile_s(self) -> float:
        """Seconds spent on them."""
        return sum(step.compile_s for step in self._steps.values())

    def put(self, batch: PyTree) -> PyTree:
        """A batch of any size, placed as the loop places its batches."""
        rows = np.shape(jax.tree.leaves(batch)[0])[0] * jax.process_count()
        return put_batch(batch, sharding=batch_sharding(self._mesh, rows))

    def warm_up(
        self, phase: Phase, state: PyTree, aux: PyTree, on_compile: Callable[[int, int], None], *, beside: bool = False
    ) -> None:
        """Compile a phase's step for every batch shape that the program declares; nothing to do the second time.

        Args:
          phase: whose step.
          state: of the run.
          aux: of the phase.
          on_compile: called with (done, total) before the first and after each; of those that compile ``beside`` the
            run with (0, total) and (total, total) once they are traced.
          beside: compile on threads, in the order of the loader's shapes, and return; a step waits for its own.

        Raises:
          CompileError: a program that could not be compiled.
          ValueError: the shapes need more executables than ``program.compiles``.
        """
        shapes = self._program.shapes
        step = self.step(phase)
        if step in self._warm or not shapes:
            return
        on_compile(0, len(shapes))
        arguments = [(state, self.put(shape.batch), aux) for shape in shapes]
        if beside:
            step.compile_beside(arguments)
        else:
            step.compile_all(arguments, lambda done: on_compile(done, len(shapes)) if done < len(shapes) else None)
        if self.begun > self._program.compiles:
            raise ValueError(
                f"compiles={self._program.compiles}, but the {len(shapes)} batch shapes of the loader needed "
                f"{self.begun} executables. Declare as many, or use fewer shapes."
            )
        on_compile(len(shapes), len(shapes))
        self._warm.add(step)

    def settle(self) -> None:
        """Wait for what threads are to compile."""
        for step in self._steps.values():
            step.settle()

    def cancel(self) -> None:
        """End the threads that compile; what they had not begun is left to the next ``warm_up``."""
        for step in self._steps.values():
            if step.pending:
                step.cancel()
                self._warm.discard(step)


def _copied(init: Callable) -> Callable:
    """Leaves that share a buffer (an anchor that is the parameters) could not be donated."""
    device = jax.local_devices()[0]
    return lambda key: jax.device_put(init(key), device, may_alias=False)


def _skip_nonfinite(step: Callable, params: Callable[[PyTree], PyTree]) -> Callable:
    """The step, undone where its loss, its gradients (as far as it tells) or the parameters after it are not finite."""

    def guarded(state, batch, aux):
        new, metrics = step(state, batch, aux)
        metrics = dict(metrics)
        sound = jnp.isfinite(metrics["loss"]) & metrics.pop("sound", True) & all_finite(params(new))
        return optax.tree.where(sound, new, state), {**metrics, "skipped": ~sound}

    return guarded
