"""DCL: distributionally constrained learning by dual ascent. A reconstruction after a thesis chapter (Kag 2023)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from effjax.core.errors import check_shape, near
from effjax.core.stacked import column, replicated
from effjax.core.tree import only_node, wide
from effjax.optim.dual_ascent import Constraint, DclConfig

__all__ = [
    "dcl",
    "dcl_init",
    "dcl_lagrangian",
    "dcl_metrics",
    "dcl_unreachable",
    "dcl_update",
    "dcl_violations",
    "dcl_weights",
]

PyTree = Any
Values = Mapping[str, Any]


class DclState(NamedTuple):
    """State of ``dcl``.

    Attributes:
      count: int32, steps taken.
      multipliers: by constraint, of its shape; float32 whatever the parameters are.
      violations: as measured last, 0 before; of the same shapes.
      dual: by constraint, the states of the multipliers' optimizers, stacked.
    """

    count: Int[Array, ""]
    multipliers: dict[str, Array]
    violations: dict[str, Array]
    dual: dict[str, PyTree]


def dcl(config: DclConfig) -> optax.GradientTransformationExtraArgs:
    r"""Keep statistics of a network within stated levels: multipliers find the weights of penalties in training.

    .. math::
        \min_\theta \max_{\lambda \ge 0}\; \ell(\theta) + \sum_j \lambda_j v_j(\theta),
        \qquad v_j = c_j(\theta) - \varepsilon_j

    This transformation holds the multipliers in the optimizer's state and moves them by the measured values
    (``dcl_update``); it hands the gradients on as they are, wherever it stands in a chain. The loss reads the
    multipliers from the same state (``dcl_lagrangian``), so that a step takes one forward and backward pass::

        config = DclConfig({"consistency": Constraint("<=", 0.1)})
        tx = optax.chain(dcl(config), optax.adam(1e-3))

        def objective(params, state, batch):
            logits, noisy = apply(params, batch["x"]), apply(params, batch["x_noisy"])
            values = {"consistency": consistency_kl(logits, noisy)}
            return dcl_lagrangian(state, cross_entropy(logits, batch["y"]), values, config), values

        grads, values = jax.grad(objective, has_aux=True)(params, state, batch)
        updates, state = tx.update(grads, state, params, values=values)

    Both are updated from the same point. To estimate violations on held-out rows, which training cannot fit, pass
    ``values`` of those rows to ``update`` (Cotter et al. 2019, arXiv:1807.00028). Inside ``optax.MultiSteps`` the
    multipliers move once per accumulated step, by the values of its last part.

    Args:
      config: constraints and the multipliers' rule.

    Returns:
      A transformation. Its ``update`` needs ``values``, a dictionary with the value of every constraint; ``present``
      may say which elements were measured, see ``dcl_update``. Parameters are not needed.

    Raises:
      ValueError: at ``update``, values that are missing, have other names, or other shapes.

    Example:
      >>> config = DclConfig({"mean": Constraint("<=", 1.0)}, dual=optax.sgd(0.1))
      >>> tx = optax.chain(dcl(config), optax.sgd(0.1))
      >>> w = jnp.float32(3.0)
      >>> state = tx.init(w)
      >>> for _ in range(200):  # the nearest number to 3 of those that are at most 1
      ...     grad = jax.grad(lambda w: dcl_lagrangian(state, (w - 3.0) ** 2, {"mean": w}, config))(w)
      ...     updates, state = tx.update(grad, state, w, values={"mean": w})
      ...     w = optax.apply_updates(w, updates)
      >>> round(float(w), 3), round(float(optax.tree.get(state, "multipliers")["mean"]), 2)
      (1.0, 4.0)

    A reconstruction: "distributionally constrained learning" is a chapter of A. Kag, "Novel neural architectures &
    algorithms for efficient inference" (Boston University 2023), of which we could read a description only. Constraints
    on the distribution of predictions, enforced and relaxed along training by a primal-dual scheme, are the author's;
    every formula is ours.
    """

    def init(params: PyTree) -> Any:
        del params
        return dcl_init(config)

    def update(
        updates: PyTree,
        state: Any,  # DclState, which Optax's types do not know
        params: PyTree = None,
        *,
        values: Values | None = None,
        present: Values | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, Any]:
        del params, extra_args
        if values is None:
            raise ValueError(
                f"dcl needs the values of {sorted(config.constraints)}: tx.update(grads, state, params, "
                "values={name: value}), the same as those given to dcl_lagrangian."
            )
        return updates, dcl_update(state, values, config, present=present)

    return optax.GradientTransformationExtraArgs(init, update)


def dcl_init(config: DclConfig) -> DclState:
    """The state before the first step: every multiplier at ``config.start``.

    Args:
      config: constraints and the multipliers' rule.

    Returns:
      A ``DclState``.

    Example:
      >>> dcl_init(DclConfig({"risk": Constraint("<=", 0.2, (3,))})).multipliers["risk"].shape
      (3,)
    """
    full = {name: _start(constraint, config) for name, constraint in config.constraints.items()}
    return DclState(
        count=jnp.zeros((), jnp.int32),
        multipliers=full,
        violations={name: jnp.zeros_like(leaf) for name, leaf in full.items()},
        dual={name: jax.vmap(config.dual.init)(leaf.reshape(-1)) for name, leaf in full.items()},
    )


def dcl_violations(state: PyTree, values: Values, config: DclConfig) -> dict[str, Array]:
    r"""How far every value is on the wrong side of the level of this step.

    .. math::
        v = c - \varepsilon \text{ for } c \le \varepsilon \text{ and } c = \varepsilon, \qquad
        v = \varepsilon - c \text{ for } c \ge \varepsilon

    Args:
      state: optimizer state that holds one ``DclState``; its count gives the step of scheduled levels.
      values: by constraint, c, of the constraint's shape.
      config: constraints.

    Returns:
      By constraint, v; float32 or wider.

    Raises:
      ValueError: values of other names or shapes.

    Example:
      >>> config = DclConfig({"entropy": Constraint(">=", 1.0)})
      >>> float(dcl_violations(dcl_init(config), {"entropy": 0.75}, config)["entropy"])
      0.25
    """
    state = _find(state)
    _check_names("values", values, config, complete=True)
    found = {}
    for name, constraint in config.constraints.items():
        check_shape(f"values[{name!r}]", values[name], constraint.shape, "That of the Constraint.")
        dtype = state.multipliers[name].dtype
        value = replicated(wide(values[name])).astype(dtype)
        found[name] = constraint.violation(value, constraint.level_at(state.count).astype(dtype))
    return found


def dcl_weights(state: PyTree, values: Values, config: DclConfig) -> dict[str, Array]:
    r"""The weights with which the constraints' gradients enter the loss's, at these values.

    .. math::
        w = [\lambda + \rho v]_+, \qquad w = \lambda + \rho v \text{ for equalities}

    Args:
      state: optimizer state that holds one ``DclState``.
      values: by constraint, c.
      config: constraints.

    Returns:
      By constraint, w. They weigh gradients of v, which for ``>=`` is minus that of c.

    Example:
      >>> config = DclConfig({"entropy": Constraint(">=", 1.0)}, penalty=2.0)
      >>> float(dcl_weights(dcl_init(config), {"entropy": 0.75}, config)["entropy"])
      0.5
    """
    violations, multipliers = dcl_violations(state, values, config), _find(state).multipliers

    def weight(name: str) -> Array:
        value = multipliers[name] + config.penalty * violations[name]
        return value if config.constraints[name].op == "==" else jnp.maximum(value, 0.0)

    return {name: weight(name) for name in config.constraints}


def dcl_lagrangian(
    state: PyTree,
    loss: Float[Array, ""] | float,
    values: Values,
    config: DclConfig,
    *,
    present: Values | None = None,
) -> Float[Array, ""]:
    r"""The function whose gradient in the parameters trains the network, and in the multipliers moves them.

    .. math::
        \ell + \sum_j \lambda_j v_j, \qquad \text{and with a penalty } \rho > 0 \qquad
        \ell + \sum_j \frac{[\lambda_j + \rho v_j]_+^2 - \lambda_j^2}{2 \rho}

    without the brackets' clip for equalities. A ``price`` a takes :math:`\lambda_j^2 / 2a` off each term.

    Args:
      state: optimizer state that holds one ``DclState``.
      loss: of the batch, a mean.
      values: by constraint, c, as functions of the same parameters; a mean over the whole batch on all devices.
      config: constraints.
      present: by constraint, bool of its shape: False leaves an element out that the batch says nothing about.

    Returns:
      A number, float32 or wider.

    Raises:
      ValueError: values of other names or shapes.

    Example:
      >>> config = DclConfig({"entropy": Constraint(">=", 1.0)}, start=2.0)
      >>> float(dcl_lagrangian(dcl_init(config), 0.5, {"entropy": 0.75}, config))
      1.0
    """
    violations, multipliers = dcl_violations(state, values, config), _find(state).multipliers
    measured = _present(present, config)
    total = wide(loss)
    for name, constraint in config.constraints.items():
        lam, violation = multipliers[name], violations[name]
        term = lam * violation
        if isinstance(config.penalty, jax.core.Tracer) or config.penalty != 0:
            # Squares of large multipliers would cancel in float32, so that the formula is expanded.
            rho = config.penalty
            term = term + 0.5 * rho * violation**2
            if constraint.op != "==":
                term = jnp.where(lam + rho * violation > 0, term, -0.5 * lam**2 / rho)
        if config.price is not None:
            term = term - 0.5 * lam**2 / config.price
        total = total + jnp.sum(jnp.where(measured[name], term, 0.0))
    return total


def dcl_update(state: DclState, values: Values, config: DclConfig, *, present: Values | None = None) -> DclState:
    r"""One step of the multipliers, by values as measured before the parameters' step.

    .. math::
        \lambda \leftarrow \mathrm{clip}(\lambda + \mathrm{dual}(v), 0, \lambda_{max})

    where dual is the optimizer's move, ``eta * v`` for SGD; equalities are clipped to :math:`\pm \lambda_{max}`. With a
    ``price`` a the optimizer is given :math:`v - \lambda / a`.

    Args:
      state: of ``dcl_init``, or of the step before.
      values: by constraint, c. A value that is not finite makes its multiplier so, and with it the next loss.
      config: constraints.
      present: by constraint, bool of its shape: False leaves the multiplier of an element as it is, for instance that
        of a class of which the batch holds no row. All count as measured where it is left out.

    Returns:
      The new state.

    Raises:
      ValueError: values of other names or shapes.

    Example:
      >>> config = DclConfig({"entropy": Constraint(">=", 1.0)}, dual=optax.sgd(0.1))
      >>> state = dcl_update(dcl_init(config), {"entropy": 0.5}, config)
      >>> round(float(state.multipliers["entropy"]), 3)
      0.05
    """
    if not isinstance(state, DclState):
        raise TypeError(f"state={type(state).__name__} must be the DclState of dcl_init.")
    violations, measured = dcl_violations(state, values, config), _present(present, config)
    due = (state.count % config.every == 0) & (state.count >= config.warmup)
    # After the last step of a cycle.
    again = False if config.restart is None else (state.count + 1) % config.restart == 0
    multipliers, dual = {}, {}
    for name, constraint in config.constraints.items():
        lam, moves = state.multipliers[name], jnp.asarray(measured[name]) & due
        moved, moved_dual = _ascend(lam, violations[name], state.dual[name], constraint, config)
        lam, flat = jnp.where(moves, moved, lam), moves.reshape(-1)
        kept = jax.tree.map(
            lambda new, old, flat=flat: jnp.where(column(flat, old), new, old), moved_dual, state.dual[name]
        )
        if config.restart is not None:
            first = _start(constraint, config)
            lam = jnp.where(again, first, lam)
            fresh = jax.vmap(config.dual.init)(first.reshape(-1))
            kept = jax.tree.map(lambda new, old: jnp.where(again, new, old), fresh, kept)
        multipliers[name], dual[name] = lam, kept
    violations = {name: jnp.where(measured[name], v, state.violations[name]) for name, v in violations.items()}
    return DclState(jnp.asarray(optax.safe_increment(state.count)), multipliers, violations, dual)


def dcl_metrics(state: PyTree, values: Values, config: DclConfig) -> dict[str, Float[Array, ""]]:
    """What to log of every constraint: ``NAME_violation`` and ``NAME_multiplier``, of vectors the largest.

    Args:
      state: optimizer state that holds one ``DclState``.
      values: by constraint, c.
      config: constraints.

    Returns:
      Scalars by name.

    Example:
      >>> config = DclConfig({"risk": Constraint("<=", 0.5, (2,))})
      >>> found = dcl_metrics(dcl_init(config), {"risk": jnp.array([0.25, 0.75])}, config)
      >>> {name: float(value) for name, value in found.items()}
      {'risk_violation': 0.25, 'risk_multiplier': 0.0}
    """
    violations, multipliers = dcl_violations(state, values, config), _find(state).multipliers
    found = {}
    for name in config.constraints:
        found[f"{name}_violation"] = violations[name].max()
        found[f"{name}_multiplier"] = multipliers[name].max()
    return found


def dcl_unreachable(state: PyTree, config: DclConfig) -> dict[str, Array]:
    """Which levels seem out of reach: the multiplier is at its limit and the last violation above 0.

    Training goes on with the multiplier at its limit. Relax such a level, or give constraints a ``price``.

    Args:
      state: optimizer state that holds one ``DclState``.
      config: constraints; all False where it has no ``limit``.

    Returns:
      By constraint, bool of its shape.

    Example:
      >>> config = DclConfig({"entropy": Constraint(">=", 9.0)}, dual=optax.sgd(1.0), limit=10.0)
      >>> state = dcl_init(config)
      >>> for _ in range(2):
      ...     state = dcl_update(state, {"entropy": 0.5}, config)
      >>> bool(dcl_unreachable(state, config)["entropy"])
      True
    """
    state = _find(state)
    limit = jnp.inf if config.limit is None else config.limit

    def at_limit(name: str) -> Array:
        lam, violation = state.multipliers[name], state.violations[name]
        if config.constraints[name].op == "==":
            lam, violation = jnp.abs(lam), lam * violation
        return (lam >= limit) & (violation > 0)

    return {name: at_limit(name) for name in config.constraints}


def _ascend(
    lam: Array, violation: Array, dual: PyTree, constraint: Constraint, config: DclConfig
) -> tuple[Array, PyTree]:
    """The multipliers of one constraint after a move of all, and their optimizers' states."""
    slope = violation if config.price is None else violation - lam / config.price
    updates, moved = jax.vmap(config.dual.update)(-slope.reshape(-1), dual, lam.reshape(-1))
    limit = wide(jnp.inf if config.limit is None else config.limit)
    low = -limit if constraint.op == "==" else 0.0
    lam = jnp.clip(lam + jnp.asarray(updates).reshape(lam.shape), low, limit).astype(lam.dtype)
    return lam, optax.tree.cast_like(moved, dual)


def _start(constraint: Constraint, config: DclConfig) -> Array:
    return jnp.full(constraint.shape, wide(config.start).astype(jnp.zeros((), float).dtype))


def _find(state: PyTree) -> DclState:
    return only_node(state, DclState, maker="dcl")


def _present(present: Values | None, config: DclConfig) -> dict[str, Any]:
    """A mask for every constraint."""
    if present is not None:
        _check_names("present", present, config, complete=False)
    found = {}
    for name, constraint in config.constraints.items():
        mask = True if present is None else present.get(name, True)
        if mask is not True:
            check_shape(f"present[{name!r}]", mask, constraint.shape, "That of the Constraint.")
            if jnp.result_type(mask) != jnp.bool_:
                raise TypeError(f"present[{name!r}] is {jnp.result_type(mask)}; give bools, such as counts > 0.")
        found[name] = jnp.broadcast_to(jnp.asarray(mask), constraint.shape)
    return found


def _check_names(argument: str, given: Values, config: DclConfig, *, complete: bool) -> None:
    for name in given:
        if name not in config.constraints:
            listed = sorted(config.constraints)
            raise ValueError(f"{argument} has {name!r}, which is no constraint of {listed}.{near(name, listed)}")
    missing = sorted(set(config.constraints) - set(given))
    if complete and missing:
        raise ValueError(
            f"{argument} has no {missing[0]!r}; give the value of every constraint, {sorted(config.constraints)}."
        )
