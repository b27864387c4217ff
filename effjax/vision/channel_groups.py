"""Groups of hidden units that are skipped for each example: grouped matrix products, a ladder a group, or slices."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from effjax.core.errors import check_choice, check_number, check_shape
from effjax.core.slots import in_least_bucket
from effjax.core.tree import wide
from effjax.vision.gated_executors import block_rungs

__all__ = ["grouped_mlp", "open_channels"]

Kernel = Float[Array | np.ndarray, "inputs hidden"]
Bias = Float[Array | np.ndarray, "hidden"]


def grouped_mlp(
    x: Float[Array | np.ndarray, "rows *places inputs"],
    gates: Float[Array | np.ndarray, "rows groups"],
    first: tuple[Kernel, Bias],
    second: Float[Array | np.ndarray, "hidden outputs"],
    *,
    activation: Callable[[Array], Array] = jax.nn.relu,
    executor: Literal["masked", "ragged", "ladder"] = "ladder",
) -> Float[Array, "rows *places outputs"]:
    r"""Two dense layers, or 1x1 convolutions, whose hidden units are gated in groups for every example.

    .. math:: y_i = \sum_{g: s_{ig} > 0} s_{ig}\, W_2^{(g)} \sigma(W_1^{(g)} x_i + b_1^{(g)})

    which is a mixture of experts, its experts the groups of units. *ragged* sorts the open pairs (example, group) and
    multiplies them by ``jax.lax.ragged_dot``, in the least of eight numbers of pairs: on TPUs and GPUs. *ladder* runs
    each group on its open examples, in the least of eight sizes: on CPUs, where XLA multiplies every pair by every
    group's matrix. *masked* runs everything and is for training.

    Args:
      x: inputs; axes between rows and inputs, such as the pixels of a 1x1 convolution, share an example's gates.
      gates: s of every example and group, 0 where it is closed.
      first: W_1 [inputs, hidden] and b_1 [hidden]; group g holds the g-th part of the hidden units.
      second: W_2 [hidden, outputs].
      activation: sigma.
      executor: how it runs; all agree but for rounding.

    Returns:
      y, in the dtype of x.

    Raises:
      ValueError: shapes that do not fit, or hidden units that do not divide among the groups.

    Example:
      >>> x, gates = jnp.ones((2, 3)), jnp.array([[1.0, 0.0], [0.0, 0.0]])
      >>> grouped_mlp(x, gates, (jnp.ones((3, 4)), jnp.zeros(4)), jnp.ones((4, 1))).ravel().tolist()
      [6.0, 0.0]

    Groups of 128 units and more fill the tiles of accelerators; single channels do not.
    """
    check_choice("executor", executor, ("masked", "ragged", "ladder"))
    x, gates = jnp.asarray(x), wide(gates)
    (kernel, bias), groups = first, gates.shape[1]
    inputs, hidden = kernel.shape
    check_shape("first[1]", bias, (hidden,), "One for each hidden unit.")
    check_shape("second", second, (hidden, second.shape[-1]), "As many rows as the first layer has columns.")
    check_shape("x", x, (*x.shape[:-1], inputs), "As many inputs as the first layer has rows.")
    check_shape("gates", gates, (x.shape[0], groups), "One number for each row and group.")
    if hidden % max(groups, 1) or not groups:
        raise ValueError(f"gates of {groups} groups do not divide the {hidden} hidden units. Give a divisor.")
    rows, each = x.shape[0], hidden // groups
    flat = x.reshape(rows, -1, inputs)
    parts = (
        jnp.asarray(kernel).reshape(inputs, groups, each).transpose(1, 0, 2),
        jnp.asarray(bias).reshape(groups, each),
        jnp.asarray(second).reshape(groups, each, -1),
    )
    y = {"masked": _masked, "ragged": _ragged, "ladder": _ladder}[executor](flat, gates, parts, activation)
    return y.astype(x.dtype).reshape(*x.shape[:-1], second.shape[-1])


Parts = tuple[Array, Array, Array]


def _masked(x: Array, gates: Array, parts: Parts, activation: Callable[[Array], Array]) -> Array:
    kernel, bias, second = parts
    h = activation(jnp.einsum("npi,gih->npgh", x, kernel) + bias[None, None])
    return jnp.einsum("npgh,gho->npo", h * gates.astype(h.dtype)[:, None, :, None], second)


def _ladder(x: Array, gates: Array, parts: Parts, activation: Callable[[Array], Array]) -> Array:
    rows, places, _ = x.shape
    y = jnp.zeros((rows, places, parts[2].shape[-1]), x.dtype)

    def run(slots: Array, x: Array, gate: Array, y: Array, kernel: Array, bias: Array, second: Array) -> Array:
        if not slots.shape[0]:
            return y
        taken = jnp.where(slots < rows, slots, 0)
        h = activation(x[taken] @ kernel + bias) * gate[taken].astype(x.dtype)[:, None, None]
        return y.at[slots].add(h @ second, mode="drop")

    for group in range(gates.shape[1]):
        gate, own = gates[:, group], [part[group] for part in parts]
        own[1] = own[1][None, None]
        buckets = block_rungs(max(rows, 1))
        y = in_least_bucket(
            run, ~(gate <= 0), x, gate, y, *own, buckets=buckets, caller="grouped_mlp", instead="executor='masked'"
        )
    return y


def _ragged(x: Array, gates: Array, parts: Parts, activation: Callable[[Array], Array]) -> Array:
    rows, places, inputs = x.shape
    groups, outputs = gates.shape[1], parts[2].shape[-1]
    request = ~(gates <= 0)

    def run(slots: Array, x: Array, gates: Array, counts: Array, *parts: Array) -> Array:
        kernel, bias, second = parts
        y = jnp.zeros((rows, places, outputs), x.dtype)
        if not slots.shape[0]:
            return y
        # Pairs are numbered group by group, so that they come sorted.
        real = slots < rows * groups
        group, row = jnp.where(real, slots // rows, 0), jnp.where(real, slots % rows, 0)
        pairs = x[row].reshape(-1, inputs)
        h = jax.lax.ragged_dot(pairs, kernel, counts * places).reshape(-1, places, kernel.shape[-1])
        h = activation(h + bias[group][:, None]) * gates[row, group].astype(x.dtype)[:, None, None]
        found = jax.lax.ragged_dot(h.reshape(-1, kernel.shape[-1]), second, counts * places)
        return y.at[jnp.where(real, row, rows)].add(found.reshape(-1, places, outputs), mode="drop")

    counts = request.sum(0, dtype=jnp.int32)
    buckets = block_rungs(max(rows * groups, 1))
    operands = (x, gates, counts, *parts)
    return in_least_bucket(
        run, request.T.reshape(-1), *operands, buckets=buckets, caller="grouped_mlp", instead="executor='masked'"
    )


def open_channels(
    branch: Callable[[PyTree, Array], Array],
    params: PyTree,
    axes: PyTree,
    x: Float[Array | np.ndarray, "1 *rest"],
    gates: Float[Array | np.ndarray, "groups"],
) -> Array:
    r"""Run a branch on the open groups of its channels alone: for a batch of one.

    The weights of the open groups are gathered, and one program holds a branch for every number of them; only that one
    is run. Any branch will do whose answer is a sum over its channels but for what all of them share.

    Args:
      branch: ``(params, x) -> array``, for parameters of any number of channels. Factors of the channels, such as the
        gates themselves, are among its parameters.
      params: the parameters of all channels.
      axes: a tree like ``params``: the axis of the gated channels in each leaf, -1 being the last; None where there is
        none. ``{"conv1": 3, "norm1": {"scale": 0, "bias": 0}, "conv2": 2, "norm2": None, "gate": 0}``.
      x: one example.
      gates: of every group of channels, 0 where it is closed. With none open the branch runs on one closed group.

    Returns:
      The branch's answer.

    Raises:
      ValueError: more than one example, channels that do not divide among the groups, or no gated axis.

    Example:
      >>> params = {"in": jnp.ones((2, 4)), "out": jnp.ones((4, 1)), "gate": jnp.array([1.0, 1.0, 0.0, 0.0])}
      >>> run = lambda p, x: (x @ p["in"] * p["gate"][None]) @ p["out"]
      >>> open_channels(run, params, {"in": 1, "out": 0, "gate": 0}, jnp.ones((1, 2)), jnp.array([1.0, 0.0])).item()
      4.0
    """
    if jnp.shape(x)[:1] != (1,):
        raise ValueError(f"x has shape {jnp.shape(x)}: open_channels takes one example. Use grouped_mlp for batches.")
    groups = gates.shape[0]
    check_number("groups", groups, low=1, integer=True)
    leaves, structure = jax.tree.flatten(params)
    along = structure.flatten_up_to(axes)
    gated = [(leaf.shape[axis], axis) for leaf, axis in zip(leaves, along, strict=True) if axis is not None]
    if not gated:
        raise ValueError("axes name no gated channel. Give the axis of the channels in each of params' leaves.")
    for size, axis in gated:
        if size % groups:
            raise ValueError(f"{size} channels on axis {axis} do not divide among {groups} groups of gates.")
    request = ~(wide(gates) <= 0)
    order = jnp.argsort(~request, stable=True)

    def sliced(count: int, leaves: list[Array], x: Array, order: Array) -> Array:
        taken = jnp.sort(order[:count])
        some = [_some(leaf, axis, groups, taken) for leaf, axis in zip(leaves, along, strict=True)]
        return branch(jax.tree.unflatten(structure, some), x)

    choices = [functools.partial(sliced, count) for count in range(1, groups + 1)]
    place = jnp.maximum(request.sum(), 1) - 1
    return jax.lax.switch(place, choices, leaves, jnp.asarray(x), order)


def _some(leaf: Any, axis: int | None, groups: int, taken: Array) -> Array:
    """The groups of channels in ``taken``, along an axis."""
    leaf = jnp.asarray(leaf)
    if axis is None:
        return leaf
    axis = axis % leaf.ndim
    each = leaf.shape[axis] // groups
    split = leaf.reshape(*leaf.shape[:axis], groups, each, *leaf.shape[axis + 1 :])
    found = jnp.take(split, taken, axis=axis)
    return found.reshape(*leaf.shape[:axis], -1, *leaf.shape[axis + 1 :])
