"""The learning rate of batches of unlike sizes (LRM of Nagarajan, Raghunathan 2023, Findings of EMNLP)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from effjax.core.errors import check_number
from effjax.core.tree import wide

__all__ = ["scale_by_batch_size"]


def scale_by_batch_size(
    reference: ArrayLike = 64, *, power: ArrayLike = 0.5, max_factor: ArrayLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Scale updates to the number of examples behind them.

    .. math:: u \leftarrow u \, \min\left( (B / B_0)^p, f_{\max} \right)

    with B the examples of this step. It stands after Adam, which would undo a scaling of the gradient, and after
    weight decay, which is scaled as well::

        tx = optax.chain(
            optax.scale_by_adam(),
            optax.add_decayed_weights(0.01),
            scale_by_batch_size(reference=64),
            optax.scale_by_learning_rate(schedule),
        )
        updates, state = tx.update(grads, state, params, batch_size=batch["weight"].sum())

    Args:
      reference: :math:`B_0`, the batch size that the learning rate is meant for.
      power: p; 0.5 for Adam and its kin, 1 for SGD.
      max_factor: :math:`f_{\max}`; None for no limit.

    Returns:
      A transformation without state. Its ``update`` needs ``batch_size``, the valid examples of the whole step, dummy
      rows left out and all devices summed; it may be traced. Inside ``optax.MultiSteps`` give the examples of *all*
      micro-steps of an update, the last of which alone reaches here: the factor is applied once, and with that number.

    Raises:
      ValueError: arguments out of range; at ``update``, no ``batch_size``, or one that is not a positive scalar.

    Example:
      >>> tx = scale_by_batch_size(reference=64)
      >>> updates, _ = tx.update(jnp.ones(2), tx.init(None), batch_size=256)
      >>> updates.tolist()
      [2.0, 2.0]

    The paper's program multiplies the rate once per micro-step without a reset, so that under gradient accumulation the
    factors compound; here they do not. ``max_factor`` is ours.

    Source: Nagarajan, Raghunathan 2023, Findings of EMNLP (2023.findings-emnlp.782).
    """
    check_number("reference", reference, low=0, open_low=True)
    check_number("power", power)
    if max_factor is not None:
        check_number("max_factor", max_factor, low=0, open_low=True, hint="None sets no limit.")

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        batch_size: Float[Array, ""] | int | None = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        del params, extra_args
        if batch_size is None:
            raise ValueError(
                "scale_by_batch_size needs batch_size, the number of real examples in the step: "
                "tx.update(grads, state, params, batch_size=batch['weight'].sum())."
            )
        if jnp.ndim(batch_size):
            raise ValueError(
                f"batch_size has shape {jnp.shape(batch_size)}; it must be one number, summed over rows and devices: "
                "batch['weight'].sum()."
            )
        check_number("batch_size", batch_size, low=0, open_low=True)
        factor = (wide(batch_size) / reference) ** power
        if max_factor is not None:
            factor = jnp.minimum(factor, max_factor)
        return jax.tree.map(lambda u: (wide(u) * factor).astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def adamw_by_batch_size(
    learning_rate: optax.ScalarOrSchedule, *, weight_decay: float = 0.0, reference: float | None = 64
) -> optax.GradientTransformationExtraArgs:
    """AdamW with ``scale_by_batch_size``, where it belongs.

    Args:
      learning_rate: meant for batches of ``reference`` examples.
      weight_decay: of AdamW.
      reference: see ``scale_by_batch_size``; None for AdamW as it is.

    Returns:
      A transformation whose ``update`` needs ``batch_size``, unless ``reference`` is None.

    Example:
      >>> tx = adamw_by_batch_size(0.5, reference=4)
      >>> updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), batch_size=16)
      >>> round(updates.item(), 4)
      -1.0
    """
    return optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(weight_decay),
        *([] if reference is None else [scale_by_batch_size(reference)]),
        optax.scale_by_learning_rate(learning_rate),
    )
