"""SAMUEL with one parameter set: candidate rates scored by forward passes, for somebody else's loop."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt

from effjax.core.errors import check_choice, check_number
from effjax.core.stacked import replicated
from effjax.core.tree import wide
from effjax.optim.expert_weights import WeightRule, check_concrete, check_rates, draw, log_probabilities, raw_key

__all__ = ["samuel_one_gradient"]

PyTree = Any

# Log-weights stay this close to the best one, so that a rate that lost, or diverged, can come back.
_FLOOR = 30.0
# What an evaluation changes.
_CHOICE = ("evaluations", "log_weights", "learning_rate", "spread", "start", "followed")


class SamuelOneGradientState(NamedTuple):
    """State of ``samuel_one_gradient``.

    Attributes:
      count: int32, steps taken.
      evaluations: int32, how often the candidates were scored.
      key: raw PRNG key of the draws; never changes, as a draw comes from the key and ``evaluations``.
      log_weights: one row per meta rate, one column per candidate.
      learning_rate: the rate in use.
      spread: running mean square of the losses' spread, see ``samuel``.
      displacement: sum of the base's updates, at rate 1, since the last evaluation.
      start: sum of the parameters' numbers at the last evaluation.
      followed: 1 where the parameters have moved since the evaluation before by the updates; else the ratio of the two,
        as something after this transformation changes its updates.
      inner: the base optimizer's state.
    """

    count: Int[Array, ""]
    evaluations: Int[Array, ""]
    key: UInt[Array, "words"]
    log_weights: Float[Array, "rates candidates"]
    learning_rate: Float[Array, ""]
    spread: Float[Array, ""]
    displacement: PyTree
    start: Float[Array, ""]
    followed: Float[Array, ""]
    inner: PyTree


def samuel_one_gradient(
    base: Callable[[Any], optax.GradientTransformation],
    learning_rates: Sequence[float] | ArrayLike,
    *,
    every: int = 10,
    select: str = "argmax",
    discount: ArrayLike = 1.0,
    meta_rates: Sequence[float] | ArrayLike = (0.5, 0.25, 0.125, 0.0625),
    eta_scale: ArrayLike = 20.0,
    normalize: bool = True,
    spread_decay: ArrayLike = 0.9,
    loss_clip: ArrayLike | None = 10.0,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Choose the learning rate during the run, among candidates that are scored by forward passes only.

    The base runs at rate 1 and gives directions :math:`d_t`; the parameters move by :math:`\gamma d_t`. Every n steps,
    before the step, each rate is scored by where it would have led, on a batch that none of the directions has seen:

    .. math::
        L_e = \ell_t\Bigl(P_t + (\gamma_e - \gamma) \sum_{i=t-n}^{t-1} d_i\Bigr), \qquad
        \log w_{qe} \leftarrow \delta \log w_{qe} - \eta_q L_e / s, \qquad
        p_e \propto \textstyle\sum_q w_{qe}

    and the most probable rate (or a drawn one) becomes :math:`\gamma`; :math:`\eta_q` and s are those of ``samuel``. It
    costs one buffer as large as the parameters and E forward passes in n steps. It stands outermost: what follows it in
    a chain would move the parameters where no candidate was scored (``state.followed`` is then not 1). The loop passes
    the loss of the batch at hand as a function of the parameters, as for Optax's line searches::

        updates, state = tx.update(grads, state, params, value_fn=lambda p: loss(p, batch))

    Scores over n steps are short-sighted: near the noise floor a smaller rate always looks better than it is, because
    the price of slow progress lies beyond them. Scores over a single step are more so, and forgetting old scores
    (``discount`` below 1) gives that bias its way. Give rates that could all be left on: factors of two or three
    around a sensible one, rather than decades.

    Args:
      base: ``learning_rate -> GradientTransformation`` whose update is proportional to the rate (SGD with momentum,
        Adam, AdamW, ...: checked by ``init`` on a few numbers).
      learning_rates: two or more candidates; their median is used until the first evaluation.
      every: steps between two evaluations, n.
      select: ``'argmax'`` or ``'sample'``.
      discount: what old log-weights are multiplied by at an evaluation.
      meta_rates: step sizes of the weights, all used at once.
      eta_scale: factor of ``meta_rates``.
      normalize: divide loss differences by their running spread.
      spread_decay: forgetting factor of that spread per evaluation.
      loss_clip: losses count as at most this far above the least one, in units of s. None: no limit.
      seed: seed of the draws, or a PRNG key.

    Returns:
      A transformation; ``optax.tree.get(state, "learning_rate")`` is the rate of the step taken.

    Raises:
      ValueError: fewer than two rates, or rates not positive or not distinct; other arguments out of range; at
        ``init``, a base that is not proportional to its rate; at ``update``, no ``value_fn``; parameters masked by
        ``optax.partition`` or ``optax.masked``; a state under ``vmap``.

    Warns:
      UserWarning: outside ``jit``, where the parameters have not moved by the updates.

    Example:
      >>> tx = samuel_one_gradient(optax.sgd, (0.4, 0.1, 0.025), every=2)
      >>> loss = lambda w: ((w - 1.0) ** 2).sum()
      >>> w = jnp.zeros(3)
      >>> state = tx.init(w)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w, value_fn=loss)
      ...     w = optax.apply_updates(w, updates)
      >>> round(optax.tree.get(state, "learning_rate").item(), 3)
      0.4

    A variant of Lu, Xia, Arora, Hazan 2022 (arXiv 2203.01400), not in the paper: there every expert trains its own
    network. Weights are never reset, but stay within a factor of e^30 of the largest.
    """
    if isinstance(base, optax.GradientTransformation) or not callable(base):
        raise TypeError(
            f"base={base!r} must be a function of the learning rate, such as optax.adam or lambda rate: "
            "optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(rate)): the rate inside a finished "
            "transformation would multiply every candidate."
        )
    rates = check_rates("learning_rates", learning_rates)
    if len(rates) < 2:
        raise ValueError(f"learning_rates={rates!r} leave nothing to choose from. Give two rates or more.")
    check_number("every", every, low=1, integer=True)
    check_choice("select", select, ("argmax", "sample"))
    check_concrete("discount", discount, low=0.0, high=1.0, open_low=True)
    rule = WeightRule.make(meta_rates, eta_scale, normalize, spread_decay, loss_clip)
    direction = optax.with_extra_args_support(base(1.0))

    def init(params: PyTree) -> SamuelOneGradientState:
        _check_whole(params)
        _check_proportional(base, params)
        return SamuelOneGradientState(
            count=jnp.zeros((), jnp.int32),
            evaluations=jnp.zeros((), jnp.int32),
            key=raw_key(seed),
            log_weights=rule.initial(len(rates)),
            learning_rate=jnp.asarray(np.sort(rates)[(len(rates) - 1) // 2], float),
            spread=jnp.zeros((), float),
            displacement=jax.tree.map(jnp.zeros_like, params),
            start=_total(params),
            followed=jnp.ones((), float),
            inner=direction.init(params),
        )

    def evaluate(
        state: SamuelOneGradientState, params: PyTree, value_fn: Callable[[PyTree], Array]
    ) -> dict[str, Array]:
        def score(rate: Array) -> Array:
            loss = value_fn(_move(params, rate - state.learning_rate, state.displacement))
            if jnp.shape(loss) != ():
                raise ValueError(f"value_fn must return one loss, not an array of shape {jnp.shape(loss)}.")
            return wide(loss).astype(state.log_weights.dtype)

        candidates = jnp.asarray(rates, state.learning_rate.dtype)
        losses = jax.lax.map(score, candidates)
        faded = discount * (state.log_weights - rule.initial(len(rates))) + rule.initial(len(rates))
        best = jnp.arange(len(rates)) == jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
        log_weights, spread = rule.update(jnp.asarray(faded), state.spread, state.evaluations, losses, best)
        log_weights = jnp.maximum(log_weights, log_weights.max() - _FLOOR).astype(state.log_weights.dtype)
        logits = log_probabilities(log_weights)
        chosen = jnp.argmax(logits) if select == "argmax" else draw(state.key, state.evaluations, logits)
        return {
            "evaluations": jnp.asarray(optax.safe_increment(state.evaluations)),
            "log_weights": log_weights,
            "learning_rate": candidates[chosen],
            "spread": spread,
            "start": _total(params),
            "followed": _followed(state, params, every),
        }

    def update(
        updates: PyTree,
        state: Any,  # SamuelOneGradientState, which Optax's types do not know
        params: PyTree = None,
        *,
        value_fn: Callable[[PyTree], Array] | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        if params is None or value_fn is None:
            missing = "the parameters" if params is None else "value_fn, the loss of this batch"
            raise ValueError(
                f"samuel_one_gradient needs {missing}: "
                "tx.update(grads, state, params, value_fn=lambda p: loss(p, batch)). With nnx.Optimizer: "
                "optimizer.update(model, grads, value_fn=...)."
            )
        _check_whole(params)
        count = _unbatched(state.count)
        due = (count % every == 0) & (count > 0)
        # Only scalars pass the branch: buffers as large as the parameters would be copied in every step.
        small = {name: getattr(state, name) for name in _CHOICE}
        small = jax.lax.cond(due, lambda: evaluate(state, params, value_fn), lambda: small)
        if not isinstance(count, jax.core.Tracer) and due and small["followed"] != 1:
            warnings.warn(_NOT_OUTERMOST.format(float(small["followed"])), stacklevel=2)
        steps, inner = direction.update(updates, state.inner, params, value_fn=value_fn, **extra_args)
        rate = small["learning_rate"]
        return jax.tree.map(lambda d, p: (rate * wide(d)).astype(p.dtype), steps, params), state._replace(
            count=optax.safe_increment(count),
            displacement=jax.tree.map(lambda b, d: jnp.where(due, d, b + d).astype(b.dtype), state.displacement, steps),
            inner=inner,
            **small,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _move(params: PyTree, rate: Array, direction: PyTree) -> PyTree:
    return jax.tree.map(lambda p, d: (wide(p) + rate * wide(d)).astype(p.dtype), params, direction)


def _total(tree: PyTree) -> Float[Array, ""]:
    return sum((replicated(jnp.sum(wide(leaf))) for leaf in jax.tree.leaves(tree)), jnp.zeros((), float))


def _followed(state: SamuelOneGradientState, params: PyTree, every: int) -> Float[Array, ""]:
    """See the state; told from sums over all numbers, as a copy of the parameters would cost memory."""
    moved, told = _total(params) - state.start, state.learning_rate * _total(state.displacement)
    floating = [leaf for leaf in jax.tree.leaves(params) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    rounding = optax.tree.norm([wide(leaf) * float(jnp.finfo(leaf.dtype).eps) for leaf in floating])
    as_told = jnp.abs(moved - told) <= 0.1 * jnp.abs(told) + 8 * every * replicated(rounding)
    return jnp.where(as_told | ~jnp.isfinite(moved), 1.0, moved / told).astype(state.followed.dtype)


_NOT_OUTERMOST = (
    "the parameters have moved {:.3g} times as far as samuel_one_gradient said, so the candidate rates are scored "
    "where they do not lead. It must stand outermost: put what follows it in the chain inside, "
    "samuel_one_gradient(lambda rate: optax.chain(optax.sgd(rate), ...), learning_rates)."
)


def _check_whole(params: PyTree) -> None:
    leaves = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "samuel_one_gradient cannot sit inside optax.partition or optax.masked: value_fn is the loss of all "
            "parameters. Put it outside: samuel_one_gradient(lambda lr: optax.partition(...), learning_rates)."
        )


def _check_proportional(base: Callable[[Any], optax.GradientTransformation], params: PyTree) -> None:
    """One step at two rates, on leaves of one number each: same state, updates in proportion."""

    def shrink(leaf: Any, number: float) -> np.ndarray:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.full((1,) * leaf.ndim, number if floating else 1, np.float32 if floating else leaf.dtype)

    # Concrete even where `init` is traced.
    with jax.ensure_compile_time_eval():
        own, grads = (jax.tree.map(lambda leaf, n=n: jnp.asarray(shrink(leaf, n)), params) for n in (0.5, -0.3))
        # What a loop may hand on, for bases that ask for it.
        extra = {"value": jnp.float32(1), "grad": grads, "value_fn": lambda params: jnp.float32(1), "batch_size": 1}

        def first(rate: float) -> tuple[PyTree, PyTree]:
            tx = optax.with_extra_args_support(base(rate))
            return tx.update(grads, tx.init(own), own, **extra)

        whole, half = first(1.0), first(0.5)
        pairs = [(w, 2.0 * h) for w, h in zip(*map(jax.tree.leaves, (whole[0], half[0])), strict=True)]
        pairs += list(zip(*map(jax.tree.leaves, (whole[1], half[1])), strict=True))
        if not all(np.allclose(w, h, rtol=1e-4, atol=0.0, equal_nan=True) for w, h in pairs):
            raise ValueError(
                "base is not proportional to its learning rate: its update at rate 1 is not twice that at rate 0.5, or "
                "its state depends on the rate. samuel_one_gradient scales one update by every candidate. Use a base "
                "such as optax.sgd, adam, adamw or lion; or effjax.samuel, which trains every candidate."
            )


@jax.custom_batching.custom_vmap
def _unbatched(count: Array) -> Array:
    return count


@_unbatched.def_vmap
def _refuse(axis_size: int, in_batched: Any, count: Array) -> Any:
    del axis_size, in_batched, count
    raise ValueError(
        "samuel_one_gradient cannot run under vmap: lax.cond would become a select, which scores all candidates in "
        "every step. Loop over the runs instead, with jax.lax.map or in Python."
    )
