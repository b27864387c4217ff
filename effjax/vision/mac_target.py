"""Work that gates leave, counted for each example, and the losses that hold it to a target."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from effjax.core.errors import check_number
from effjax.core.rows import row_mean
from effjax.core.tree import wide
from effjax.vision.gates import Gate

__all__ = [
    "BlockGates",
    "BlockMacs",
    "example_macs",
    "gate_statistics",
    "gate_target",
    "mac_fraction",
    "mac_target_loss",
    "open_rate_loss",
    "static_macs",
]

Number = float | Float[Array, ""]
Step = int | float | Num[Array | np.ndarray, ""]
Mask = Bool[Array | np.ndarray, "rows"]


class BlockMacs(NamedTuple):
    """Multiply-accumulates of one gated block for one example.

    Attributes:
      once: of the branch, whichever channels are open.
      channel: of the branch, for each open channel.
      channels: number of gated channels; without channel gates ``channel * channels`` counts as a whole.
      always: of the shortcut, which a closed layer spends too.
      gates: of the gates themselves.
    """

    once: float
    channel: float = 0.0
    channels: int = 1
    always: float = 0.0
    gates: float = 0.0


class BlockGates(NamedTuple):
    """What the gates of one block decided about a batch.

    Attributes:
      layer: a ``Gate`` of [rows]; None where the layer always runs.
      channel: a ``Gate`` of [rows, groups]; None where all channels do.
      macs: what they cost.
    """

    layer: Gate | None
    channel: Gate | None
    macs: BlockMacs


def example_macs(blocks: Sequence[BlockGates]) -> Float[Array, "rows"]:
    r"""Multiply-accumulates that an ideal executor spends on every example.

    .. math:: \sum_l m^{always}_l + m^{gates}_l + o_l (m^{once}_l + m^{channel}_l \sum_c o_{lc})

    with o the hard gates; gradients pass to them straight through.

    Args:
      blocks: the gates of every block.

    Returns:
      float32 [rows]; conv and matrix products, a multiply-add counted once.

    Raises:
      ValueError: no block, or none that is gated.

    Example:
      >>> layer = Gate(jnp.array([1.0, 0.0]), jnp.array([1.0, 0.0]))
      >>> example_macs([BlockGates(layer, None, BlockMacs(once=100.0, always=5.0, gates=1.0))]).tolist()
      [106.0, 6.0]
    """
    some = wide(_some_gate(blocks))
    total = jnp.zeros(some.shape[0], some.dtype)
    for layer, channel, macs in blocks:
        share = jnp.ones_like(total) if channel is None else wide(channel.open).mean(-1)
        branch = macs.once + macs.channel * macs.channels * share
        total = total + macs.always + macs.gates + (branch if layer is None else wide(layer.open) * branch)
    return total


def static_macs(blocks: Sequence[BlockGates]) -> Number:
    """Multiply-accumulates of the same blocks for one example without gates.

    Args:
      blocks: the gates of every block.

    Returns:
      A number.

    Example:
      >>> static_macs([BlockGates(None, None, BlockMacs(once=100.0, channel=2.0, channels=8, gates=1.0))])
      116.0
    """
    return sum(macs.once + macs.channel * macs.channels + macs.always for _, _, macs in blocks)


def mac_fraction(blocks: Sequence[BlockGates], *, rest: float = 0.0, mask: Mask | None = None) -> Float[Array, ""]:
    r"""Expected work over that of the network without gates.

    .. math:: f = \frac{\mathrm{mean}_i\, m_i + r}{m^{static} + r}

    Args:
      blocks: the gates of every block.
      rest: r, multiply-accumulates outside the blocks for one example: stem and head.
      mask: examples that take part.

    Returns:
      A number; above 1 by what the gates cost where all are open.

    Raises:
      ValueError: ``rest`` below 0.

    Example:
      >>> gate = jnp.array([1.0, 0.0])
      >>> mac_fraction([BlockGates(Gate(gate, gate), None, BlockMacs(once=100.0))]).item()
      0.5
    """
    check_number("rest", rest, low=0)
    return (row_mean(example_macs(blocks), mask) + rest) / (static_macs(blocks) + rest)


def mac_target_loss(
    blocks: Sequence[BlockGates],
    target: Number,
    *,
    weight: float = 4.0,
    rest: float = 0.0,
    mask: Mask | None = None,
) -> Float[Array, ""]:
    r"""Penalty on work above a target, to be added to the cross-entropy.

    .. math:: \lambda \max(0, f - \tau)^2

    Args:
      blocks: the gates of every block.
      target: tau, the fraction of the network's multiply-accumulates; see ``gate_target``.
      weight: lambda.
      rest: multiply-accumulates outside the blocks for one example.
      mask: examples that take part.

    Returns:
      A number.

    Raises:
      ValueError: numbers out of range, or no gate.

    Example:
      >>> gate = jnp.array([1.0, 1.0])
      >>> mac_target_loss([BlockGates(Gate(gate, gate), None, BlockMacs(once=100.0))], 0.5).item()
      1.0

    The paper's penalty could not be found. A sum of saliences thins channels and closes no layer, as the values shrink
    while the normalisation's gain grows; a hinge on what is counted as open does.

    Source: Xia, Yin, Dai, Jha 2021, IEEE TETC, arXiv:2007.15151; reconstructed from re-implementations.
    """
    check_number("target", target, low=0)
    check_number("weight", weight, low=0)
    excess = jax.nn.relu(mac_fraction(blocks, rest=rest, mask=mask) - target)
    return weight * excess**2


def gate_target(
    step: int | float | Num[Array | np.ndarray, ""],
    steps: int,
    target: float,
    *,
    warm_up: float = 1 / 3,
    anneal: float = 1 / 3,
) -> Float[Array, ""]:
    r"""The target of a step: 1 during the warm-up, then linearly down to its end value.

    .. math:: \tau(t) = 1 - (1 - \tau) \min(1, \max(0, (t / T - w) / a))

    Args:
      step: t, from 0.
      steps: T, of the run.
      target: tau, the end value.
      warm_up: w, share of the run without pressure; gates start open and learn what they are for.
      anneal: a, share of the run in which the target falls; 0 for a jump.

    Returns:
      A number.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> [round(float(gate_target(step, 90, 0.5)), 3) for step in (0, 30, 45, 60, 89)]
      [1.0, 1.0, 0.75, 0.5, 0.5]
    """
    check_number("steps", steps, low=1, integer=True)
    check_number("target", target, low=0, high=1)
    check_number("warm_up", warm_up, low=0, high=1)
    check_number("anneal", anneal, low=0, high=1 - warm_up + 1e-9)
    past = jnp.asarray(step, jnp.float32) / steps - warm_up
    return 1.0 - (1.0 - target) * jnp.clip(past / max(anneal, 1e-6), 0.0, 1.0)


def open_rate_loss(
    blocks: Sequence[BlockGates], targets: float | Sequence[float], *, weight: float = 2.0, mask: Mask | None = None
) -> Float[Array, ""]:
    r"""ConvNet-AIG's penalty: every layer gate is held to an open rate of its own.

    .. math:: \lambda\, \mathrm{mean}_l (t_l - \mathrm{mean}_i\, o_{li})^2

    Args:
      blocks: the gates of every block; those without a layer gate take no part.
      targets: t, one number or one for each gated layer.
      weight: lambda.
      mask: examples that take part.

    Returns:
      A number.

    Raises:
      ValueError: numbers out of range, another number of targets, or no gated layer.

    Example:
      >>> gate = jnp.array([1.0, 0.0])
      >>> round(open_rate_loss([BlockGates(Gate(gate, gate), None, BlockMacs(once=1.0))], 0.7).item(), 6)
      0.08

    Veit and Belongie 2018 (arXiv:1711.11503).
    """
    check_number("weight", weight, low=0)
    gates = [layer.open for layer, _, _ in blocks if layer is not None]
    if not gates:
        raise ValueError("blocks hold no layer gate, so that there is no rate to hold. Use mac_target_loss.")
    wanted = [targets] * len(gates) if isinstance(targets, int | float) else list(targets)
    if len(wanted) != len(gates):
        raise ValueError(
            f"targets hold {len(wanted)} numbers for {len(gates)} gated layers: give one for each, or one."
        )
    for index, rate in enumerate(wanted):
        check_number(f"targets[{index}]", rate, low=0, high=1)
    means = jnp.stack([row_mean(wide(gate), mask) for gate in gates])
    return weight * jnp.mean((jnp.asarray(wanted, means.dtype) - means) ** 2)


def gate_statistics(
    gates: Float[Array | np.ndarray, "rows gates"] | Sequence[BlockGates],
) -> dict[str, float]:
    """Whether gates depend on their input, or only prune; on the host, over a whole data set.

    Args:
      gates: hard gates, or the gates of every block, of which those of layers are counted.

    Returns:
      ``open``, the mean; ``patterns``, the number of distinct rows; ``variance``, over inputs, the mean over gates (0
      where the network is pruned and not dynamic, 0.25 at most).

    Raises:
      ValueError: no gate.

    Example:
      >>> gate_statistics(np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]))["patterns"]
      2.0
    """
    if not hasattr(gates, "shape"):
        layers = [layer.open for layer, _, _ in gates if layer is not None]
        if not layers:
            raise ValueError("blocks hold no layer gate. Give the channel gates as an array.")
        gates = np.stack([np.asarray(layer) for layer in layers], 1)
    hard = np.asarray(gates) > 0
    if not hard.size:
        raise ValueError(f"gates have shape {hard.shape}: there is nothing to count.")
    return {
        "open": float(hard.mean()),
        "patterns": float(len(np.unique(hard, axis=0))),
        "variance": float(hard.var(axis=0).mean()),
    }


def _some_gate(blocks: Sequence[BlockGates]) -> Array:
    for layer, channel, _ in blocks:
        for gate in (layer, channel):
            if gate is not None:
                return jnp.asarray(gate.open)
    raise ValueError(f"blocks={len(blocks)} hold no gate, so that no example differs from another. Gate a layer.")
