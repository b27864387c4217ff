"""One-sided prediction as in the paper: a saddle point over levels and multipliers, one of each for every class."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from effjax.core.errors import Limits, NotNegative, check_fields, check_shape
from effjax.hardness.osp import OspTerms
from effjax.optim.dcl import DclState, dcl_init, dcl_lagrangian, dcl_update
from effjax.optim.dual_ascent import Constraint, DclConfig

__all__ = ["OspSaddle", "OspSaddleConfig", "osp_saddle_init", "osp_saddle_loss", "osp_saddle_step"]

PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class OspSaddleConfig:
    """Settings of the saddle form; the defaults are those of the authors' first program.

    Source: Gangrade, Kag, Saligrama 2021, AISTATS, arXiv:2010.07853.
    """

    mu: NotNegative
    """Price of false positives."""
    classes: Annotated[int, Limits(low=2)]
    """K."""
    dual: optax.GradientTransformation = dataclasses.field(default_factory=lambda: optax.adam(5e-5))
    """Optimizer of the multipliers; it is given gradients to ascend, and must not decay weights."""
    level: NotNegative = 0.5
    """Levels before the first step."""
    multiplier: NotNegative | None = None
    """Multipliers before the first step; None for mu - 0.5, or 0 where that is negative."""
    order: Literal["alternating", "simultaneous"] = "alternating"
    """Whether the multipliers move at the new parameters, which costs a second forward pass, or at the old."""

    def __post_init__(self):
        check_fields(self)
        _ = self.constraints  # made here, as its checks cannot be traced

    @functools.cached_property
    def constraints(self) -> DclConfig:
        """C_k - phi_k <= 0 for every class, as ``effjax.optim`` states constraints."""
        start = max(self.mu - 0.5, 0.0) if self.multiplier is None else self.multiplier
        exclude = Constraint("<=", 0.0, (self.classes,))
        return DclConfig({"exclude": exclude}, dual=self.dual, start=start, limit=None)  # they end at mu


class OspSaddle(NamedTuple):
    """State of the saddle form.

    Attributes:
      params: of the network.
      levels: phi, allowed C_k of every class, 0 or more.
      opt: the state of the optimizer of both.
      dual: the multipliers and their optimizer.
    """

    params: PyTree
    levels: Float[Array, "classes"]
    opt: PyTree
    dual: DclState


def osp_saddle_init(params: PyTree, *, tx: optax.GradientTransformation, config: OspSaddleConfig) -> OspSaddle:
    """The state before the first step.

    Args:
      params: of the network.
      tx: optimizer of ``(params, levels)``.
      config: settings.

    Returns:
      An ``OspSaddle``.

    Example:
      >>> state = osp_saddle_init(jnp.zeros(3), tx=optax.adam(1e-3), config=OspSaddleConfig(mu=2.0, classes=2))
      >>> state.levels.tolist(), state.dual.multipliers["exclude"].tolist()
      ([0.5, 0.5], [1.5, 1.5])
    """
    levels = jnp.full(config.classes, config.level, float)
    return OspSaddle(params, levels, tx.init((params, levels)), dcl_init(config.constraints))


def osp_saddle_loss(
    dual: DclState, terms: OspTerms, levels: Float[Array, "classes"], config: OspSaddleConfig
) -> Float[Array, ""]:
    r"""The saddle function.

    .. math:: M = \sum_k L_k + \lambda_k (C_k - \varphi_k) + \mu \varphi_k

    It is minimised over the network and :math:`\varphi \ge 0`, maximised over :math:`\lambda \ge 0`.

    Args:
      dual: with the multipliers.
      terms: of ``osp_terms``.
      levels: phi.
      config: settings.

    Returns:
      M. At phi = C or lambda = mu it is ``osp_loss``.

    Raises:
      ValueError: levels of another shape.

    Example:
      >>> config = OspSaddleConfig(mu=2.0, classes=2)
      >>> state = osp_saddle_init(jnp.zeros(3), tx=optax.adam(1e-3), config=config)
      >>> terms = OspTerms(jnp.array([1.0, 2.0]), jnp.array([0.5, 0.5]))
      >>> float(osp_saddle_loss(state.dual, terms, state.levels, config))
      5.0
    """
    for name, value in (("levels", levels), ("terms.exclude", terms.exclude)):
        check_shape(name, value, (config.classes,), "One for each of the config's classes.")
    loss = jnp.sum(terms.cover) + config.mu * jnp.sum(levels)
    return dcl_lagrangian(dual, loss, {"exclude": terms.exclude - levels}, config.constraints)


def osp_saddle_step(
    state: OspSaddle,
    terms: Callable[[PyTree], OspTerms],
    *,
    tx: optax.GradientTransformation,
    config: OspSaddleConfig,
) -> tuple[OspSaddle, Float[Array, ""]]:
    """Descend in the network and the levels, ascend in the multipliers; traceable.

    Args:
      state: of ``osp_saddle_init``, or of the step before.
      terms: ``params -> OspTerms`` on the batch; with a function that draws, of one and the same draw.
      tx: as in ``osp_saddle_init``.
      config: settings.

    Returns:
      The new state, and M before the step.

    Example:
      >>> from effjax.hardness.osp import osp_terms
      >>> x, y = jnp.eye(2), jnp.array([0, 1])
      >>> tx, config = optax.adam(0.1), OspSaddleConfig(mu=1.0, classes=2)
      >>> state = osp_saddle_init(jnp.zeros((2, 2)), tx=tx, config=config)
      >>> state, first = osp_saddle_step(state, lambda w: osp_terms(x @ w, y), tx=tx, config=config)
      >>> _, second = osp_saddle_step(state, lambda w: osp_terms(x @ w, y), tx=tx, config=config)
      >>> bool(second < first)
      True

    A homotopy to ``osp_loss``: the multipliers start at mu - 0.5 and end at mu. Where a class is absent from the batch,
    its C_k still counts, that of its false positives; the authors' program divides by zero there.

    Source: Gangrade, Kag, Saligrama 2021, AISTATS, arXiv:2010.07853.
    """

    def saddle(both: tuple[PyTree, jax.Array]) -> tuple[jax.Array, OspTerms]:
        found = terms(both[0])
        return osp_saddle_loss(state.dual, found, both[1], config), found

    both = (state.params, state.levels)
    (value, before), grads = jax.value_and_grad(saddle, has_aux=True)(both)
    updates, opt = tx.update(grads, state.opt, both)
    params, levels = cast(tuple[PyTree, jax.Array], optax.apply_updates(both, updates))
    levels = jnp.maximum(levels, 0.0)
    alternating = config.order == "alternating"
    values = terms(params).exclude - levels if alternating else before.exclude - state.levels
    return OspSaddle(params, levels, opt, dcl_update(state.dual, {"exclude": values}, config.constraints)), value
