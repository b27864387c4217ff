"""What DCL constrains and how its multipliers move: constraints, schedules of levels, and the rules' settings."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from effjax.core.errors import Count, Limits, Natural, NoEffectWarning, check_fields, check_number
from effjax.core.tree import wide

__all__ = ["Constraint", "DclConfig", "cyclic_level", "scale_by_nupi"]

PyTree = Any
Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
    """A limit on a statistic c of the network, such as those of ``effjax.optim.constraints``.

    Example:
      >>> Constraint(">=", 1.0).op  # mean entropy of the predictions at least 1 nat
      '>='
    """

    op: Literal["<=", ">=", "=="]
    """How c stands to its level."""
    level: ArrayLike | Schedule
    """The level, in the unit of c; or a schedule ``step -> level``. One number holds for every element of c."""
    shape: tuple[int, ...] = ()
    """Shape of c: (classes,) for one constraint per class."""

    def __post_init__(self):
        check_fields(self)
        if not callable(self.level):
            _check_level(self.level, self.shape)

    def level_at(self, step: Int[Array, ""] | int) -> Array:
        """The level at a step, of the constraint's shape."""
        level = wide(self.level(step) if callable(self.level) else self.level)
        if callable(self.level):
            _check_level(level, self.shape)
        return jnp.broadcast_to(level, self.shape)

    def violation(self, value: Array, level: Array) -> Array:
        """How far a value is on the wrong side of its level; below 0 where it is on the right side."""
        return level - value if self.op == ">=" else value - level


def _default_dual() -> optax.GradientTransformation:
    return optax.chain(optax.ema(0.9), optax.sgd(0.05))


@dataclasses.dataclass(frozen=True, eq=False)
class DclConfig:
    """Constraints and how their multipliers move.

    ``dual`` is any Optax optimizer; it is given the gradient of minus the Lagrangian in the multipliers, so that it
    ascends. Each multiplier has a state of its own. With the violation v and a rate eta the usual rules are

    * gradient descent-ascent: ``optax.sgd(eta)``;
    * on a running mean of v (the default, 0.9 and 0.05): ``optax.chain(optax.ema(0.9), optax.sgd(eta))``;
    * nuPI, which damps oscillations: ``optax.chain(scale_by_nupi(), optax.sgd(eta))``;
    * the method of multipliers: ``optax.sgd(rho)`` with ``penalty=rho``.

    Momentum and Adam oscillate (Sohrabi et al. 2024, arXiv:2406.04558). The rate times the steps of a run should bring
    a multiplier to the weight that it needs, 1 to 10, in the first fifth of the run.

    Example:
      >>> config = DclConfig({"consistency": Constraint("<=", 0.1)}, dual=optax.sgd(0.1))
      >>> config.limit
      50.0
    """

    constraints: Mapping[str, Constraint]
    """By name; ``values`` carries the same names."""
    dual: optax.GradientTransformation = dataclasses.field(default_factory=_default_dual)
    """Optimizer of the multipliers."""
    penalty: Annotated[ArrayLike, Limits(low=0)] = 0.0
    """rho of the augmented Lagrangian; 0 for the plain one. 1 helps where multipliers oscillate."""
    start: Annotated[ArrayLike, Limits(low=0)] = 0.0
    """Multipliers at the start."""
    limit: Annotated[ArrayLike, Limits(low=0, open_low=True)] | None = 50.0
    """Largest multiplier, which one of an unreachable level ends at; None for no limit."""
    every: Count = 1
    """Steps between two moves of the multipliers."""
    warmup: Natural = 0
    """First steps, in which no multiplier moves."""
    restart: Count | None = None
    """Steps after which the multipliers start again, as a cyclic level may want; None for never."""
    price: Annotated[ArrayLike, Limits(low=0, open_low=True)] | None = None
    """a of resilient constraints: a level gives way by u at a cost of a u^2 / 2, which ends at u = multiplier / a; None
    for levels that do not give way."""

    def __post_init__(self):
        check_fields(self)
        if not self.constraints:
            warnings.warn("constraints={} holds none, so DCL changes nothing.", NoEffectWarning, stacklevel=3)
        for name, constraint in self.constraints.items():
            if not isinstance(constraint, Constraint):
                raise TypeError(f"constraints[{name!r}]={constraint!r} must be a Constraint, such as '<=' and a level.")
        if self.limit is not None and not isinstance(self.limit, jax.core.Tracer):
            largest = float(np.asarray(self.limit))
            check_number("start", self.start, low=0, high=largest, hint="limit is the largest multiplier.")


def cyclic_level(start: float, end: float, period: int, decay: float = 1.0) -> Schedule:
    r"""A level that goes from ``start`` to ``end`` in every period, along half a cosine: enforce, then relax.

    .. math::
        \varepsilon_t = s_t + (e - s_t)\,\frac{1 - \cos(\pi\,(t \bmod T) / T)}{2}, \qquad
        s_t = s\,\gamma^{\lfloor t / T \rfloor}

    Args:
      start: s, the level at the start of the first period.
      end: e, the level that a period leads to; its last step is one before.
      period: T, in steps.
      decay: factor of ``start`` from one period to the next.

    Returns:
      ``step -> level``; traceable.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> level = cyclic_level(0.5, 0.1, period=4, decay=0.5)
      >>> [round(float(level(step)), 2) for step in (0, 2, 4)]
      [0.5, 0.3, 0.25]
    """
    for argument, value in (("start", start), ("end", end)):
        check_number(argument, value)
    check_number("period", period, low=1, integer=True)
    check_number("decay", decay, low=0, open_low=True)

    def level(step: ArrayLike) -> Array:
        step = jnp.asarray(step)
        cycles, within = ((step // period).astype(float), (step % period).astype(float))
        first = start * jnp.power(jnp.asarray(decay, float), cycles)
        return first + (end - first) * (1 - jnp.cos(jnp.pi * within / period)) / 2

    return level


class NuPIState(NamedTuple):
    """State of ``scale_by_nupi``.

    Attributes:
      count: int32, steps taken.
      average: running mean of the updates.
    """

    count: Int[Array, ""]
    average: PyTree


def scale_by_nupi(kp: ArrayLike = 2.0, ki: ArrayLike = 1.0, nu: ArrayLike = 0.0) -> optax.GradientTransformation:
    r"""A PI controller for multipliers: plain ascent plus a term on the change of the violation, which damps.

    .. math::
        \xi_t = \nu\,\xi_{t-1} + (1 - \nu)\,g_t, \qquad u_t = K_I\,g_t + K_P\,(\xi_t - \xi_{t-1}), \qquad
        \xi_0 = g_0, \quad u_0 = K_I\,g_0

    With :math:`\nu = 0` and equality constraints it is gradient descent-ascent on the augmented Lagrangian.

    Args:
      kp: :math:`K_P`, of the change.
      ki: :math:`K_I`, of the violation itself.
      nu: forgetting factor of the running mean, below 1; negative values act as momentum.

    Returns:
      A transformation, to stand before ``optax.sgd(eta)`` in ``DclConfig.dual``.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> tx = scale_by_nupi(kp=2.0)
      >>> state = tx.init(jnp.zeros(()))
      >>> first, state = tx.update(jnp.float32(1.0), state)
      >>> second, state = tx.update(jnp.float32(1.5), state)
      >>> float(first), float(second)
      (1.0, 2.5)

    Sohrabi et al. 2024 (ICML, arXiv:2406.04558), as in the authors' library.
    """
    check_number("kp", kp, low=0)
    check_number("ki", ki, low=0)
    check_number("nu", nu, low=-1, high=1, open_low=True, open_high=True)

    def init(params: PyTree) -> NuPIState:
        return NuPIState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def update(updates: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        del params
        mean = lambda old, g: jnp.where(state.count == 0, g, nu * old + (1 - nu) * g).astype(old.dtype)
        average = jax.tree.map(mean, state.average, updates)
        change = lambda new, old, g: ki * g + jnp.where(state.count == 0, 0.0, kp * (new - old)).astype(g.dtype)
        moves = jax.tree.map(change, average, state.average, updates)
        return moves, NuPIState(jnp.asarray(optax.safe_increment(state.count)), average)

    return optax.GradientTransformation(init, update)


def _check_level(level: Any, shape: tuple[int, ...]) -> None:
    if jnp.shape(level) not in ((), shape):
        raise ValueError(f"level has shape {jnp.shape(level)}; give one number, or one for each element, {shape}.")
    if not isinstance(level, jax.core.Tracer) and not np.isfinite(np.asarray(level)).all():
        raise ValueError(f"level={level!r} must be finite. Leave a constraint out to lift it.")
