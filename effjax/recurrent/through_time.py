"""Training steps over long sequences: FPTT, BPTT and truncated BPTT for one description of network and loss."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import NoEffectWarning, check_choice, check_number
from effjax.core.layers import check_lengths
from effjax.core.tree import path_name, wide

__all__ = ["SequencePart", "SequenceProblem", "bptt_step", "fptt_online", "fptt_step", "tbptt_step"]

PyTree = Any
Train = Callable[..., tuple[PyTree, PyTree, PyTree, "PartMetrics"]]


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


class PartMetrics(NamedTuple):
    """What a training step over a sequence reports, one row per part; ``fptt_online`` gives a single row.

    Attributes:
      loss: the parts' losses, each at the parameters that it was computed with.
      aux: what the loss returned besides, stacked; None without ``has_aux``.
      skipped: with ``skip_nonfinite``, the parts (of ``bptt_step`` and ``tbptt_step``: the sequence) that were left
        out; else None.
    """

    loss: Float[Array, "*parts"]
    aux: PyTree = None
    skipped: Bool[Array, "*parts"] | None = None


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


def fptt_step(
    problem: SequenceProblem,
    tx: optax.GradientTransformation,
    *,
    parts: int | None = None,
    part_length: int | None = None,
    recompute_state: bool = False,
    skip_nonfinite: bool = False,
) -> Train:
    r"""A training step over a sequence that updates the parameters in every part of it: FPTT(K).

    For each part p, in order, from the carry :math:`h` that the part before left behind (as a constant):

    .. math::
        g = \nabla_W\, \ell_p(W; h), \qquad W \leftarrow W + u(g), \qquad h \leftarrow h_p(W_{old})

    so that backpropagation reaches to the start of the part only, and memory grows with the length of a part, not with
    that of the sequence. With ``tx = effjax.fptt(base)`` this is FPTT; with a plain optimizer it is truncated BPTT with
    an update in every part, which on many tasks does as well. Dependencies longer than a part are learnt as far as the
    carry happens to hold them.

    The work is that of BPTT plus an optimizer update per part; what it saves is memory. Jit the result, and donate
    ``state``, ``params`` and ``carry``::

        train = jax.jit(fptt_step(problem, tx, parts=10), donate_argnums=(0, 1, 2))
        state, params, carry, metrics = train(state, params, carry, xs, targets)

    Args:
      problem: network and loss.
      tx: the optimizer; ``update`` receives the loss as ``value``.
      parts: K; short for ``part_length=T // K``.
      part_length: steps in a part. What is left of T is one more, shorter part, as in the authors' program: 784 steps
        in 10 parts are ten of 78 and one of 4. Nothing is padded or left out.
      recompute_state: return the carry of one more pass over the whole sequence with the final parameters, as the
        authors' language models do, instead of the last part's. Forward only, in the memory of one part.
      skip_nonfinite: leave parameters, optimizer and carry as they were before a part whose loss, gradient or carry
        is not finite. Otherwise a NaN spreads to all that follows, and shows in the metrics.

    Returns:
      ``(state, params, carry, xs, targets, *, seq_lengths=None) -> (state, params, carry, metrics)``, with the
      optimizer's state first. ``metrics`` has a ``loss`` per part, ``aux`` and ``skipped``. With ``seq_lengths``,
      integers ``[batch]``, carry and output of a sequence stay as they are at its end: a ``terminal`` loss is asked for
      the output there, in every later part too, and any other loss finds the steps that count in ``part.real``.

    Raises:
      ValueError: none or both of ``parts`` and ``part_length``, or below 1; when called, more parts than steps, time
        axes of unlike length, a carry of another structure, shape or dtype than the cell's, a loss that is no scalar.

    Warns:
      NoEffectWarning: ``part_length`` holds the whole sequence.

    Example:
      >>> cell = lambda w, h, x: (jnp.tanh(w * h + x),) * 2
      >>> loss = lambda w, out, y, part: part.progress * jnp.mean((out - y) ** 2)
      >>> train = fptt_step(SequenceProblem(cell, loss, terminal=True), optax.sgd(0.1), parts=2)
      >>> w, h, xs, y = jnp.asarray(0.5), jnp.zeros(3), jnp.ones((5, 3)), jnp.zeros(3)
      >>> _, w, h, metrics = train(optax.sgd(0.1).init(w), w, h, xs, y)
      >>> metrics.loss.shape  # 2 + 2 + 1 steps
      (3,)

    Kag, Saligrama 2021 (ICML, PMLR 139:5189-5200); with ``part_length=1`` the form of Yin, Corradi, Bohte 2023
    (arXiv 2112.11231) for spiking cells. Not copied from the authors' programs: the add task's weight
    ``p + 1/K`` (meant is ``part.progress``) and its untrained last part, and a hidden state advanced several times on
    one part where an update is repeated.
    """
    _check_split(parts, part_length)

    def make(problem: SequenceProblem) -> Train:
        return _fptt(problem, tx, parts, part_length, recompute_state, skip_nonfinite)

    return _with_lengths(problem, make)


def _fptt(
    problem: SequenceProblem,
    tx: optax.GradientTransformation,
    parts: int | None,
    part_length: int | None,
    recompute_state: bool,
    skip_nonfinite: bool,
) -> Train:
    learn = _learner(problem, tx, skip_nonfinite)

    def train(
        state: PyTree, params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, PartMetrics]:
        plan = _plan(problem, xs, targets, parts, part_length)
        _check_carry(problem, params, carry, xs)
        (state, params, last), metrics = _over_parts(learn, (state, params, carry), xs, targets, plan)
        if recompute_state:
            again = _rerun(problem, params, carry, xs, targets, plan)
            last = _choose(_all_finite(again), again, last) if skip_nonfinite else again
        return state, params, last, metrics

    return train


def fptt_online(
    problem: SequenceProblem, tx: optax.GradientTransformation, *, skip_nonfinite: bool = False
) -> Callable[..., tuple[PyTree, PyTree, PyTree, PartMetrics]]:
    """A training step over one part of a stream: ``fptt_step`` for data that arrive while the model learns.

    The caller keeps the carry from call to call and nothing else; parts may differ in length, each length compiles
    once. The loss is that before the part's update: tested, then trained on. Calling it on the parts of a sequence
    gives what ``fptt_step`` gives on the whole.

    Args:
      problem: network and loss.
      tx: the optimizer; ``update`` receives the loss as ``value``.
      skip_nonfinite: as in ``fptt_step``.

    Returns:
      ``(state, params, carry, xs, targets, *, part=SequencePart(), seq_lengths=None) -> (state, params, carry,
      metrics)``, with scalars in ``metrics``. ``part`` goes to the loss; by default there is but one. ``seq_lengths``
      are the steps of each sequence that are real in this call, 0 for one that has ended before; its carry stays.

    Raises:
      ValueError: when called, as ``fptt_step``; ``seq_lengths`` with a ``terminal`` problem, as the output at the end
        of a sequence is not kept from call to call.

    Example:
      >>> cell = lambda w, h, x: (jnp.tanh(w * h + x),) * 2
      >>> loss = lambda w, outs, targets, part: jnp.mean((outs - targets) ** 2)
      >>> learn = fptt_online(SequenceProblem(cell, loss), optax.sgd(0.1))
      >>> w, h = jnp.asarray(0.5), jnp.zeros(3)
      >>> state = optax.sgd(0.1).init(w)
      >>> for _ in range(4):
      ...     state, w, h, metrics = learn(state, w, h, jnp.ones((2, 3)), jnp.zeros((2, 3)))
      >>> metrics.loss.shape
      ()
    """

    def make(problem: SequenceProblem) -> Train:
        learn = _learner(problem, tx, skip_nonfinite)

        def train(
            state: PyTree, params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, *, part: SequencePart
        ) -> tuple[PyTree, PyTree, PyTree, PartMetrics]:
            _plan(problem, xs, targets, parts=1)
            _check_carry(problem, params, carry, xs)
            targets = targets if problem.terminal else problem._time_first(targets)
            end, metrics = learn((state, params, carry), part, problem._time_first(xs), targets)
            return *end, metrics

        return train

    step = _with_lengths(problem, make)

    def train(
        state: PyTree,
        params: PyTree,
        carry: PyTree,
        xs: PyTree,
        targets: PyTree,
        *,
        part: SequencePart | None = None,
        seq_lengths: Any = None,
    ) -> tuple[PyTree, PyTree, PyTree, PartMetrics]:
        if problem.terminal and seq_lengths is not None:
            raise ValueError(
                "seq_lengths with terminal=True: the output at the end of a sequence is not kept from call to call. "
                "Give fptt_step whole sequences, or keep the output in the cell's carry."
            )
        part = SequencePart() if part is None else part
        return step(state, params, carry, xs, targets, seq_lengths=seq_lengths, part=part)

    return train


def bptt_step(
    problem: SequenceProblem,
    tx: optax.GradientTransformation,
    *,
    parts: int | None = None,
    part_length: int | None = None,
    recompute_state: bool = False,
    skip_nonfinite: bool = False,
    remat: bool = False,
) -> Train:
    r"""A training step by backpropagation through the whole sequence, with one update: the baseline of ``fptt_step``.

    .. math:: g = \nabla_W \textstyle\sum_p (n_p / T)\, \ell_p(W)

    with :math:`n_p` the steps of part p, so that a loss that averages over steps is averaged over all T.

    Args:
      problem: network and loss.
      tx: the optimizer; ``update`` receives the mean loss as ``value``.
      parts: losses per sequence; by default 1, at its end. More are FPTT's intermediate losses without its updates.
      part_length: as in ``fptt_step``.
      recompute_state: as in ``fptt_step``.
      skip_nonfinite: leave all as it was where a loss, the gradient or the carry is not finite.
      remat: keep only the carries between parts and compute each part twice: the exact gradient in memory that grows
        with T / K + K, least at K near the root of T. What to compare ``fptt_step`` with where a sequence fits so.

    Returns:
      A function as that of ``fptt_step``.

    Raises:
      ValueError: as ``fptt_step``; ``remat`` with one part.

    Example:
      >>> cell = lambda w, h, x: (jnp.tanh(w * h + x),) * 2
      >>> loss = lambda w, out, y, part: jnp.mean((out - y) ** 2)
      >>> train = bptt_step(SequenceProblem(cell, loss, terminal=True), optax.sgd(0.1))
      >>> w, h, xs, y = jnp.asarray(0.5), jnp.zeros(3), jnp.ones((5, 3)), jnp.zeros(3)
      >>> train(optax.sgd(0.1).init(w), w, h, xs, y)[3].loss.shape
      (1,)
    """
    parts = 1 if parts is part_length is None else parts
    if remat and parts == 1:
        raise ValueError("remat=True with one part would save nothing. Give parts near the root of the length.")
    _check_split(parts, part_length)

    def make(problem: SequenceProblem) -> Train:
        gradient = _whole_gradient(problem, remat)
        return _one_update(gradient, problem, tx, parts, part_length, recompute_state, skip_nonfinite)

    return _with_lengths(problem, make)


def _whole_gradient(problem: SequenceProblem, remat: bool) -> Callable[..., Any]:
    def gradient(params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, plan: _Plan) -> tuple[Any, ...]:
        def total(params: PyTree) -> tuple[Array, Any]:
            def one(carry: PyTree, part: SequencePart, *data: PyTree) -> tuple[PyTree, PartMetrics]:
                xs, targets = data
                value, (carry, aux) = problem._objective(params, carry, xs, targets, part)
                return carry, PartMetrics(value, aux)

            last, metrics = _over_parts(one, carry, xs, targets, plan, remat=remat)
            return plan.mean(metrics.loss), (last, metrics)

        (_, (last, metrics)), grads = jax.value_and_grad(total, has_aux=True)(params)
        return grads, last, metrics

    return gradient


def tbptt_step(
    problem: SequenceProblem,
    tx: optax.GradientTransformation,
    *,
    parts: int | None = None,
    part_length: int | None = None,
    recompute_state: bool = False,
    skip_nonfinite: bool = False,
) -> Train:
    r"""A training step by truncated backpropagation through time, with one update per sequence.

    .. math:: g = \textstyle\sum_p (n_p / T)\, \nabla_W\, \ell_p(W; h_{p-1})

    with the carries between parts as constants. It stands between its neighbours: ``bptt_step`` has the exact gradient
    of the same losses, ``fptt_step`` an update for each part's. Memory is that of ``fptt_step``.

    Args:
      problem: network and loss.
      tx: the optimizer; ``update`` receives the mean loss as ``value``.
      parts: as in ``fptt_step``.
      part_length: as in ``fptt_step``.
      recompute_state: as in ``fptt_step``.
      skip_nonfinite: leave all as it was where a loss, the gradient or the carry is not finite.

    Returns:
      A function as that of ``fptt_step``.

    Raises:
      ValueError: as ``fptt_step``.

    Example:
      >>> cell = lambda w, h, x: (jnp.tanh(w * h + x),) * 2
      >>> loss = lambda w, outs, targets, part: jnp.mean((outs - targets) ** 2)
      >>> train = tbptt_step(SequenceProblem(cell, loss), optax.sgd(0.1), part_length=2)
      >>> w, h, xs = jnp.asarray(0.5), jnp.zeros(3), jnp.ones((5, 3))
      >>> train(optax.sgd(0.1).init(w), w, h, xs, xs)[3].loss.shape
      (3,)
    """
    _check_split(parts, part_length)

    def make(problem: SequenceProblem) -> Train:
        gradient = _truncated_gradient(problem)
        return _one_update(gradient, problem, tx, parts, part_length, recompute_state, skip_nonfinite)

    return _with_lengths(problem, make)


def _truncated_gradient(problem: SequenceProblem) -> Callable[..., Any]:
    part_gradient = jax.value_and_grad(problem._objective, has_aux=True)

    def gradient(params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, plan: _Plan) -> tuple[Any, ...]:
        weights = jnp.asarray(plan.weights)

        def one(
            state: tuple[PyTree, PyTree], part: SequencePart, *data: PyTree
        ) -> tuple[tuple[PyTree, PyTree], PartMetrics]:
            total, carry = state
            (value, (carry, aux)), grads = part_gradient(params, carry, *data, part)
            total = jax.tree.map(lambda t, g: t + weights[part.index].astype(t.dtype) * g, total, grads)
            return (total, carry), PartMetrics(value, aux)

        zeros = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
        (total, last), metrics = _over_parts(one, (zeros, carry), xs, targets, plan)
        return jax.tree.map(lambda t, p: t.astype(p.dtype), total, params), last, metrics

    return gradient


class _Ended(NamedTuple):
    """A carry that stays as it is at the end of each sequence, with what that takes."""

    carry: PyTree
    out: PyTree
    time: Int[Array, ""]
    lengths: Int[Array, "batch"]


def _with_lengths(problem: SequenceProblem, make: Callable[[SequenceProblem], Train]) -> Train:
    """The step that ``make`` gives, which takes ``seq_lengths`` too."""
    plain = make(problem)
    ended = make(_ending(problem))

    def train(
        state: PyTree,
        params: PyTree,
        carry: PyTree,
        xs: PyTree,
        targets: PyTree,
        *,
        seq_lengths: Any = None,
        **more: Any,
    ) -> tuple[PyTree, PyTree, PyTree, PartMetrics]:
        if seq_lengths is None:
            return plain(state, params, carry, xs, targets, **more)
        _plan(problem, xs, targets, parts=1)
        _check_carry(problem, params, carry, xs)
        shape = jnp.shape(jax.tree.leaves(xs)[0])
        lengths = check_lengths(seq_lengths, shape[1 - problem.time_axis], shape[problem.time_axis])
        out = jax.eval_shape(lambda *args: _first_step(problem, *args)[1], params, carry, xs)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out)
        start = _Ended(carry, zeros, jnp.zeros((), jnp.int32), lengths)
        state, params, last, metrics = ended(state, params, start, xs, targets, **more)
        return state, params, last.carry, metrics

    return train


def _ending(problem: SequenceProblem) -> SequenceProblem:
    """The problem with a carry of ``_Ended``, whose loss is told the steps that are real."""

    def cell(params: PyTree, state: _Ended, x: PyTree) -> tuple[_Ended, tuple[PyTree, Array]]:
        carry, out = problem.cell(params, state.carry, x)
        real = state.time < state.lengths
        keep = lambda new, old: jnp.where(real.reshape(-1, *[1] * (jnp.ndim(new) - 1)), new, old)
        out = jax.tree.map(keep, out, state.out)
        return _Ended(jax.tree.map(keep, carry, state.carry), out, state.time + 1, state.lengths), (out, real)

    def loss(params: PyTree, outs: tuple[PyTree, Array], targets: PyTree, part: SequencePart) -> Any:
        return problem.loss(params, outs[0], targets, dataclasses.replace(part, real=outs[1]))

    return dataclasses.replace(problem, cell=cell, loss=loss)


def _check_split(parts: int | None, part_length: int | None) -> None:
    if (parts is None) == (part_length is None):
        raise ValueError(
            f"parts={parts!r} and part_length={part_length!r}: give one of the two, the number of parts of a sequence "
            "or the steps in each."
        )
    if parts is not None:
        check_number("parts", parts, low=1, integer=True, hint="1 is the whole sequence at once.")
    else:
        check_number("part_length", part_length, low=1, integer=True)


class _Plan(NamedTuple):
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


def _plan(
    problem: SequenceProblem, xs: PyTree, targets: PyTree, parts: int | None = None, part_length: int | None = None
) -> _Plan:
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
    return _Plan(length, steps // length, steps % length, terminal, axis)


def _over_parts(
    body: Callable[..., tuple[PyTree, PyTree]],
    state: PyTree,
    xs: PyTree,
    targets: PyTree,
    plan: _Plan,
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


def _learner(problem: SequenceProblem, tx: optax.GradientTransformation, skip_nonfinite: bool) -> Callable[..., Any]:
    """``((state, params, carry), part, xs, targets) -> ((state, params, carry), metrics)``: one update."""
    tx = optax.with_extra_args_support(tx)
    gradient = jax.value_and_grad(problem._objective, has_aux=True)

    def learn(
        before: tuple[PyTree, PyTree, PyTree], part: SequencePart, xs: PyTree, targets: PyTree
    ) -> tuple[tuple[PyTree, PyTree, PyTree], PartMetrics]:
        state, params, carry = before
        (value, (end, aux)), grads = gradient(params, carry, xs, targets, part)
        after = (*_updated(tx, grads, state, params, value), end)
        if not skip_nonfinite:
            return after, PartMetrics(value, aux)
        sound = _all_finite((value, grads, end))
        return _choose(sound, after, before), PartMetrics(value, aux, ~sound)

    return learn


def _one_update(
    gradient: Callable[..., Any],
    problem: SequenceProblem,
    tx: optax.GradientTransformation,
    parts: int | None,
    part_length: int | None,
    recompute_state: bool,
    skip_nonfinite: bool,
) -> Train:
    tx = optax.with_extra_args_support(tx)

    def train(
        state: PyTree, params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree
    ) -> tuple[PyTree, PyTree, PyTree, PartMetrics]:
        plan = _plan(problem, xs, targets, parts, part_length)
        _check_carry(problem, params, carry, xs)
        grads, end, metrics = gradient(params, carry, xs, targets, plan)
        value = plan.mean(metrics.loss)
        after = _updated(tx, grads, state, params, value)
        last = _rerun(problem, after[1], carry, xs, targets, plan) if recompute_state else end
        after = (*after, last)
        if skip_nonfinite:
            sound = _all_finite((value, grads, end))
            after = _choose(sound, after, (state, params, carry))
            metrics = metrics._replace(skipped=~sound)
        return *after, metrics

    return train


def _updated(
    tx: optax.GradientTransformationExtraArgs, grads: PyTree, state: PyTree, params: PyTree, value: Array
) -> tuple[PyTree, PyTree]:
    updates, state = tx.update(grads, state, params, value=value)
    return state, optax.apply_updates(params, updates)


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return jnp.stack([jnp.asarray(True), *(jnp.isfinite(leaf).all() for leaf in leaves)]).all()


def _choose(condition: Bool[Array, ""], on_true: PyTree, on_false: PyTree) -> PyTree:
    # A scalar condition, never broadcast, goes with every sharding.
    return jax.tree.map(lambda a, b: jax.lax.select(condition, a, b), on_true, on_false)


def _rerun(problem: SequenceProblem, params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, plan: _Plan) -> PyTree:
    """The carry after the whole sequence, part by part so that ``encode`` never sees all of it."""

    def forward(carry: PyTree, part: SequencePart, xs: PyTree, targets: PyTree) -> tuple[PyTree, None]:
        del part, targets
        return jax.lax.scan(
            lambda carry, x: (problem.cell(params, carry, x)[0], None), carry, problem._inputs(params, xs)
        )

    return _over_parts(forward, carry, xs, targets, plan)[0]


def _check_carry(problem: SequenceProblem, params: PyTree, carry: PyTree, xs: PyTree) -> None:
    """The cell must hand on what it was given, or the next step, part or batch could not go on from it."""
    try:
        after = jax.eval_shape(lambda *args: _first_step(problem, *args)[0], params, carry, xs)
    except Exception as error:
        error.add_note(f"This is the first step of the sequence, with carry {_kinds(carry)} and xs {_kinds(xs)}.")
        raise
    if _kinds(after) != _kinds(carry):
        raise ValueError(
            f"carry is {_kinds(carry)}, but the cell returns {_kinds(after)}. Start from a carry of the cell's own "
            "hidden size, batch and dtype."
        )


def _first_step(problem: SequenceProblem, params: PyTree, carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
    first = jax.tree.map(lambda leaf: leaf[0], problem._inputs(params, problem._time_first(xs)))
    return problem.cell(params, carry, first)


def _kinds(tree: PyTree) -> Any:
    def kind(leaf: Any) -> str:
        return f"{jnp.result_type(leaf).name}{list(jnp.shape(leaf))}"

    return jax.tree.map(kind, tree)
