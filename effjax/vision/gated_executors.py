"""How a gated residual block runs: all of it and masked, or only the examples whose gate is open."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.shapes import check_ladder, fit_ladder
from effjax.core.slots import in_least_bucket, request_slots
from effjax.core.tree import wide

__all__ = ["Executor", "ResidualBlock", "block_rungs", "fit_rungs", "run_block"]

EXECUTORS = ("masked", "cond", "map", "capacity", "ladder")


class Executor(NamedTuple):
    """How gated blocks run.

    Attributes:
      name: ``"ladder"``, the least of a few sizes that holds the open examples; ``"capacity"``, a fixed number of
        examples; ``"cond"``, for batches of one; ``"map"``, one example after another; ``"masked"``, all of them, for
        training alone.
      rungs: sizes of the ladder, increasing; None for ``block_rungs``.
      capacity: of ``"capacity"``.
    """

    name: str = "ladder"
    rungs: Sequence[int] | None = None
    capacity: int | None = None

    def check(self, rows: int | None = None) -> "Executor":
        """This, if its settings fit each other and a batch of so many rows; else a ``ValueError``."""
        check_choice("executor", self.name, EXECUTORS)
        if self.rungs is not None:
            if self.name != "ladder":
                raise ValueError(
                    f"rungs={tuple(self.rungs)} are of executor='ladder', not {self.name!r}. Leave them out."
                )
            check_ladder(self.rungs, argument="rungs")
        if (self.capacity is None) == (self.name == "capacity"):
            raise ValueError(
                f"capacity={self.capacity} with executor={self.name!r}: give a capacity to 'capacity', and to no other."
            )
        if self.capacity is not None:
            hint = "A block that never runs is a gate that is always closed."
            check_number("capacity", self.capacity, low=1, integer=True, hint=hint)
        if self.name == "cond" and rows not in (None, 1):
            raise ValueError(f"executor='cond' takes a batch of one, and x has {rows} rows. Use 'ladder', or 'map'.")
        return self


class ResidualBlock(NamedTuple):
    r"""A residual block as functions, of any library.

    .. math:: y = a(c(x) + s\, u(x)), \qquad \text{or with whole: } y = a((1 - s)\, c(x) + s\, u(x))

    with s the gate of an example; s = 0 leaves a(c(x)), and u is not run.

    Attributes:
      branch: u, ``(params, x) -> array``, the residual function; with ``whole`` all of the block.
      gate: ``(gate_params, x) -> gates [rows]`` in [0, 1], float32; with ``key=`` where it draws. None for a block that
        always runs.
      shortcut: c, ``(params, x) -> array``, always run; None for the identity.
      activation: a; None for none.
      whole: whether ``branch`` returns what the whole block does, its shortcut included.
    """

    branch: Callable[[PyTree, Any], Any]
    gate: Callable[..., Array] | None = None
    shortcut: Callable[[PyTree, Any], Any] | None = None
    activation: Callable[[Array], Array] | None = None
    whole: bool = False

    def merged(self, shortcut: Array, gate: Array | None, found: Array | None) -> Array:
        """a(c + s u) of some examples; without a gate s is 1, without the branch's answer 0."""
        if found is not None:
            if gate is not None:
                gate = gate.astype(found.dtype).reshape(gate.shape + (1,) * (found.ndim - 1))
                found = gate * found
                shortcut = (1 - gate) * shortcut if self.whole else shortcut
            shortcut = found if self.whole and gate is None else shortcut + found
        return shortcut if self.activation is None else self.activation(shortcut)


def run_block(
    block: ResidualBlock,
    params: PyTree,
    x: PyTree,
    gate: Float[Array | np.ndarray, "rows"],
    *,
    executor: Executor | str = "ladder",
) -> tuple[Array, Bool[Array, "rows"]]:
    """Run a block on the examples whose gate is open.

    All executors agree, but for the order of floating-point operations in batches of other sizes, and for ``capacity``,
    where of more open gates than places the largest are served. Only there does an example depend on its batch.

    Args:
      block: the functions.
      params: of the branch and the shortcut.
      x: a batch: an array, or a tree of arrays whose first axes are the rows.
      gate: s of every example, 0 where it is closed. NaN counts as open, so that it shows.
      executor: an ``Executor``, or the name of one.

    Returns:
      The block's output, and which examples were served by its branch.

    Raises:
      ValueError: shapes that do not fit, settings that do not fit, or a ladder under ``vmap``.

    Example:
      >>> block = ResidualBlock(lambda params, x: params * x)
      >>> y, served = run_block(block, 2.0, jnp.array([[1.0], [10.0]]), jnp.array([0.0, 0.5]))
      >>> y.ravel().tolist(), served.tolist()
      ([1.0, 20.0], [False, True])
    """
    x, gate = jax.tree.map(jnp.asarray, x), wide(gate)
    check_shape("gate", gate, (gate.size,), "One number for each row.")
    rows = gate.shape[0]
    for leaf in jax.tree.leaves(x):
        if leaf.shape[:1] != (rows,):
            raise ValueError(f"gate has {rows} rows and x has shape {leaf.shape}: give one gate for each row of x.")
    how = (executor if isinstance(executor, Executor) else Executor(executor)).check(rows)
    shortcut = x if block.shortcut is None else block.shortcut(params, x)
    request = ~(gate <= 0)
    _check_branch(block, params, x, shortcut)
    if not rows:
        return block.merged(shortcut, None, None), request
    if how.name == "masked":
        return block.merged(shortcut, gate, block.branch(params, x)), request
    if how.name == "cond":
        return _cond(block, params, x, shortcut, gate), request
    if how.name == "map":
        alone = lambda row: jax.tree.map(lambda leaf: leaf[None], row)
        return jax.lax.map(lambda row: _cond(block, params, *alone(row))[0], (x, shortcut, gate)), request
    # Where the shortcut is an input it is gathered once.
    place = next((place for place, leaf in enumerate(jax.tree.leaves(x)) if leaf is shortcut), None)
    serve = functools.partial(_serve, block, place)
    operands = (params, x, shortcut if place is None else None, gate)
    if how.name == "capacity":
        return serve(request_slots(request, gate, capacity=how.capacity or 1), *operands)
    rungs = block_rungs(rows) if how.rungs is None else how.rungs
    return in_least_bucket(serve, request, *operands, buckets=rungs, caller="run_block", instead="executor='capacity'")


def block_rungs(rows: int) -> tuple[int, ...]:
    """The default ladder: eighths of a batch, rounded up to multiples of 8 from 64 rows on.

    Args:
      rows: of a batch.

    Returns:
      Increasing sizes; the last is ``rows``.

    Example:
      >>> block_rungs(4), block_rungs(32), block_rungs(256)
      ((1, 2, 3, 4), (4, 8, 12, 16, 20, 24, 28, 32), (32, 64, 96, 128, 160, 192, 224, 256))
    """
    multiple = 8 if rows >= 64 else 1
    sizes = {min(rows, _round_up(math.ceil(rows * part / 8), multiple)) for part in range(1, 9)}
    return tuple(sorted(sizes))


def fit_rungs(
    gates: Float[Array | np.ndarray, "rows blocks"], batch: int, count: int, *, multiple: int = 1, seed: int = 0
) -> tuple[int, ...]:
    """The ladder of at most ``count`` rungs that wastes least on gates as measured.

    Args:
      gates: of every block for many examples.
      batch: rows that are served together.
      count: most rungs; each is one more copy of the block in the program.
      multiple: every rung is a multiple of it.
      seed: of the order in which examples form batches.

    Returns:
      Increasing sizes; the last holds the fullest batch that was seen, and the batch itself is always in a ladder.

    Raises:
      ValueError: fewer rows than a batch.

    Example:
      >>> fit_rungs(np.tile([[1.0, 0.0], [0.0, 0.0]], (8, 1)), 4, 1)
      (3,)
    """
    check_number("batch", batch, low=1, integer=True)
    open_ = np.asarray(gates) > 0
    if len(open_) < batch:
        raise ValueError(f"gates hold {len(open_)} rows, less than one batch of {batch}. Measure more.")
    order = np.random.default_rng(seed).permutation(len(open_))
    whole = open_[order[: len(open_) // batch * batch]].reshape(-1, batch, open_.shape[1])
    counts = whole.sum(1).reshape(-1)
    distinct = len({_round_up(max(1, int(count)), multiple) for count in counts})
    return tuple(min(batch, rung) for rung in fit_ladder(counts.tolist(), min(count, distinct), multiple=multiple))


def _round_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _cond(block: ResidualBlock, params: PyTree, x: PyTree, shortcut: Array, gate: Array) -> Array:
    """A batch of one."""
    run = lambda params, x, shortcut, gate: block.merged(shortcut, gate, block.branch(params, x))
    skip = lambda params, x, shortcut, gate: block.merged(shortcut, None, None)
    return jax.lax.cond(gate[0] <= 0, skip, run, params, x, shortcut, gate)


def _serve(
    block: ResidualBlock, place: int | None, slots: Array, params: PyTree, x: PyTree, beside: Array | None, gate: Array
) -> tuple[Array, Array]:
    """The branch on gathered rows, its answers put in their places; the shortcut is a leaf of x, or ``beside``."""
    rows, size = gate.shape[0], slots.shape[0]
    of = lambda x, beside: beside if place is None else jax.tree.leaves(x)[place]
    shortcut = of(x, beside)
    skipped = block.merged(shortcut, None, None)
    nobody = jnp.zeros(rows, bool)
    if not size:
        return skipped, nobody
    served = nobody.at[slots].set(True, mode="drop")
    if size == rows:  # nothing to gather
        found = block.merged(shortcut, gate, block.branch(params, x))
        return jnp.where(served.reshape(rows, *(1,) * (found.ndim - 1)), found, skipped), served
    taken = jnp.where(slots < rows, slots, 0)  # what an empty place holds is dropped
    gathered, some = jax.tree.map(lambda leaf: leaf[taken], (beside, x))
    found = block.merged(of(some, gathered), gate[taken], block.branch(params, some))
    return skipped.at[slots].set(found.astype(skipped.dtype), mode="drop"), served


def _check_branch(block: ResidualBlock, params: PyTree, x: PyTree, shortcut: Array) -> None:
    found = jax.eval_shape(block.branch, params, x)
    if not hasattr(found, "shape") or found.shape != shortcut.shape:
        shape = getattr(found, "shape", type(found).__name__)
        raise ValueError(
            f"the branch returns {shape} and the shortcut {shortcut.shape}. Give a shortcut that changes the shape as "
            "the branch does."
        )
