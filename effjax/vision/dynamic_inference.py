"""Fully dynamic inference: a residual network whose blocks run only for the examples that need them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from effjax.core.errors import check_shape
from effjax.core.macs import count_macs
from effjax.core.slots import mesh_parts, over_mesh
from effjax.core.tree import wide
from effjax.vision.gated_executors import Executor, ResidualBlock, run_block
from effjax.vision.gates import Gate
from effjax.vision.mac_target import BlockGates, BlockMacs

__all__ = ["DynamicResult", "block_macs", "dynamic_inference", "network_gates"]


class DynamicResult(NamedTuple):
    """What a network of gated blocks gave.

    Attributes:
      outputs: of the last block.
      gates: float32 [rows, blocks], the gates' values; 1 for blocks without a gate.
      served: bool [rows, blocks], whose branch was run.
    """

    outputs: Array
    gates: Array
    served: Array

    @property
    def dropped(self) -> Array:
        """int32 [blocks], examples with an open gate that found no place; 0 but for a fixed capacity."""
        return jnp.sum(~(self.gates <= 0) & ~self.served, axis=0, dtype=jnp.int32)


def dynamic_inference(
    blocks: Sequence[ResidualBlock | Callable[[PyTree, Array], Array]],
    params: Sequence[tuple[PyTree, PyTree]],
    x: Float[Array | np.ndarray, "rows *rest"],
    *,
    gates: Float[Array | np.ndarray, "rows blocks"] | None = None,
    executor: Executor | str = "ladder",
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> DynamicResult:
    r"""Run a network of residual blocks, each only on the examples whose gate is open.

    .. math:: s_l = g_l(x_l), \qquad x_{l+1} = a_l(c_l(x_l) + s_l\, u_l(x_l)), \qquad u_l \text{ run where } s_l > 0

    Inference saves what is skipped: a gather to a size of the ladder, the branch on that many examples, a scatter. For
    training use ``executor="masked"``, which runs everything and is differentiable in the gates, with a loss such as
    ``mac_target_loss``.

    Args:
      blocks: the network; a bare function ``(params, x) -> x`` is a residual branch with an identity shortcut that
        always runs, see ``ResidualBlock``.
      params: per block the pair (parameters of branch and shortcut, parameters of the gate; None without one).
      x: a batch.
      gates: all gates, decided beforehand, such as by a policy that sees the input once; None for the blocks' own.
      executor: an ``Executor``, or its name: ``"ladder"``, ``"cond"`` for a batch of one, ``"map"``, ``"masked"``.
      key: for gates that draw, which are called with ``key=``; None calls them without.
      mesh: where the batch is sharded over ``axis`` of this mesh, every device gathers its own rows into a rung of its
        own, and a fixed capacity is divided among them.
      axis: name of the batch's axis in the mesh.

    Returns:
      A ``DynamicResult``.

    Raises:
      ValueError: lists of different lengths, shapes or settings that do not fit, or a ladder under ``vmap``.

    Example:
      >>> halve = ResidualBlock(lambda w, x: w * x, gate=lambda t, x: (x[:, 0] > t).astype(jnp.float32))
      >>> x = jnp.array([[1.0], [8.0]])
      >>> found = dynamic_inference([halve, halve], [(-0.5, 2.0), (-0.5, 5.0)], x)
      >>> found.outputs.ravel().tolist(), found.gates.tolist()
      ([1.0, 4.0], [[0.0, 0.0], [1.0, 0.0]])

    Xia, Yin, Dai, Jha, "Fully Dynamic Inference with Deep Neural Networks" (arXiv:2007.15151), of which only the
    abstract could be had: gates follow two public re-implementations; losses and executors are ours. On accelerators a
    block pays only above the size that ``break_even`` tells.
    """
    network = [block if isinstance(block, ResidualBlock) else ResidualBlock(block) for block in blocks]
    if len(params) != len(network) or not network:
        raise ValueError(f"params hold {len(params)} pairs for {len(network)} blocks: give one for each, and a block.")
    x = jnp.asarray(x)
    rows = x.shape[0]
    if gates is not None:
        check_shape("gates", gates, (rows, len(network)), "One number for each row and block.")
    how = executor if isinstance(executor, Executor) else Executor(executor)
    parts = mesh_parts(mesh, axis, rows)
    if parts > 1 and how.capacity is not None:
        if how.capacity % parts:
            raise ValueError(f"capacity={how.capacity} does not divide among the {parts} devices of axis {axis!r}.")
        how = how._replace(capacity=how.capacity // parts)
    keys = [None] * len(network) if key is None else list(jax.random.split(key, len(network)))

    def run(params: PyTree, x: Array, *given: Array) -> DynamicResult:
        values, served = [], []
        for place, (block, (own, of_gate), one) in enumerate(zip(network, params, keys, strict=True)):
            if given:
                value = wide(given[0][:, place])
            elif block.gate is None:
                value = jnp.ones(x.shape[0], jnp.float32)
            else:
                value = wide(block.gate(of_gate, x) if one is None else block.gate(of_gate, x, key=one))
            if block.gate is None and not given:  # always runs
                x, done = _whole(block, own, x), jnp.ones(x.shape[0], bool)
            else:
                x, done = run_block(block, own, x, value, executor=how)
            values.append(value)
            served.append(done)
        return DynamicResult(x, jnp.stack(values, 1), jnp.stack(served, 1))

    pairs = [tuple(pair) for pair in params]
    return over_mesh(mesh, axis, run, rows)(pairs, x, *(() if gates is None else (jnp.asarray(gates),)))


def block_macs(
    blocks: Sequence[ResidualBlock | Callable[[PyTree, Array], Array]],
    params: Sequence[tuple[PyTree, PyTree]],
    x: Float[Array | np.ndarray, "rows *rest"],
) -> list[BlockMacs]:
    """What every block of a network costs for one example, counted from its functions.

    Args:
      blocks: as for ``dynamic_inference``.
      params: per block the pair of parameters.
      x: a batch, of which the first example is looked at.

    Returns:
      ``BlockMacs`` of every block, for ``BlockGates`` and the losses on them.

    Raises:
      ValueError: a block that cannot be counted.

    Example:
      >>> [macs.once for macs in block_macs([lambda w, x: x @ w], [(jnp.ones((4, 4)), None)], jnp.ones((2, 4)))]
      [16.0]
    """
    found, row = [], jax.eval_shape(lambda x: x[:1], x)
    for place, (block, (own, of_gate)) in enumerate(zip(blocks, params, strict=True)):
        block = block if isinstance(block, ResidualBlock) else ResidualBlock(block)
        counts = [_count(place, "branch", block.branch, own, row)]
        counts.append(_count(place, "shortcut", block.shortcut, own, row))
        counts.append(_count(place, "gate", block.gate, of_gate, row))
        branch, always, gates = counts
        found.append(BlockMacs(once=branch, always=always, gates=gates))
        row = jax.eval_shape(lambda own, x, block=block: _whole(block, own, x), own, row)
    return found


def network_gates(found: DynamicResult, macs: Sequence[BlockMacs]) -> list[BlockGates]:
    """The gates of a run as the losses take them; open where the value is above 0, with the value's gradient.

    Args:
      found: of ``dynamic_inference`` with ``executor="masked"``.
      macs: of ``block_macs``.

    Returns:
      ``BlockGates`` of every block.

    Raises:
      ValueError: not one ``BlockMacs`` for each block.

    Example:
      >>> result = DynamicResult(jnp.ones((2, 1)), jnp.array([[0.5], [0.0]]), jnp.ones((2, 1), bool))
      >>> network_gates(result, [BlockMacs(once=1.0)])[0].layer.open.tolist()
      [1.0, 0.0]
    """
    check_shape("macs", np.zeros(len(macs)), (found.gates.shape[1],), "One for each block.")
    values = [found.gates[:, place] for place in range(len(macs))]
    hard = lambda value: (value > 0).astype(value.dtype) + (value - jax.lax.stop_gradient(value))
    return [BlockGates(Gate(value, hard(value)), None, one) for value, one in zip(values, macs, strict=True)]


def _whole(block: ResidualBlock, own: Any, x: Array) -> Array:
    shortcut = x if block.shortcut is None else block.shortcut(own, x)
    return block.merged(shortcut, None, block.branch(own, x))


def _count(place: int, part: str, function: Any, params: PyTree, row: Any) -> float:
    if function is None:
        return 0.0
    count = count_macs(function, params, row).most
    if count is None:
        raise ValueError(f"the {part} of block {place} holds what cannot be counted. Give its BlockMacs by hand.")
    return float(count)
