"""One optimizer for each part of the parameters, without masks."""

from collections.abc import Mapping
from typing import Any

import optax

PyTree = Any


def by_part(optimizers: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """One optimizer for each entry of the parameters.

    Unlike ``optax.partition`` it keeps every part's state as its optimizer made it, so that one part can be restarted.

    Args:
      optimizers: by the names of the entries.

    Returns:
      A transformation whose state has the same entries. Keywords of ``update`` go to every optimizer, but for ``grad``,
      which is of all parts.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = by_part({"body": optax.sgd(1.0), "head": optax.sgd(2.0)})
      >>> params = {"body": jnp.ones(1), "head": jnp.ones(1)}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["body"].item(), updates["head"].item()
      (-1.0, -2.0)
    """
    optimizers = {part: optax.with_extra_args_support(tx) for part, tx in optimizers.items()}

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any) -> tuple[PyTree, PyTree]:
        extra.pop("grad", None)
        of = lambda part: None if params is None else params[part]
        moved = {part: tx.update(updates[part], state[part], of(part), **extra) for part, tx in optimizers.items()}
        return {part: pair[0] for part, pair in moved.items()}, {part: pair[1] for part, pair in moved.items()}

    def init(params: Any) -> Any:
        return {part: tx.init(params[part]) for part, tx in optimizers.items()}

    return optax.GradientTransformationExtraArgs(init, update)
