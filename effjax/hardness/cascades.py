"""When to ask the next model, and cascades of two or more of them as one program."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from effjax.core.errors import check_choice
from effjax.core.tree import wide
from effjax.hardness.dispatch import Dispatched

__all__ = ["Asking", "cascade", "confidence_need", "with_query"]

Apply = Callable[..., Any]
Rule = Literal["margin", "entropy", "max_probability"]
RULES: tuple[Rule, ...] = ("margin", "entropy", "max_probability")


def confidence_need(logits: Float[Array | np.ndarray, "rows classes"], rule: Rule = "margin") -> Float[Array, "rows"]:
    r"""How unsure a classifier is, from its logits alone: what a learned router has to beat.

    With :math:`p = \mathrm{softmax}(\mathrm{logits})` in decreasing order

    .. math:: \text{margin: } p_2 - p_1, \quad \text{max\_probability: } -p_1, \quad
        \text{entropy: } -\sum\nolimits_k p_k \log p_k

    Args:
      logits: of at least two classes; computed in float32 at least, as in bfloat16 most margins near 1 tie.
      rule: ``'margin'``, ``'entropy'`` or ``'max_probability'``. Entropy is the usual baseline and often the weakest.

    Returns:
      The larger, the more a row needs another model; NaN where logits are NaN, which always asks.

    Raises:
      ValueError: an unknown rule, or logits that are not [rows, classes] with two classes or more.

    Example:
      >>> confidence_need(jnp.array([[2.0, 0.0], [1.0, 1.0]])).round(2).tolist()
      [-0.7599999904632568, 0.0]
    """
    check_choice("rule", rule, RULES)
    if jnp.ndim(logits) != 2 or jnp.shape(logits)[1] < 2:
        raise ValueError(f"logits have shape {jnp.shape(logits)}; [rows, classes] with two classes or more are needed.")
    logs = jax.nn.log_softmax(wide(logits))
    if rule == "entropy":
        return -jnp.sum(jnp.exp(logs) * jnp.where(logs == -jnp.inf, 0.0, logs), axis=1)
    best = jnp.exp(jax.lax.top_k(logs, 2)[0])
    return -best[:, 0] if rule == "max_probability" else best[:, 1] - best[:, 0]


class Asking(NamedTuple):
    """The parameters of a model that may ask the next one; all arrays, so that moving the threshold compiles nothing.

    Attributes:
      params: of the model.
      threshold: rows whose need is above it ask; of ``query_threshold``.
      router: parameters of a learned router; None for the rules of confidence.
    """

    params: Any
    threshold: Any
    router: Any = None


def with_query(apply: Apply, need: Rule | Callable[..., jax.Array] = "margin") -> Callable[[Asking, PyTree], Any]:
    """A model that says with its answers which rows ask the next one: what the dispatchers and cascades take.

    Args:
      apply: ``(params, inputs) -> logits``, or ``-> (logits, features)`` for a router that reads features.
      need: a rule of ``confidence_need``, or ``(router, logits, features) -> need [rows]`` with ``features`` None where
        the model gives none: such as of ``effjax.hardness.router_need``.

    Returns:
      ``(asking, inputs) -> (logits, request)``. A row asks where its need is above the threshold, or NaN.

    Raises:
      ValueError: an unknown rule; at the call, a need that is not one number for each row.

    Example:
      >>> base = with_query(lambda params, x: params * x)
      >>> logits, asks = base(Asking(jnp.float32(1.0), -0.5), jnp.array([[2.0, 0.0], [1.0, 1.0]]))
      >>> asks.tolist()
      [False, True]
    """
    if not callable(need):
        check_choice("need", need, RULES)

    def run(asking: Asking, inputs: PyTree) -> tuple[jax.Array, jax.Array]:
        found = apply(asking.params, inputs)
        logits, features = found if isinstance(found, tuple) else (found, None)
        score = need(asking.router, logits, features) if callable(need) else confidence_need(logits, need)
        if jnp.shape(score) != jnp.shape(logits)[:1]:
            rows = jnp.shape(logits)[:1]
            raise ValueError(f"need has shape {jnp.shape(score)}; one number for each row, {rows}, is needed.")
        return jnp.asarray(logits), ~(
            jnp.asarray(score) <= asking.threshold
        )  # NaN asks: what the base says there is worth nothing

    return run


def cascade(
    stages: Sequence[Callable[[Any, PyTree], Any]],
    params: Sequence[PyTree],
    inputs: PyTree,
    *,
    dispatch: Callable[..., Dispatched] | Sequence[Callable[..., Dispatched]],
) -> Dispatched:
    r"""Models in order of cost, each asked about the rows that the one before could not settle.

    .. math:: y(x) = g_j(x), \qquad j = \min \{ k : \mathrm{need}_k(x) \le t_k \text{ or } k = K \}

    Traceable; a model runs on the rows that reach it and no others, as far as the dispatcher saves.

    Args:
      stages: of ``with_query``, ``(params, inputs) -> (outputs, request)``; the last one, whose word is final,
        ``(params, inputs) -> outputs``. All give outputs of the same form.
      params: of each stage.
      inputs: an array or a tree of arrays, the batch axis leading.
      dispatch: ``(apply, params, inputs, outputs, request) -> Dispatched``, such as
        ``functools.partial(dispatch_buckets, buckets=(8, 64))``; or one for each step down.

    Returns:
      A ``Dispatched``; ``answered`` is the place of the model that answered.

    Raises:
      ValueError: fewer than two stages, or another number of parameters or dispatchers.

    Example:
      >>> from effjax.hardness.dispatch import dispatch_masked
      >>> grow = lambda params, x: params * x
      >>> stages, x = [with_query(grow), with_query(grow), grow], jnp.array([[0.125, 0.0], [0.5, 0.0], [3.0, 0.0]])
      >>> found = cascade(stages, [Asking(1.0, -0.5), Asking(4.0, -0.5), 8.0], x, dispatch=dispatch_masked)
      >>> found.answered.tolist(), found.outputs[:, 0].tolist()
      ([2, 1, 0], [1.0, 2.0, 3.0])
    """
    if len(stages) < 2 or len(params) != len(stages):
        raise ValueError(f"stages hold {len(stages)} and params {len(params)}: give two or more, and as many of each.")
    steps = [dispatch] * (len(stages) - 1) if callable(dispatch) else list(dispatch)
    if len(steps) != len(stages) - 1:
        raise ValueError(f"dispatch holds {len(steps)} for {len(stages)} stages: give one, or {len(stages) - 1}.")
    everybody = jnp.ones(jnp.shape(jax.tree.leaves(inputs)[0])[:1], bool)
    return _descend(stages, params, (inputs, everybody), steps)


def _descend(stages: Sequence[Any], params: Sequence[PyTree], seen: PyTree, steps: Sequence[Any]) -> Dispatched:
    """The cascade below, over rows of which ``reached`` are meant: the others fill places and must not ask."""
    inputs, reached = seen
    if len(stages) == 1:
        nobody = jnp.zeros_like(reached)
        return Dispatched(stages[0](params[0], inputs), jnp.zeros(reached.shape, jnp.int32), nobody, nobody)
    outputs, request = stages[0](params[0], inputs)
    request = request & reached
    flags = {"depth": jnp.zeros(reached.shape, jnp.int32), "overflowed": reached & False, "failed": reached & False}

    def expert(params: Sequence[PyTree], seen: PyTree) -> PyTree:
        below = _descend(stages[1:], params, seen, steps[1:])
        rest = {"depth": below.answered, "overflowed": below.overflowed, "failed": below.failed}
        return below.outputs, rest

    found = steps[0](expert, tuple(params[1:]), (inputs, request), (outputs, flags), request)
    outputs, deeper = found.outputs
    return Dispatched(
        outputs,
        jnp.where(found.served, 1 + deeper["depth"], 0),
        found.overflowed | (found.served & deeper["overflowed"]),
        found.failed | (found.served & deeper["failed"]),
    )
