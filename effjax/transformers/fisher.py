"""Pruning by the Fisher information of gates: which heads and groups cost least, to a stated share of the work."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.core.errors import check_number, check_shape
from effjax.transformers.gated import sample_losses
from effjax.transformers.prune_spec import PruneShape, PruneSpec, all_gates
from effjax.transformers.validation import PruneBatch

__all__ = ["GateFisher", "fisher_spec", "gate_fisher"]

PyTree = Any


class GateFisher(NamedTuple):
    """Fisher information of the gates, within every layer.

    Attributes:
      heads: [layers, heads, heads].
      groups: [layers, groups, groups].
    """

    heads: Any
    groups: Any


def gate_fisher(
    apply: Callable[..., Any],
    params: PyTree,
    shape: PruneShape,
    batches: Sequence[PruneBatch],
    *,
    loss: Callable[[Any, Any], jax.Array] = sample_losses,
) -> GateFisher:
    r"""Empirical Fisher information of the gates at the whole model.

    .. math:: F_{ij} = \tfrac1M \sum_{n=1}^{M} \frac{\partial \ell_n}{\partial g_i} \frac{\partial \ell_n}{\partial g_j}

    Args:
      apply: ``(params, inputs, gates) -> outputs``: of ``gated_apply``, or your own.
      params: its parameters.
      shape: the model's elements.
      batches: of ``prune_batches``.
      loss: ``(outputs, labels) -> [rows]``.

    Returns:
      A ``GateFisher``, float64 NumPy arrays.

    Raises:
      ValueError: no batch.

    Example:
      >>> from effjax.transformers.validation import prune_batches
      >>> apply = lambda params, x, gates: x * (2 * gates.heads[0] - 1)[None]
      >>> batches = prune_batches(np.array([[0.0, 1.0]]), np.array([1]))
      >>> found = gate_fisher(apply, None, PruneShape(layers=1, heads=2, groups=1), batches)
      >>> (found.heads.round(3) + 0.0).tolist()
      [[[0.0, 0.0], [0.0, 0.289]]]
    """
    if not batches:
        raise ValueError("batches are empty. Give at least one, of prune_batches.")
    gates = jax.tree.map(jnp.asarray, all_gates(shape))

    @jax.jit
    def information(params, batch, weights):
        def one(inputs, labels):
            alone = jax.tree.map(lambda leaf: leaf[None], (inputs, labels))
            value = lambda gates: loss(apply(params, alone[0], gates), alone[1])[0]
            return jax.grad(value)(gates)

        grads = jax.vmap(one)(*batch)
        total = lambda grad: jnp.einsum("n,nli,nlj->lij", weights, grad, grad)
        return total(grads.heads), total(grads.groups)

    found = []
    for batch in batches:
        real = (np.asarray(batch.rows) >= 0).astype(np.float32)
        found.append(jax.device_get(information(params, (batch.inputs, batch.labels), real)))
    rows = sum(int((np.asarray(batch.rows) >= 0).sum()) for batch in batches)
    return GateFisher(*(np.sum([part[i] for part in found], axis=0, dtype=np.float64) / rows for i in range(2)))


def fisher_spec(fisher: GateFisher, shape: PruneShape, *, macs: float, length: int) -> PruneSpec:
    r"""The heads and groups whose loss costs least, to a share of the layers' multiply-accumulates.

    With the set R of what is removed, the loss rises by about :math:`\tfrac12 \sum_l 1_R^\top F_l 1_R`. First by the
    diagonal: for every number of heads the least important go, and as many groups as the rest asks for; the best split
    counts. Then within every layer elements are swapped for as long as the full form falls.

    Args:
      fisher: of ``gate_fisher``.
      shape: the model's elements, with sizes.
      macs: share of the multiply-accumulates that may stay, above 0, below 1.
      length: tokens of a sequence, for the cost of attention.

    Returns:
      A ``PruneSpec`` of at most that share.

    Raises:
      ValueError: a share that removing everything does not reach, sizes of another model, or a shape without sizes.

    Example:
      >>> shape = PruneShape(1, 2, 2, hidden_size=4, head_width=2, kv_width=2, group_size=2)
      >>> fisher = GateFisher(np.diag([1.0, 9.0])[None], np.diag([9.0, 9.0])[None])
      >>> fisher_spec(fisher, shape, macs=0.7, length=1).heads
      ((0, 0),)

    Reference: Kwon, Kim, Mahoney, Hassoun, Keutzer, Gholami 2022, "A Fast Post-Training Pruning Framework for
    Transformers" (arXiv 2204.09656). They prune single neurons, here groups of them, and tune the mask where
    ``repair_outputs`` refits the output layers.
    """
    check_number("macs", macs, low=0, high=1, open_low=True, open_high=True)
    check_number("length", length, low=1, integer=True)
    check_shape("fisher.heads", fisher.heads, (shape.layers, shape.heads, shape.heads), "Of this shape.")
    check_shape("fisher.groups", fisher.groups, (shape.layers, shape.groups, shape.groups), "Of this shape.")
    PruneSpec(shape).kept_macs(length)  # refuses a shape without sizes
    head, group = shape.macs_of("head", length), shape.macs_of("group", length)
    surplus = (1 - macs) * shape.layers * (shape.heads * head + shape.groups * group)
    diagonals = [np.diagonal(np.asarray(part), axis1=1, axis2=2).ravel() for part in fisher]
    orders = [np.argsort(diagonal, kind="stable") for diagonal in diagonals]
    costs = [np.r_[0.0, np.cumsum(diagonal[order])] for diagonal, order in zip(diagonals, orders, strict=True)]
    best, split = np.inf, (0, 0)
    for heads in range(len(orders[0]) + 1):
        groups = max(0, -(-int(np.ceil(surplus - heads * head)) // group))
        if groups <= len(orders[1]) and costs[0][heads] + costs[1][groups] < best:
            best, split = costs[0][heads] + costs[1][groups], (heads, groups)
    places = []
    for part, order, count in zip(fisher, orders, split, strict=True):
        removed = np.zeros(order.size, bool)
        removed[order[:count]] = True
        removed = removed.reshape(shape.layers, -1)
        swapped = [swap_within(np.asarray(matrix), gone) for matrix, gone in zip(part, removed, strict=True)]
        places.append(tuple((layer, int(i)) for layer, gone in enumerate(swapped) for i in np.flatnonzero(gone)))
    return PruneSpec(shape, heads=places[0], groups=places[1])


def swap_within(matrix: Float[np.ndarray | Array, "elements elements"], removed: np.ndarray) -> np.ndarray:
    """Swap a removed element for a kept one while ``1_R F 1_R`` falls, the best swap first.

    Args:
      matrix: F of one layer.
      removed: bool [elements].

    Returns:
      bool [elements], as many True.

    Example:
      >>> correlated = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.5]])
      >>> swap_within(correlated, np.array([True, True, False])).tolist()
      [False, True, True]
    """
    removed = np.array(removed, bool)
    cost = lambda mask: float(mask @ matrix @ mask)
    while True:
        swaps = list(itertools.product(np.flatnonzero(removed), np.flatnonzero(~removed)))
        tried = []
        for out, into in swaps:
            other = removed.copy()
            other[[out, into]] = False, True
            tried.append(cost(other.astype(float)))
        now = cost(removed.astype(float))
        if not tried or min(tried) >= now - 1e-12 * abs(now):
            return removed
        out, into = swaps[int(np.argmin(tried))]
        removed[[out, into]] = False, True
