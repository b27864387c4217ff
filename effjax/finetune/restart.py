"""Restart an optimizer while its learning-rate schedule goes on."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from effjax.core.errors import check_choice
from effjax.core.tree import leaf_paths, path_name

__all__ = ["cola_reset", "link_schedule"]

PyTree = Any

SCHEDULES = ("global", "per_link")

# Optax states that hold whole numbers -> the fields that make up the learning rate or its schedule; the rest are
# moments and the counts of their bias correction. By name, as Optax does not export them all.
_KNOWN: dict[str, tuple[str, ...]] = {
    "ScaleByScheduleState": ("count",),
    "WrappedScheduleState": ("count",),
    "InjectHyperparamsState": ("count", "hyperparams"),
    "InjectStatefulHyperparamsState": ("count", "hyperparams", "hyperparams_states"),
    "ReduceLROnPlateauState": ("scale", "best_value", "plateau_count", "cooldown_count", "count", "avg_value"),
    "MultiStepsState": ("gradient_step",),
    "ApplyIfFiniteState": ("notfinite_count", "last_finite", "total_notfinite"),
    **dict.fromkeys(
        (
            "EmaState",
            "FactoredState",
            "MuonState",
            "ScaleByAdamState",
            "ScaleByAdanState",
            "ScaleByAmsgradState",
            "ScaleByBeliefState",
            "ScaleByLionState",
            "ScaleByNovogradState",
            "ScaleByRStdDevWithCountState",
            "ScaleByRmsWithCountState",
        ),
        (),
    ),
}


def link_schedule(
    schedules: Callable[[int], optax.Schedule] | Sequence[optax.Schedule], knots: Sequence[int], steps: int
) -> optax.Schedule:
    r"""A learning-rate schedule of its own for every link, of links of any lengths.

    .. math:: \eta(t) = \eta_k(t - t_k), \qquad t_k \le t < t_{k+1}

    with :math:`t_0 = 0` and the knots :math:`t_1 < t_2 < \dots`. It is for ``ColaConfig(schedule='global')``, whose
    count goes on at knots; ``'per_link'`` restarts one schedule, whatever a link's length.

    Args:
      schedules: the schedule of a link from its length in steps, or one for each link.
      knots: of the ``ColaConfig``.
      steps: of the whole run.

    Returns:
      ``step -> learning rate``.

    Raises:
      ValueError: knots that do not increase, or none below ``steps``; another number of schedules than of links.

    Example:
      >>> falling = lambda length: optax.linear_schedule(1.0, 0.0, length)
      >>> rate = link_schedule(falling, knots=(4, 6), steps=16)
      >>> [round(float(rate(step)), 2) for step in (0, 2, 4, 5, 6, 11)]
      [1.0, 0.5, 1.0, 0.5, 1.0, 0.5]
    """
    bounds = (0, *knots, steps)
    if any(before >= after for before, after in itertools.pairwise(bounds)):
        raise ValueError(f"knots={tuple(knots)} must increase from 1 on and end below steps={steps}.")
    lengths = [after - before for before, after in itertools.pairwise(bounds)]
    own = [schedules(length) for length in lengths] if callable(schedules) else list(schedules)
    if len(own) != len(lengths):
        raise ValueError(f"schedules: {len(own)} of them, but knots={tuple(knots)} make {len(lengths)} links.")
    return optax.join_schedules(own, list(knots))


class Restart(NamedTuple):
    """What ``cola_reset`` did, by the paths of the state's leaves.

    Attributes:
      reset: leaves as ``tx.init`` makes them.
      kept: leaves that were carried over: counts of schedules and injected hyperparameters.
    """

    reset: tuple[str, ...]
    kept: tuple[str, ...]


def cola_reset(
    tx: optax.GradientTransformation, state: PyTree, lora: PyTree, *, schedule: str = "global"
) -> tuple[PyTree, Restart]:
    """The optimizer's state at the start of a link: every moment and every bias-correction count at its start.

    Args:
      tx: the optimizer of the adapters.
      state: its state.
      lora: the new link's adapters, or any parameters of ``tx``.
      schedule: ``'global'`` carries the counts of schedules (and injected hyperparameters) over, so that one decay
        runs over the whole chain; ``'per_link'`` restarts them too.

    Returns:
      The state and a ``Restart`` that lists every leaf as reset or kept.

    Raises:
      ValueError: ``state`` is not of this ``tx``; with ``'global'``, a count in a state of unknown type, which may
        be a schedule's or a moment's.

    Example:
      >>> tx = optax.adam(optax.linear_schedule(1e-3, 0.0, 100))
      >>> _, restart = cola_reset(tx, tx.init(jnp.ones(3)), jnp.ones(3))
      >>> restart
      Restart(reset=('0/count', '0/mu', '0/nu'), kept=('1/count',))
    """
    check_choice("schedule", schedule, SCHEDULES)
    fresh = tx.init(lora)
    if jax.tree.structure(fresh) != jax.tree.structure(state):
        raise ValueError(
            "state has another structure than tx.init(lora) makes, so nothing of it can be reset. Pass the state "
            "that this tx made for these adapters."
        )
    kept = set() if schedule == "per_link" else set(_schedule_leaves(state, (), None))
    paths = leaf_paths(state)

    def choose(path: str, old: jax.Array, new: jax.Array) -> jax.Array:
        return old if path in kept else jnp.asarray(new, jnp.asarray(old).dtype)

    leaves = map(choose, paths, jax.tree.leaves(state), jax.tree.leaves(fresh))
    return jax.tree.unflatten(jax.tree.structure(state), leaves), Restart(
        tuple(path for path in paths if path not in kept), tuple(path for path in paths if path in kept)
    )


def _schedule_leaves(node: PyTree, path: tuple[Any, ...], owner: Any) -> list[str]:
    """Paths of the leaves that schedules own; raises where a count's role is not known."""
    children = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inner: inner is not node)[0]
    if len(children) == 1 and not children[0][0]:
        if _counts(node) and type(owner).__name__ not in _KNOWN:
            raise ValueError(
                f"schedule='global': the optimizer's state holds the whole numbers {path_name(path)} in "
                f"{type(owner).__name__}, which may drive its learning rate or its bias correction. Use "
                "schedule='per_link', which resets everything, or an Optax optimizer with its schedule in "
                "optax.scale_by_learning_rate or optax.inject_hyperparams."
            )
        return []
    kept = _KNOWN.get(type(node).__name__, ())
    found = []
    for key, child in children:
        below = (*path, *key)
        if getattr(key[0], "name", None) in kept:
            prefix = path_name(below)
            found += [f"{prefix}/{rest}" if rest else prefix for rest in leaf_paths(child)]
        else:
            found += _schedule_leaves(child, below, node if hasattr(node, "_fields") else owner)
    return found


def _counts(leaf: Any) -> bool:
    dtype = jnp.result_type(leaf)
    return not jnp.issubdtype(dtype, jnp.inexact)
