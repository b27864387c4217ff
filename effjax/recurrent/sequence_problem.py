"""A recurrent network and its loss, and how a sequence is cut into parts."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import NoEffectWarning, check_choice, check_number
from effjax.core.tree import path_name, wide

__all__ = ["SequencePart", "SequenceProblem"]

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SequencePart:
    """The part of the sequence that a loss is asked for.

    Attributes:
      index: from 0; may be traced.
      count: all parts of the sequence, a short last one included.
      whole: those of full length.
      real: with ``seq_lengths``, bool ``[time, batch]``, True at the steps of this part that are not padding, and False
        behind the end of each sequence; of a ``terminal`` problem bool ``[batch]``, at the part's last step. Else None.
    """

    index: Int[Array, ""] | int = 0
    count: int = dataclasses.field(default=1, metadata={"static": True})
    whole: int = dataclasses.field(default=1, metadata={"static": True})
    real: Bool[Array, "..."] | None = None

    @property
    def progress(self) -> Float[Array, ""]:
        """``(index + 1) / count``, 1 in the last part."""
        return jnp.asarray(self.index + 1, float) / self.count


@dataclasses.dataclass(frozen=True)
class SequenceProblem:
    """A recurrent network and its loss, as ``fptt_step``, ``fptt_online``, ``bptt_step`` and ``tbptt_step`` take them.

    Attributes:
      cell: ``(params, carry, x) -> (carry, out)``, one step in time; pure, for a whole batch. Of a Linen cell it is
        ``lambda params, carry, x: cell.apply({"params": params}, carry, x)``, of ``effjax.models.LSTMCell(...)`` and
        the other cells here ``lstm.advance``, with ``encode=lstm.project``.
      loss: ``(params, outs, targets, part) -> scalar``, or ``(scalar, aux)``, of one part. Without ``terminal``,
        ``outs`` and ``targets`` are stacked over the part's steps; with it, ``outs`` is the last step's and ``targets``
        come whole. ``part`` is a ``SequencePart``. A read-out is best computed here, from ``params``, for all steps at
        once.
      encode: ``(params, xs) -> xs``, for all steps of a part at once before the cell runs: an embedding, or the input's
        matrix products.
      terminal: whether the sequence has one target, and each part is asked for it: see ``fptt_terminal_loss``; for a
        number to predict, multiply its loss by ``part.progress``. Of such weighted losses only the last row of the
        metrics compares between ``fptt_step`` and ``bptt_step``.
      has_aux: whether the loss returns ``aux``; the same shapes in every part.
      time_axis: where time stands in ``xs`` (and in ``targets`` without ``terminal``): 0, or 1 for ``[batch, T, ...]``.
        Such arrays are turned part by part, never as a whole; ``cell``, ``encode`` and ``loss`` see time first.
      unroll: steps of the inner loop per iteration, see ``jax.lax.scan``.

    Raises:
      ValueError: another ``time_axis``, ``unroll`` below 1.

    Example:
      >>> from effjax.recurrent import bptt_step
      >>> import optax
      >>> cell = lambda w, h, x: (jnp.tanh(w * h + x),) * 2
      >>> loss = lambda w, outs, targets, part: jnp.mean((outs - targets) ** 2)
      >>> problem = SequenceProblem(cell, loss)
      >>> train, w, xs = bptt_step(problem, optax.sgd(0.1)), jnp.asarray(0.5), jnp.ones((5, 3))
      >>> state, w, h, metrics = train(optax.sgd(0.1).init(w), w, jnp.zeros(3), xs, xs)
      >>> h.shape
      (3,)
    """

    cell: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, PyTree, PyTree, SequencePart], Any]
    _: dataclasses.KW_ONLY
    encode: Callable[[PyTree, PyTree], PyTree] | None = None
    terminal: bool = False
    has_aux: bool = False
    time_axis: int = 0
    unroll: int = 1

    def __post_init__(self) -> None:
        check_choice("time_axis", self.time_axis, (0, 1))
        check_number("unroll", self.unroll, low=1, integer=True)

    def _time_first(self, tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: jnp.moveaxis(jnp.asarray(leaf), self.time_axis, 0), tree)

    def _inputs(self, params: PyTree, xs: PyTree) -> PyTree:
        return xs if self.encode is None else self.encode(params, xs)

    def _objective(
        self, params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, part: SequencePart
    ) -> tuple[Array, tuple[PyTree, PyTree]]:
        """The loss of one part, the carry at its end, and aux."""
        one = lambda carry, x: self.cell(params, carry, x)
        carry, outs = jax.lax.scan(one, carry, self._inputs(params, xs), unroll=self.unroll)
        if self.terminal:
            outs = jax.tree.map(lambda leaf: leaf[-1], outs)
        value = self.loss(params, outs, targets, part)
        value, aux = value if self.has_aux else (value, None)
        if jnp.shape(value) != ():
            raise ValueError(f"loss returned shape {jnp.shape(value)}; it must be one number, such as a mean.")
        return wide(value), (carry, aux)


def check_split(parts: int | None, part_length: int | None) -> None:
    if (parts is None) == (part_length is None):
        raise ValueError(
            f"parts={parts!r} and part_length={part_length!r}: give one of the two, the number of parts of a sequence "
            "or the steps in each."
        )
    if parts is not None:
        check_number("parts", parts, low=1, integer=True, hint="1 is the whole sequence at once.")
    else:
        check_number("part_length", part_length, low=1, integer=True)


class PartPlan(NamedTuple):
    """``whole`` parts of ``length`` steps, then one of ``rest`` steps where that is not 0."""

    length: int
    whole: int
    rest: int
    terminal: bool
    time_axis: int

    @property
    def parts(self) -> int:
        return self.whole + bool(self.rest)

    @property
    def weights(self) -> np.ndarray:
        """The share of each part in the steps."""
        steps = np.asarray([self.length] * self.whole + [self.rest] * bool(self.rest))
        return steps / steps.sum()

    def mean(self, losses: Float[Array, "parts"]) -> Float[Array, ""]:
        return jnp.sum(losses * jnp.asarray(self.weights, losses.dtype))


def plan_parts(
    problem: SequenceProblem, xs: PyTree, targets: PyTree, parts: int | None = None, part_length: int | None = None
) -> PartPlan:
    terminal, axis = problem.terminal, problem.time_axis
    timed = [("xs", xs)] if terminal else [("xs", xs), ("targets", targets)]
    lengths = {
        "/".join(filter(None, (name, path_name(path)))): jnp.shape(leaf)[axis : axis + 1]
        for name, tree in timed
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    total = next(iter(lengths.values()), ())
    if total in ((), (0,)) or any(other != total for other in lengths.values()):
        shown = ", ".join(f"{name} {size[0] if size else 'none'}" for name, size in lengths.items())
        raise ValueError(
            f"Axis {axis} must be time, of one length and at least one step, in every array; got {shown or '{}'}. "
            "By default time comes first: xs [T, batch, ...], and time_axis=1 takes [batch, T, ...]; a target for the "
            "whole sequence needs terminal=True."
        )
    steps = total[0]
    if parts is not None:
        check_number("parts", parts, low=1, high=steps, integer=True, hint=f"The sequence has {steps} steps.")
        part_length = steps // parts
    elif part_length is not None and part_length >= steps:
        warnings.warn(
            f"part_length={part_length}, but the sequence has {steps} steps: one part holds it all, and there is one "
            f"update. Choose part_length in [1, {steps - 1}].",
            NoEffectWarning,
            stacklevel=4,
        )
    length = min(part_length or steps, steps)
    return PartPlan(length, steps // length, steps % length, terminal, axis)


def over_parts(
    body: Callable[..., tuple[PyTree, PyTree]],
    state: PyTree,
    xs: PyTree,
    targets: PyTree,
    plan: PartPlan,
    *,
    remat: bool = False,
) -> tuple[PyTree, PyTree]:
    """``state, row = body(state, part, xs, targets)`` for all parts; the rows come back stacked."""

    def one(state: PyTree, index: Array, length: int) -> tuple[PyTree, PyTree]:
        # Slices of the whole: turning or reshaping all of it would copy it.
        def cut(leaf: Any) -> Array:
            piece = jax.lax.dynamic_slice_in_dim(jnp.asarray(leaf), index * plan.length, length, plan.time_axis)
            return jnp.moveaxis(piece, plan.time_axis, 0)

        own = targets if plan.terminal else jax.tree.map(cut, targets)
        return body(state, SequencePart(index, plan.parts, plan.whole), jax.tree.map(cut, xs), own)

    if remat:
        one = jax.checkpoint(one, static_argnums=2)
    state, rows = jax.lax.scan(
        lambda state, index: one(state, index, plan.length), state, jnp.arange(plan.whole), unroll=plan.whole == 1
    )
    if plan.rest:
        state, row = one(state, jnp.asarray(plan.whole), plan.rest)
        rows = jax.tree_util.tree_map_with_path(_append, rows, row)
    return state, rows


def _append(path: tuple[Any, ...], rows: Array, row: Array) -> Array:
    if rows.shape[1:] != row.shape:
        raise ValueError(
            f"{path_name(path)} has shape {rows.shape[1:]} in a full part and {row.shape} in the short last one. What "
            "the loss returns besides must not depend on the number of steps: reduce it over time."
        )
    return jnp.concatenate([rows, row[None]])


def check_carry(problem: SequenceProblem, params: PyTree, carry: PyTree, xs: PyTree) -> None:
    """The cell must hand on what it was given, or the next step, part or batch could not go on from it."""
    try:
        after = jax.eval_shape(lambda *args: first_step(problem, *args)[0], params, carry, xs)
    except Exception as error:
        error.add_note(f"This is the first step of the sequence, with carry {_kinds(carry)} and xs {_kinds(xs)}.")
        raise
    if _kinds(after) != _kinds(carry):
        raise ValueError(
            f"carry is {_kinds(carry)}, but the cell returns {_kinds(after)}. Start from a carry of the cell's own "
            "hidden size, batch and dtype."
        )


def first_step(problem: SequenceProblem, params: PyTree, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
    first = jax.tree.map(lambda leaf: leaf[0], problem._inputs(params, problem._time_first(xs)))
    return problem.cell(params, carry, first)


def _kinds(tree: PyTree) -> Any:
    def kind(leaf: Any) -> str:
        return f"{jnp.result_type(leaf).name}{list(jnp.shape(leaf))}"

    return jax.tree.map(kind, tree)
