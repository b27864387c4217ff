"""Training steps over long sequences: FPTT, BPTT and truncated BPTT for one description of network and loss."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.core.layers import check_lengths
from effjax.core.tree import wide
from effjax.recurrent.sequence_problem import (
    PartPlan,
    SequencePart,
    SequenceProblem,
    check_carry,
    check_split,
    first_step,
    over_parts,
    plan_parts,
)

__all__ = ["bptt_step", "fptt_online", "fptt_step", "tbptt_step"]

PyTree = Any
Train = Callable[..., tuple[PyTree, PyTree, PyTree, "PartMetrics"]]


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
    check_split(parts, part_length)

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
        plan = plan_parts(problem, xs, targets, parts, part_length)
        check_carry(problem, params, carry, xs)
        (state, params, last), metrics = over_parts(learn, (state, params, carry), xs, targets, plan)
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
            plan_parts(problem, xs, targets, parts=1)
            check_carry(problem, params, carry, xs)
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
    check_split(parts, part_length)

    def make(problem: SequenceProblem) -> Train:
        gradient = _whole_gradient(problem, remat)
        return _one_update(gradient, problem, tx, parts, part_length, recompute_state, skip_nonfinite)

    return _with_lengths(problem, make)


def _whole_gradient(problem: SequenceProblem, remat: bool) -> Callable[..., Any]:
    def gradient(params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, plan: PartPlan) -> tuple[Any, ...]:
        def total(params: PyTree) -> tuple[Array, Any]:
            def one(carry: PyTree, part: SequencePart, *data: PyTree) -> tuple[PyTree, PartMetrics]:
                xs, targets = data
                value, (carry, aux) = problem._objective(params, carry, xs, targets, part)
                return carry, PartMetrics(value, aux)

            last, metrics = over_parts(one, carry, xs, targets, plan, remat=remat)
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
    check_split(parts, part_length)

    def make(problem: SequenceProblem) -> Train:
        gradient = _truncated_gradient(problem)
        return _one_update(gradient, problem, tx, parts, part_length, recompute_state, skip_nonfinite)

    return _with_lengths(problem, make)


def _truncated_gradient(problem: SequenceProblem) -> Callable[..., Any]:
    part_gradient = jax.value_and_grad(problem._objective, has_aux=True)

    def gradient(params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, plan: PartPlan) -> tuple[Any, ...]:
        weights = jnp.asarray(plan.weights)

        def one(
            state: tuple[PyTree, PyTree], part: SequencePart, *data: PyTree
        ) -> tuple[tuple[PyTree, PyTree], PartMetrics]:
            total, carry = state
            (value, (carry, aux)), grads = part_gradient(params, carry, *data, part)
            total = jax.tree.map(lambda t, g: t + weights[part.index].astype(t.dtype) * g, total, grads)
            return (total, carry), PartMetrics(value, aux)

        zeros = jax.tree.map(lambda p: jnp.zeros_like(wide(p)), params)
        (total, last), metrics = over_parts(one, (zeros, carry), xs, targets, plan)
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
        plan_parts(problem, xs, targets, parts=1)
        check_carry(problem, params, carry, xs)
        shape = jnp.shape(jax.tree.leaves(xs)[0])
        lengths = check_lengths(seq_lengths, shape[1 - problem.time_axis], shape[problem.time_axis])
        out = jax.eval_shape(lambda *args: first_step(problem, *args)[1], params, carry, xs)
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
        plan = plan_parts(problem, xs, targets, parts, part_length)
        check_carry(problem, params, carry, xs)
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


def _rerun(
    problem: SequenceProblem, params: PyTree, carry: PyTree, xs: PyTree, targets: PyTree, plan: PartPlan
) -> PyTree:
    """The carry after the whole sequence, part by part so that ``encode`` never sees all of it."""

    def forward(carry: PyTree, part: SequencePart, xs: PyTree, targets: PyTree) -> tuple[PyTree, None]:
        del part, targets
        return jax.lax.scan(
            lambda carry, x: (problem.cell(params, carry, x)[0], None), carry, problem._inputs(params, xs)
        )

    return over_parts(forward, carry, xs, targets, plan)[0]
