"""A program bound to devices: where its state lies, and its steps compiled."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache

from effjax.core.cost import Executables
from effjax.core.errors import NoEffectWarning
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
        if mesh is not None and mesh.shape["data"] > 1 and not self._split and not program.has_batches:
            _warn_repeated(program, mesh.shape["data"])
        # On one device the single operations are compiled once for all arms, a whole init for each.
        self.init = _copied(program.init) if mesh is None else _born(program.init, mesh, shardings)
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

    def in_place(self, state: PyTree) -> PyTree:
        """A state made on the host between phases, alike in all processes, with new leaves where they lie in steps."""
        if self._mesh is None:
            return state
        moved = lambda leaf, abstract: leaf if _lies(leaf, abstract.sharding) else _moved(leaf, abstract.sharding)
        return jax.tree.map(moved, state, self.abstract)

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


def _warn_repeated(program: Program, devices: int) -> None:
    warnings.warn(
        f"mesh.data={devices} only repeats the work of {program.task.name!r} on {devices} devices: a step takes no "
        "batches that could be split. Set mesh.data to 1, or in a loop of your own split a graph's rows by "
        "effjax.graph.shard_rows and shard_matrix.",
        NoEffectWarning,
        stacklevel=3,
    )


def _copied(init: Callable) -> Callable:
    """Leaves that share a buffer (an anchor that is the parameters) could not be donated."""
    device = jax.local_devices()[0]
    return lambda key: jax.device_put(init(key), device, may_alias=False)


def _lies(leaf: Any, sharding: jax.sharding.Sharding) -> bool:
    return isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def _moved(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable and not sharding.is_fully_addressable
    if local and not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = np.asarray(leaf)  # a committed array of this process would not be taken
    return jax.device_put(leaf, sharding)


def _born(init: Callable, mesh: jax.sharding.Mesh, shardings: PyTree) -> Callable:
    """``init`` compiled, whose state is born in its place.

    Arrays that it closes over, such as pretrained parameters, become arguments: as constants they would be copied into
    the program, and those that several processes share could not be. What lies on one device is copied to all of them.
    """
    traced, shapes = jax.make_jaxpr(init, return_shape=True)(jax.random.key(0))
    structure = jax.tree.structure(shapes)

    def run(constants: list[jax.Array], key: jax.Array) -> PyTree:
        return jax.tree.unflatten(structure, jax.core.eval_jaxpr(traced.jaxpr, constants, key))

    devices, everywhere = set(mesh.devices.flat), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    here = lambda leaf: isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices
    jitted = jax.jit(run, out_shardings=shardings)
    return lambda key: jitted([leaf if here(leaf) else _moved(leaf, everywhere) for leaf in traced.consts], key)


def _skip_nonfinite(step: Callable, params: Callable[[PyTree], PyTree]) -> Callable:
    """The step, undone where its loss, its gradients (as far as it tells) or the parameters after it are not finite."""

    def guarded(state, batch, aux):
        new, metrics = step(state, batch, aux)
        metrics = dict(metrics)
        sound = jnp.isfinite(metrics["loss"]) & metrics.pop("sound", True) & all_finite(params(new))
        return optax.tree.where(sound, new, state), {**metrics, "skipped": ~sound}

    return guarded
