"""The paper's intervals and bound, written out, to hold ``effjax.optim.strongly_adaptive`` against."""

import jax.numpy as jnp
import numpy as np


def covering_intervals(horizon: int) -> np.ndarray:
    """The geometric covering intervals :math:`[i 2^k, (i+1) 2^k - 1]`, i >= 1, that begin within a horizon.

    Exactly ``floor(log2 t) + 1`` of them contain a round t, one per scale k.

    Args:
      horizon: number of rounds T, counted from 1.

    Returns:
      int64 ``[n, 2]``: first and last round (which may lie beyond T), ordered by k, then by first round.

    Example:
      >>> covering_intervals(3).tolist()
      [[1, 1], [2, 2], [3, 3], [2, 3]]
    """
    scales = [1 << k for k in range(horizon.bit_length())]
    return np.array([(i * s, (i + 1) * s - 1) for s in scales for i in range(1, horizon // s + 1)], np.int64)


def preconditioner_regret(grads, diameter: float, *, diagonal: bool = True):
    r"""The main term of the regret's local bound, that of the best preconditioner for an interval.

    .. math:: D \sqrt{d \min_{H \succeq 0,\ \mathrm{tr} H \le d} \textstyle\sum_t g_t^\top H^{-1} g_t}

    With :math:`S = \sum_t g_t g_t^\top` the minimum is :math:`(\mathrm{tr} S^{1/2})^2 / d`, over diagonal H
    :math:`(\sum_i \sqrt{S_{ii}})^2 / d`.

    Args:
      grads: gradients of the interval.
      diameter: D.
      diagonal: over diagonal H only, as Adagrad's.

    Returns:
      The scalar.

    Example:
      >>> preconditioner_regret(jnp.array([[3.0, 0.0], [4.0, 1.0]]), diameter=2.0).item()
      12.0
    """
    if diagonal:
        return diameter * jnp.sqrt((grads**2).sum(0)).sum()
    return diameter * jnp.linalg.svd(grads, compute_uv=False).sum()
