"""SAMUEL: learning-rate experts by multiplicative weights (Lu, Xia, Arora, Hazan 2022, arXiv 2203.01400)."""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, UInt

from effjax.core.errors import NoEffectWarning, check_choice, check_number
from effjax.core.loops import LOOPS, fastest_loop, stacked_map
from effjax.core.stacked import aligned, column, finite_copies, replicated, spread_out, take, weighted_sum
from effjax.core.tree import only_node, wide
from effjax.optim.expert_weights import WeightRule, check_concrete, check_rates, draw, log_probabilities, raw_key

__all__ = [
    "samuel",
    "samuel_eval_params",
    "samuel_init",
    "samuel_probabilities",
    "samuel_sync",
    "samuel_value_and_grad",
]

PyTree = Any
Base = Callable[[Any], optax.GradientTransformation]

_DECADES = (1.0, 0.1, 0.01, 0.001, 0.0001)
_SELECTIONS = ("sample", "argmax", "average")


class SamuelState(NamedTuple):
    """State of ``samuel``.

    Attributes:
      count: int32, steps taken.
      key: raw PRNG key of the draws; never changes, as draw t comes from the key and t.
      log_weights: one row per meta rate, one column per expert.
      current_expert: int32, the expert drawn in the last step.
      learning_rate: its rate; None where the experts are transformations.
      synced: whether the last step ended a segment.
      spread: running mean square of the losses' spread, see ``samuel``.
      inner: the base optimizers' states, stacked, or a tuple of them.
    """

    count: Int[Array, ""]
    key: UInt[Array, "words"]
    log_weights: Float[Array, "rates experts"]
    current_expert: Int[Array, ""]
    learning_rate: Float[Array, ""] | None
    synced: Bool[Array, ""]
    spread: Float[Array, ""]
    inner: PyTree


def samuel(
    base: Base | Sequence[optax.GradientTransformation],
    learning_rates: Sequence[float] | ArrayLike | None = None,
    *,
    period: int | Sequence[int] | ArrayLike = 150,
    total_steps: int | None = None,
    select: str = "sample",
    meta_rates: Sequence[float] | ArrayLike = (0.5, 0.25, 0.125, 0.0625),
    eta_scale: ArrayLike = 20.0,
    normalize: bool = True,
    spread_decay: ArrayLike = 0.99,
    loss_clip: ArrayLike | None = 10.0,
    prior_odds: ArrayLike = 20.0,
    inner_state: str = "reset",
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Train E copies of a network at different learning rates and follow the best, segment by segment.

    Every expert trains all the time. In step t, with the losses :math:`L_e` at the parameters before the step,

    .. math::
        p_e &\propto \textstyle\sum_q w_{qe}, \qquad c \sim p \\
        w_{qe} &\leftarrow w_{qe} \exp(\eta_q (L_c - L_e) / s) \\
        P_e &\leftarrow P_e + u_e

    and at the end of a segment every expert continues from the drawn one: :math:`P_e \leftarrow P_c`, the weights
    start again (at :math:`w_{qe} = \eta_q` when ``prior_odds`` is 1) and so do the base optimizers. Here
    :math:`\eta_q` is ``eta_scale * meta_rates[q]`` and s the running root mean square of the spread (median minus
    least loss, which up to half of the experts may diverge without disturbing), or 1 without ``normalize``.

    It costs E times the memory and compute of one run, and it pays where the E runs would have been launched anyway or
    where the data shift during the run. All parameters, gradients and states carry a leading expert axis; the losses
    come in as ``value``. It stands outermost in a chain, and ``samuel_sync`` follows ``optax.apply_updates``::

        params = samuel_init(params, experts=5)
        losses, grads = samuel_value_and_grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params, value=losses)
        params = samuel_sync(state, optax.apply_updates(params, updates))

    Args:
      base: ``learning_rate -> GradientTransformation``, traced once for all rates; or one transformation per expert.
      learning_rates: one positive rate per expert; by default 1, 0.1, ..., 0.0001. None where ``base`` is a sequence.
      period: steps in a segment, or the numbers (from 0) of the steps that end one. An eighth of the run or less, 100
        steps or more.
      total_steps: length of the run. Its last step ends a segment by argmax, whatever ``select``.
      select: ``'sample'``, as in the paper; ``'argmax'``; or ``'average'`` of parameters, for convex losses only.
      meta_rates: step sizes of the weights, all used at once.
      eta_scale: factor of ``meta_rates``.
      normalize: divide loss differences by their running spread.
      spread_decay: forgetting factor of that spread per step.
      loss_clip: losses count as at most this far above the least one, in units of s. None: no limit.
      prior_odds: at a sync the weights go on from the old ones, but the best expert's are at most this many times
        another's. 1 makes them equal, as in the paper, which costs some steps of chance after every sync.
      inner_state: at a sync ``'reset'`` the base optimizers, as in the paper, or ``'copy'`` the drawn one's state.
      seed: seed of the draws, or a PRNG key.

    Returns:
      A transformation over stacked parameters ``[E, ...]``. Its ``update`` needs ``value``, the losses ``[E]``, and
      hands each expert its own as ``value``; ``sampled`` (an index) replaces the draw. An expert whose loss or
      parameters are not finite has no weight until the next sync, and is never drawn while another one is finite.

    Raises:
      ValueError: rates that are not positive or not distinct; other arguments out of range; at ``init`` and
        ``update``, arrays without the expert axis.

    Example:
      >>> tx = samuel(optax.sgd, (0.5, 0.125), period=10)
      >>> loss = samuel_value_and_grad(lambda w, x: ((w - x) ** 2).sum())
      >>> w = samuel_init(jnp.zeros(3), experts=2)
      >>> state = tx.init(w)
      >>> losses, grads = loss(w, jnp.ones(3))
      >>> updates, state = tx.update(grads, state, w, value=losses)
      >>> w = samuel_sync(state, optax.apply_updates(w, updates))
      >>> w[:, 0].tolist(), state.synced.item()
      ([1.0, 0.25], False)

    The paper's box multiplies by :math:`1 + \eta r` and the authors' program (google/init2winit) by the exponential,
    as here. That program is ``eta_scale=1, normalize=False, loss_clip=None, prior_odds=1``, except that it restarts the
    key at every sync, so that each segment repeats the draws of the one before; here a draw comes from the key and the
    step of the whole run. Normalising, clipping and inherited odds are not in the paper.

    Source: Lu, Xia, Arora, Hazan 2022, arXiv:2203.01400.
    """
    experts = _Experts.make(base, learning_rates)
    rule = WeightRule.make(meta_rates, eta_scale, normalize, spread_decay, loss_clip)
    due = _schedule(period)
    if total_steps is not None:
        check_number("total_steps", total_steps, low=1, integer=True)
    check_choice("select", select, _SELECTIONS)
    check_concrete("prior_odds", prior_odds, low=1.0, hint="1 starts every segment with equal weights.")
    check_choice("inner_state", inner_state, ("reset", "copy"))
    if inner_state == "copy" and experts.mixed:
        raise ValueError("inner_state='copy' needs experts that differ by their rate only. Use 'reset'.")
    size = experts.size

    def init(params: PyTree) -> Any:
        _check_stacked("params", params, size)
        inner = experts.init(params)
        if inner_state == "copy" and optax.tree.get_all_with_path(inner, "hyperparams"):
            raise ValueError(
                "inner_state='copy' would copy the drawn expert's injected hyperparameters, its rate among them, to "
                "all. Use 'reset', or a base without optax.inject_hyperparams."
            )
        first = jnp.zeros((), jnp.int32)
        return SamuelState(
            count=jnp.zeros((), jnp.int32),
            key=raw_key(seed),
            log_weights=rule.initial(size),
            current_expert=first,
            learning_rate=experts.rate(first),
            synced=jnp.zeros((), bool),
            spread=jnp.zeros((), float),
            inner=inner,
        )

    def update(
        updates: PyTree,
        state: Any,  # SamuelState, which Optax's types do not know
        params: PyTree = None,
        *,
        value: Float[Array, "experts"] | None = None,
        sampled: Int[Array, ""] | int | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        losses = _check_losses(value, params, updates, size).astype(state.log_weights.dtype)
        last = False if total_steps is None else state.count == total_steps - 1

        logits = rule.logits(state.log_weights, losses)
        drawn = jnp.argmax(logits)
        if select == "sample":
            drawn = jnp.where(last, drawn, draw(state.key, state.count, logits))
        drawn = jnp.asarray(drawn if sampled is None else sampled, jnp.int32)
        played = jax.nn.softmax(logits) if select == "average" else jnp.arange(size, dtype=jnp.int32) == drawn
        log_weights, spread = rule.update(state.log_weights, state.spread, state.count, losses, played)
        updates, inner = experts.update(updates, state.inner, params, losses, extra_args)
        # A rate is float32 and would widen the updates of narrower parameters, and some base's state.
        updates, inner = optax.tree.cast_like(updates, params), optax.tree.cast_like(inner, state.inner)

        def sync() -> tuple[PyTree, PyTree, Array, Array]:
            moves, target, chosen = _gather(updates, params, drawn, logits, average=select == "average")
            copied = spread_out(take(inner, chosen), inner) if inner_state == "copy" else experts.init(target)
            return moves, copied, rule.restarts(log_weights, prior_odds), chosen

        ending = due(state.count) | last
        updates, inner, log_weights, current = jax.lax.cond(ending, sync, lambda: (updates, inner, log_weights, drawn))
        return updates, SamuelState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            key=state.key,
            log_weights=log_weights,
            current_expert=current,
            learning_rate=experts.rate(current),
            synced=ending,
            spread=spread,
            inner=inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def samuel_init(params: PyTree, experts: int) -> PyTree:
    """Stack ``experts`` copies of the parameters (or of any other state) along a new leading axis.

    Args:
      params: pytree of arrays ``[...]``.
      experts: their number E.

    Returns:
      Pytree of arrays ``[E, ...]``, of the same dtypes.

    Raises:
      ValueError: ``experts`` below 1.

    Example:
      >>> samuel_init({"w": jnp.zeros(3)}, experts=2)["w"].shape
      (2, 3)
    """
    check_number("experts", experts, low=1, integer=True)
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], experts, axis=0), params)


def samuel_sync(state: PyTree, params: PyTree, *others: PyTree) -> Any:
    """After a segment's last step, overwrite every expert with the drawn one, bit for bit; else change nothing.

    The update of that step alone leaves the experts apart in the last bit, and a diverged one not finite.

    Args:
      state: state returned by that step's ``tx.update``; the ``SamuelState`` may be nested in it.
      params: stacked parameters ``[E, ...]``, the step's updates applied.
      *others: what else belongs to an expert, with the same leading axis: BatchNorm statistics, for instance.

    Returns:
      ``params``, or the tuple ``(params, *others)`` where others were given.

    Raises:
      ValueError: ``state`` holds no ``SamuelState``.

    Example:
      >>> tx = samuel(optax.sgd, (0.5, 0.05), period=1, select="argmax")
      >>> w = samuel_init(jnp.ones(()), experts=2)
      >>> updates, state = tx.update(w, tx.init(w), w, value=jnp.ones(2))
      >>> samuel_sync(state, optax.apply_updates(w, updates)).tolist()
      [0.5, 0.5]
    """
    found = _find(state)
    trees = (params, *others)

    def overwrite() -> tuple[PyTree, ...]:
        return spread_out(take(trees, found.current_expert), trees)

    trees = jax.lax.cond(found.synced, overwrite, lambda: trees)
    return trees if others else trees[0]


def samuel_probabilities(state: PyTree) -> Float[Array, "experts"]:
    """The experts' probabilities of being drawn in the next step, from a state that holds a ``SamuelState``.

    Args:
      state: optimizer state.

    Returns:
      ``[E]``, sum 1.

    Raises:
      ValueError: ``state`` holds no ``SamuelState``.

    Example:
      >>> tx = samuel(optax.sgd, (0.5, 0.05))
      >>> samuel_probabilities(tx.init(samuel_init(jnp.zeros(3), experts=2))).tolist()
      [0.5, 0.5]
    """
    return jax.nn.softmax(log_probabilities(_find(state).log_weights))


def samuel_eval_params(state: PyTree, params: PyTree, *, average: bool = False) -> PyTree:
    """The parameters to evaluate: the most probable expert's, one network without the leading axis.

    Args:
      state: optimizer state that holds a ``SamuelState``.
      params: stacked parameters ``[E, ...]``, or any other stacked state.
      average: return the experts' average by probability instead (for ``select='average'``).

    Returns:
      Pytree of arrays ``[...]``.

    Raises:
      ValueError: ``state`` holds no ``SamuelState``.

    Example:
      >>> tx = samuel(optax.sgd, (0.5, 0.05))
      >>> w = samuel_init(jnp.zeros(3), experts=2)
      >>> samuel_eval_params(tx.init(w), w).shape
      (3,)
    """
    logits = log_probabilities(_find(state).log_weights)
    if average:
        return weighted_sum(params, jax.nn.softmax(logits))
    return take(params, jnp.argmax(logits))


def samuel_value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    in_axes: Sequence[int | None] = (0, None),
    loop: str = "auto",
    mesh: Mesh | None = None,
    axis: str = "expert",
) -> Callable[..., tuple[Any, PyTree]]:
    """Losses and gradients of all experts.

    ``losses[e], grads[e] = jax.value_and_grad(loss_fn)(params[e], *args)``.

    Args:
      loss_fn: ``(params, *args) -> loss``, a scalar, or ``(loss, aux)``; of one expert.
      has_aux: whether it returns ``aux``.
      in_axes: per argument, 0 where it has the expert axis (parameters, BatchNorm statistics, one PRNG key per
        expert), None where the experts share it (the batch). Arguments beyond the list are shared.
      loop: ``'vmap'``, ``'map'``, ``'unroll'`` or ``'auto'``, see ``core.loops.stacked_map``. ``auto`` is timed on
        one device with the whole of the shared arguments. The forms differ in the last bits: name one where a
        resumed run must repeat the interrupted one bitwise.
      mesh: mesh with an axis of experts: each of its devices then trains ``E / mesh.shape[axis]`` of them, and
        neither parameters nor gradients leave it. Other axes stay with the compiler.
      axis: name of that axis.

    Returns:
      Function ``(stacked_params, *args) -> (losses, grads)`` or ``((losses, aux), grads)``, all with a leading axis E.

    Raises:
      ValueError: a leading axis differs from E; E is no multiple of the mesh axis; the mesh lacks the axis.

    Example:
      >>> f = samuel_value_and_grad(lambda w, x: (w * x).sum())
      >>> losses, grads = f(samuel_init(jnp.ones(3), experts=2), jnp.arange(3.0))
      >>> losses.tolist(), grads.shape
      ([3.0, 3.0], (2, 3))
    """
    check_choice("loop", loop, LOOPS)
    if not in_axes or in_axes[0] != 0 or any(entry not in (0, None) for entry in in_axes):
        raise ValueError(f"in_axes={in_axes!r} must begin with 0, for the parameters, and hold 0 and None only.")
    if mesh is not None:
        check_choice("axis", axis, mesh.axis_names)
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=has_aux)

    def losses_and_grads(params: PyTree, *args: PyTree) -> tuple[Any, PyTree]:
        size, arguments = _leading(params), (params, *args)
        if mesh is None:
            return stacked_map(value_and_grad, *arguments, in_axes=in_axes, size=size, loop=loop)
        devices = mesh.shape[axis]
        if size % devices:
            raise ValueError(
                f"{size} experts do not divide among the {devices} devices of mesh axis {axis!r}. "
                f"Use {math.ceil(size / devices) * devices} experts, or a mesh axis that divides {size}."
            )
        local = size // devices
        own = [mark == 0 for mark in (*in_axes, *[None] * len(args))][: len(arguments)]
        form = loop
        if form == "auto":
            part = lambda leaf: jax.ShapeDtypeStruct((local, *leaf.shape[1:]), leaf.dtype)
            parts = (jax.tree.map(part, x) if mine else x for x, mine in zip(arguments, own, strict=True))
            form = fastest_loop(value_and_grad, *parts, in_axes=in_axes, size=local)
        sharded = jax.shard_map(
            functools.partial(stacked_map, value_and_grad, in_axes=in_axes, size=local, loop=form),
            mesh=mesh,
            in_specs=tuple(P(axis) if mine else P() for mine in own),
            out_specs=P(axis),
            axis_names={axis},
            check_vma=False,
        )
        return sharded(*arguments)

    return losses_and_grads


class _Experts(NamedTuple):
    """The base optimizers behind one interface: a factory traced once over the rates, or a sequence."""

    base: Any
    rates: Any  # [E], or None where `base` is a sequence
    size: int

    @property
    def mixed(self) -> bool:
        return self.rates is None

    @classmethod
    def make(cls, base: Any, rates: Any) -> "_Experts":
        if callable(base):
            rates = check_rates("learning_rates", _DECADES if rates is None else rates)
            experts = cls(base, rates, len(rates))
        else:
            if rates is not None:
                raise ValueError(
                    "learning_rates must be None where base is a sequence of transformations, which hold their own "
                    "rates. To vary the rate only, pass a function: base=optax.adam."
                )
            if not base or not all(isinstance(tx, optax.GradientTransformation) for tx in base):
                raise TypeError(
                    f"base={base!r} must be a function of the learning rate, such as optax.adam, or a sequence of "
                    "optax transformations."
                )
            experts = cls(tuple(optax.with_extra_args_support(tx) for tx in base), None, len(base))
        if experts.size == 1:
            warnings.warn(
                "samuel with one expert has nothing to choose from. Give two learning rates or more, or use the base "
                "optimizer alone.",
                NoEffectWarning,
                stacklevel=3,
            )
        return experts

    def rate(self, expert: Array) -> Array | None:
        return None if self.mixed else jnp.asarray(self.rates, float)[expert]

    def init(self, params: PyTree) -> PyTree:
        if self.mixed:
            return tuple(tx.init(_row(params, e)) for e, tx in enumerate(self.base))
        inner = jax.vmap(lambda rate, own: self.base(rate).init(own))(self._aligned_rates(params), params)
        return aligned(inner, params)

    def update(self, grads: PyTree, inner: PyTree, params: PyTree, losses: Array, extra: dict) -> tuple[PyTree, PyTree]:
        if self.mixed:
            pairs = [
                tx.update(_row(grads, e), inner[e], _row(params, e), **extra | {"value": losses[e]})
                for e, tx in enumerate(self.base)
            ]
            updates = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(pair[0] for pair in pairs))
            return updates, tuple(pair[1] for pair in pairs)

        def one(rate: Array, grad: PyTree, own_inner: PyTree, own: PyTree, loss: Array) -> tuple[PyTree, PyTree]:
            tx = optax.with_extra_args_support(self.base(rate))
            return tx.update(grad, own_inner, own, **extra | {"value": loss})

        return jax.vmap(one)(self._aligned_rates(params), grads, inner, params, aligned(losses, params))

    def _aligned_rates(self, params: PyTree) -> Array:
        return aligned(jnp.asarray(self.rates, float), params)


def _schedule(period: int | Sequence[int] | ArrayLike) -> Callable[[Array], Array]:
    if isinstance(period, Sequence) or getattr(period, "ndim", 0) == 1:
        listed: Any = period
        steps = sorted(int(check_number("period", int(step), low=0, integer=True)) for step in listed)
        return lambda count: jnp.isin(count, jnp.asarray(steps, jnp.int32))
    every: Any = check_number(
        "period", period, low=1, integer=True, hint="It is the number of steps between two syncs."
    )
    return lambda count: jax.lax.rem(count + 1, every) == 0


def _check_stacked(argument: str, tree: PyTree, size: int) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    for path, leaf in leaves:
        if isinstance(leaf, optax.MaskedNode):
            raise ValueError(
                "samuel cannot sit inside optax.partition or optax.masked: an expert is a whole network, judged by one "
                "loss. Put it outside: samuel(lambda lr: optax.partition(...), learning_rates)."
            )
        if jnp.shape(leaf)[:1] != (size,):
            raise ValueError(
                f"{argument}{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, but needs a leading axis of "
                f"{size}, the number of experts. Stack the parameters with effjax.optim.samuel_init(params, {size})."
            )


def _check_losses(value: Any, params: PyTree, updates: PyTree, size: int) -> Float[Array, "experts"]:
    if params is None:
        raise ValueError("samuel needs the parameters: tx.update(grads, state, params, value=losses).")
    if value is None:
        raise ValueError(
            "samuel needs value, the losses of the experts: "
            "losses, grads = effjax.optim.samuel_value_and_grad(loss)(params, batch); "
            "tx.update(grads, state, params, value=losses)."
        )
    _check_stacked("params", params, size)
    _check_stacked("updates", updates, size)
    if jnp.shape(value) != (size,):
        raise ValueError(f"value has shape {jnp.shape(value)}, but must hold one loss per expert: ({size},).")
    return replicated(wide(value))


def _leading(tree: PyTree) -> int:
    leaves = jax.tree.leaves(tree)
    if not leaves or not jnp.ndim(leaves[0]):
        raise ValueError("params must be stacked arrays [E, ...]: use effjax.optim.samuel_init(params, experts).")
    return leaves[0].shape[0]


def _find(state: PyTree) -> SamuelState:
    return only_node(state, SamuelState, maker="samuel")


def _gather(
    updates: PyTree, params: PyTree, drawn: Array, logits: Array, *, average: bool
) -> tuple[PyTree, PyTree, Array]:
    """Updates that bring every expert to the drawn one (or to the average), the parameters there, and the expert."""
    after = optax.apply_updates(params, updates)
    sound = finite_copies(after)
    sound |= ~sound.any()
    logits = jnp.where(sound, logits, -jnp.inf)
    chosen = jnp.where(sound[drawn], drawn, jnp.argmax(logits).astype(jnp.int32))
    anchor, own = take(params, chosen), take(updates, chosen)
    if average:
        mean = weighted_sum(after, jax.nn.softmax(logits))
        own = jax.tree.map(lambda m, p, u: (m - p).astype(u.dtype), mean, anchor, own)
    target = spread_out(optax.apply_updates(anchor, own), params)
    # The chosen expert keeps its own update: P_c + ((P_c + u_c) - P_c) is not P_c + u_c to the last bit.
    leads = jnp.arange(logits.size) == chosen
    moves = jax.tree.map(
        lambda t, p, o, u: jnp.where(column(leads, u), o, (t - p).astype(u.dtype)), target, params, own, updates
    )
    return moves, target, chosen


def _row(tree: PyTree, expert: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[expert], tree)
