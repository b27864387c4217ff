"""What the blocks of a transformer cost by what is left in them: counted, or measured where the model will run."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from effjax.core.errors import check_number
from effjax.core.timing import time_interleaved
from effjax.models.bert import BertClassifier
from effjax.models.pruned import LayerShape
from effjax.transformers.prune_spec import PruneShape, PruneSpec, prune_shape

__all__ = ["BlockCosts", "latency_of_blocks", "macs_of_blocks"]


class BlockCosts(NamedTuple):
    """What blocks cost by what is left in them, in any unit; a block that is gone costs nothing.

    Attributes:
      attention: [heads + 1], of an attention block with 0, 1, ... heads.
      mlp: [groups + 1], of a feed-forward block with 0, 1, ... groups.
      rest: of everything that cannot be pruned.
    """

    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    rest: float = 0.0

    def of(self, spec: PruneSpec) -> float:
        """The cost of what a spec leaves.

        Example:
          >>> costs = BlockCosts(attention=(0.0, 1.0, 2.0), mlp=(0.0, 5.0), rest=1.0)
          >>> costs.of(PruneSpec(PruneShape(layers=1, heads=2, groups=1), heads=((0, 1),)))
          7.0
        """
        gates = spec.gates()
        heads, groups = (gate.sum(1).astype(int) for gate in (gates.heads, gates.groups))
        blocks = (gates.attention @ np.array(self.attention)[heads], gates.mlp @ np.array(self.mlp)[groups])
        return float(self.rest + sum(blocks))


def macs_of_blocks(shape: PruneShape, length: int) -> BlockCosts:
    """Multiply-accumulates of a token in sequences of ``length`` tokens, as costs.

    Args:
      shape: of the model.
      length: tokens of a sequence.

    Returns:
      ``BlockCosts`` of a token, in multiply-accumulates.

    Raises:
      ValueError: a shape without sizes, or a length below 1.

    Example:
      >>> shape = PruneShape(1, 2, 1, hidden_size=4, head_width=2, kv_width=2, group_size=8)
      >>> macs_of_blocks(shape, 1)
      BlockCosts(attention=(0.0, 36.0, 72.0), mlp=(0.0, 64.0), rest=0.0)
    """
    PruneSpec(shape).kept_macs(length)  # refuses a shape without sizes
    head, group = shape.macs_of("head", length), shape.macs_of("group", length)
    return BlockCosts(
        tuple(float(count * head) for count in range(shape.heads + 1)),
        tuple(float(count * group) for count in range(shape.groups + 1)),
    )


def latency_of_blocks(
    module: nn.Module, *, rows: int, length: int, group_size: int = 256, rounds: int = 20, least_s: float = 0.005
) -> BlockCosts:
    """Time models of one layer with 0, 1, ... heads or groups: the table that ``prune_to_cost`` reads.

    One program for every size of a block, timed in turns in one process; a number is the median less that of a layer
    without blocks. What lies below that, or below a smaller block, is noise: costs are made to rise with the size.

    Args:
      module: ``Bert``, ``BertClassifier`` or ``Decoder`` with whole layers.
      rows: of the batch that is to be fast.
      length: tokens of its rows.
      group_size: of ``prune_shape``.
      rounds: samples of each program.
      least_s: seconds of one sample at least.

    Returns:
      ``BlockCosts`` in milliseconds of a batch; ``rest`` is the model without blocks.

    Raises:
      ValueError: as ``prune_shape``, or numbers below 1.

    Example:
      >>> from effjax.models import Bert
      >>> module = Bert(30, 8, num_layers=2, num_heads=2, intermediate_size=8)
      >>> costs = latency_of_blocks(module, rows=1, length=4, group_size=8, rounds=1, least_s=0.0)
      >>> len(costs.attention), len(costs.mlp), costs.rest > 0
      (3, 2, True)
    """
    for name, value in (("rows", rows), ("length", length), ("rounds", rounds)):
        check_number(name, value, low=1, integer=True)
    shape = prune_shape(module, group_size=group_size)
    body: Any = module.encoder if isinstance(module, BertClassifier) else module
    per_head = body.num_heads // shape.heads
    heads = [LayerShape(count * per_head, count, None) for count in range(shape.heads + 1)]
    groups = [LayerShape(None, None, count * group_size) for count in range(shape.groups + 1)]
    ids = np.zeros((rows, length), np.int32)
    calls = {}
    for left in (LayerShape(None, None, None), *heads, *groups):
        small = body.clone(num_layers=1, layer_shapes=(left,), scan_layers=False)
        own = module.clone(encoder=small) if isinstance(module, BertClassifier) else small
        shapes = jax.eval_shape(own.init, jax.random.key(0), ids)
        # The clock does not depend on the values.
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        calls[left] = functools.partial(jax.jit(own.apply), jax.device_put(params), ids)
    times = {
        left: timing.median_ms for left, timing in time_interleaved(calls, rounds=rounds, min_time=least_s).items()
    }
    rest = times[LayerShape(None, None, None)]
    rising = lambda sizes: tuple(np.maximum.accumulate([max(times[left] - rest, 0.0) for left in sizes]).tolist())
    return BlockCosts(rising(heads), rising(groups), rest)
