"""Ask an expert about some rows of a batch, in a program for the bucket that the host chooses."""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from effjax.core.errors import check_number
from effjax.core.shapes import check_ladder, smallest_fit
from effjax.core.tree import holding_both
from effjax.hardness.dispatch import Dispatched, check_answers, check_batch, serve_slots

__all__ = ["HostDispatch"]

Stage = Callable[[Any, PyTree], Any]


class _Waiting(NamedTuple):
    """A batch between two models: what was answered so far, and who asks the next."""

    found: Dispatched
    request: jax.Array
    count: jax.Array


class HostDispatch:
    r"""Two or more models, each run on the smallest bucket that holds the rows that ask it.

    A program of the first model counts who asks; the host reads that one number and starts the program of the next
    model for

    .. math:: C = \min \{ c \in \mathrm{buckets} \cup \{B\} : c \ge |R| \}

    rows, or none at all where nobody asks. One compiled program a bucket and batch shape, none after ``warm_up``.
    Reading the number waits for the device; ``stream`` has the next batch's first model running meanwhile.

    Args:
      stages: ``(params, inputs) -> (outputs, request)``, of ``with_query``; the last one ``(params, inputs) ->
        outputs``. Traceable. Where a later model's answer is NaN the row keeps the answer that it had.
      buckets: increasing sizes; the batch is added, sizes above it are left out.
      compiler_options: of XLA for the programs of the later stages, as of ``jax.jit``. With JAX 0.10 on CPUs
        ``{"xla_cpu_experimental_ynn_fusion_type": ""}`` halves the time of matrix products of some 32 rows.

    Attributes:
      launches: how often each ``(stage, bucket)`` was run.

    Example:
      >>> from effjax.hardness.cascades import Asking, with_query
      >>> grow = lambda params, x: params * x
      >>> serve = HostDispatch([with_query(grow), grow], buckets=(1, 2))
      >>> x = jnp.array([[0.125, 0.0], [0.5, 0.0], [3.0, 0.0]])
      >>> found = serve([Asking(1.0, -0.15), 8.0], x)
      >>> found.served.tolist(), found.outputs[:, 0].tolist(), dict(serve.launches)
      ([True, False, False], [1.0, 0.5, 3.0], {(1, 1): 1})
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        buckets: Sequence[int],
        compiler_options: Mapping[str, Any] | None = None,
    ):
        if len(stages) < 2:
            raise ValueError(f"stages hold {len(stages)}: give two models or more, the cheapest first.")
        self.buckets = check_ladder(buckets, argument="buckets")
        self.launches: collections.Counter[tuple[int, int]] = collections.Counter()
        self._stages = tuple(stages)
        self._forms: dict[Any, tuple[Any, ...]] = {}
        self._first = jax.jit(functools.partial(_first, stages[0]), static_argnums=0)
        last = len(stages) - 1
        # The answers so far give their memory to the next ones.
        how: dict[str, Any] = {"static_argnums": 0, "donate_argnums": 3, "compiler_options": compiler_options}
        self._later = [
            jax.jit(functools.partial(_later, stage, place, place == last), **how)
            for place, stage in enumerate(stages[1:], start=1)
        ]

    def __call__(self, params: Sequence[PyTree], inputs: PyTree) -> Dispatched:
        """Answer a batch.

        Args:
          params: of each stage.
          inputs: an array or a tree of arrays, the batch axis leading.

        Returns:
          A ``Dispatched``; ``answered`` is the place of the model, and no row overflows.

        Raises:
          ValueError: another number of parameters, or models whose answers differ in form.
        """
        return self._finish(params, inputs, self._start(params, inputs))

    def stream(self, params: Sequence[PyTree], batches: Iterable[PyTree], *, ahead: int = 1) -> Iterator[Dispatched]:
        """Answer batches in their order, with the first model of the next ones running while the host waits.

        Args:
          params: of each stage.
          batches: inputs.
          ahead: how many batches the first model is ahead; 0 for none.

        Yields:
          A ``Dispatched`` for each batch.
        """
        check_number("ahead", ahead, low=0, integer=True)
        started: collections.deque[tuple[PyTree, _Waiting]] = collections.deque()
        for inputs in batches:
            started.append((inputs, self._start(params, inputs)))
            if len(started) > ahead:
                yield self._finish(params, *started.popleft())
        while started:
            yield self._finish(params, *started.popleft())

    def warm_up(self, params: Sequence[PyTree], inputs: PyTree) -> int:
        """Compile every program for batches of this shape, and run each once.

        Args:
          params: of each stage.
          inputs: a batch of the shape that is to come.

        Returns:
          The number of programs so far.
        """
        waiting = self._start(params, inputs)
        for place, run in enumerate(self._later, start=1):
            for size in self._sizes(inputs):
                run(size, params[place], inputs, jax.tree.map(jnp.copy, waiting))
        return self.compiles

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        programs: list[Any] = [self._first, *self._later]
        return sum(run._cache_size() for run in programs)

    def program(self, params: Sequence[PyTree], inputs: PyTree, *, size: int, place: int = 1) -> jax.stages.Lowered:
        """A later stage's program for a bucket, lowered: to look at what it costs.

        Args:
          params: of each stage.
          inputs: a batch, or its shapes.
          size: a bucket.
          place: of the stage.
        """
        waiting = jax.eval_shape(self._first, self._dtypes(params, inputs), params[0], inputs)
        return self._later[place - 1].lower(size, params[place], inputs, waiting)

    def _sizes(self, inputs: PyTree) -> tuple[int, ...]:
        rows = jnp.shape(jax.tree.leaves(inputs)[0])[0]
        return (*(size for size in self.buckets if size < rows), *([rows] if rows else []))

    def _dtypes(self, params: Sequence[PyTree], inputs: PyTree) -> tuple[Any, ...]:
        """Dtypes that lose nothing of any stage's answers; a form that does not fit is refused."""
        if len(params) != len(self._stages):
            raise ValueError(f"params hold {len(params)} for {len(self._stages)} stages: give one for each.")
        shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(inputs))
        if shapes not in self._forms:
            self._forms[shapes] = _common_dtypes(self._stages, params, inputs)
        return self._forms[shapes]

    def _start(self, params: Sequence[PyTree], inputs: PyTree) -> _Waiting:
        return self._first(self._dtypes(params, inputs), params[0], inputs)

    def _finish(self, params: Sequence[PyTree], inputs: PyTree, waiting: _Waiting) -> Dispatched:
        for place, run in enumerate(self._later, start=1):
            asking = int(waiting.count)
            if not asking:
                break
            size = smallest_fit(asking, self._sizes(inputs), argument="buckets")
            self.launches[place, size] += 1
            waiting = run(size, params[place], inputs, waiting)
        return waiting.found


def _common_dtypes(stages: Sequence[Stage], params: Sequence[PyTree], inputs: PyTree) -> tuple[Any, ...]:
    shape = lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
    rows = jnp.shape(jax.tree.leaves(inputs)[0])[0]
    outputs, request = jax.eval_shape(stages[0], params[0], jax.tree.map(shape, inputs))
    check_batch(inputs, outputs, request)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(outputs)]
    for place, stage in enumerate(stages[1:], start=1):
        final = place == len(stages) - 1
        form = outputs if final else (outputs, request)
        found = check_answers(stage, params[place], inputs, form, rows)
        leaves = jax.tree.leaves(found if final else found[0])
        dtypes = [holding_both(one, leaf.dtype) for one, leaf in zip(dtypes, leaves, strict=True)]
    return tuple(dtypes)


def _first(stage: Stage, dtypes: tuple[Any, ...], params: PyTree, inputs: PyTree) -> _Waiting:
    outputs, request = stage(params, inputs)
    leaves, structure = jax.tree.flatten(outputs)
    held = [jnp.asarray(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
    nobody = jnp.zeros_like(request)
    found = Dispatched(jax.tree.unflatten(structure, held), nobody.astype(jnp.int32), nobody, nobody)
    return _Waiting(found, request, jnp.sum(request, dtype=jnp.int32))


def _later(
    stage: Stage, place: int, final: bool, size: int, params: PyTree, inputs: PyTree, waiting: _Waiting
) -> _Waiting:
    before, request, count = waiting
    nobody = jnp.zeros_like(request)
    slots = jnp.where(jnp.arange(size) < count, jnp.argsort(~request, stable=True)[:size], request.shape[0])
    own = before.outputs if final else (before.outputs, nobody)
    found = serve_slots(stage, params, inputs, own, request, slots)
    outputs, asking = (found.outputs, nobody) if final else found.outputs
    answered = jnp.where(found.served, place, before.answered)
    now = Dispatched(outputs, answered, before.overflowed, before.failed | found.failed)
    return _Waiting(now, asking, jnp.sum(asking, dtype=jnp.int32))
