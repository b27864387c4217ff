"""What pruning by search is held against: as many elements at random, or those of the smallest weights."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Key

from effjax.models.bert import BertClassifier
from effjax.models.pruned import Gates
from effjax.transformers.prune_spec import PruneSpec, prune_shape

__all__ = ["magnitude_scores", "random_spec", "ranked_spec"]

PyTree = Any


def random_spec(key: Key[Array, ""], spec: PruneSpec) -> PruneSpec:
    """As many blocks, heads and groups as a spec removes, drawn at random.

    Args:
      key: of the draw.
      spec: what is counted. Heads and groups are drawn from the blocks that stay; its hard attention stays as it is.

    Returns:
      A ``PruneSpec``.

    Example:
      >>> from effjax.transformers.prune_spec import PruneShape
      >>> spec = PruneSpec(PruneShape(layers=4, heads=3, groups=5), mlp=(0, 1), heads=((2, 0),))
      >>> {name: count for name, count in random_spec(jax.random.key(0), spec).removed.items() if count}
      {'mlp': 2, 'heads': 1}
    """
    draws = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    return ranked_spec(jax.tree.map(lambda gate: draws.random(np.shape(gate)), spec.gates()), spec)


def ranked_spec(scores: Gates, spec: PruneSpec) -> PruneSpec:
    """As many blocks, heads and groups as a spec removes: those of the lowest scores.

    Blocks are chosen first, heads and groups from the blocks that stay; of equals the first goes.

    Args:
      scores: importance of every element, in the form of ``Gates``; ``hard`` is not read.
      spec: what is counted; its hard attention stays as it is.

    Returns:
      A ``PruneSpec``.

    Raises:
      ValueError: scores of other sizes or with NaN, or fewer elements in the blocks that stay than must go.

    Example:
      >>> from effjax.transformers.prune_spec import PruneShape
      >>> spec = PruneSpec(PruneShape(layers=2, heads=2, groups=1), heads=((0, 0),))
      >>> scores = spec.gates()._replace(heads=np.array([[3.0, 2.0], [1.0, 4.0]]))
      >>> ranked_spec(scores, spec).heads
      ((1, 0),)
    """
    count = spec.removed
    scores = jax.tree.map(lambda gate: np.asarray(gate, np.float64), scores)
    for name, value, like in zip(Gates._fields[:4], scores[:4], spec.gates()[:4], strict=True):
        if value.shape != like.shape or np.isnan(value).any():
            raise ValueError(f"scores.{name} of shape {value.shape} must have shape {like.shape} and no NaN.")
    gone: dict[str, Any] = {name: tuple(_lowest(getattr(scores, name), count[name])) for name in ("attention", "mlp")}
    for name, block in (("heads", "attention"), ("groups", "mlp")):
        values = getattr(scores, name).copy()
        values[list(gone[block])] = np.inf
        if count[name] > np.isfinite(values).sum():
            raise ValueError(f"spec removes {count[name]} {name}, but the blocks that stay have fewer of finite score.")
        width = max(values.shape[1], 1)
        gone[name] = tuple((place // width, place % width) for place in _lowest(values.ravel(), count[name]))
    return dataclasses.replace(spec, **gone)


def _lowest(values: np.ndarray, count: int) -> list[int]:
    return np.argsort(values, kind="stable")[:count].tolist()


def magnitude_scores(module: nn.Module, params: PyTree, *, group_size: int = 256) -> Gates:
    r"""Root mean square of the weights that go with every element.

    .. math:: s = \sqrt{\tfrac1n \sum_j w_j^2}

    over the kernels' columns and rows of a head or group, or all kernels of a block.

    Args:
      module: ``Bert``, ``BertClassifier`` or ``Decoder``.
      params: its parameters.
      group_size: of ``prune_shape``.

    Returns:
      Scores for ``ranked_spec``.

    Raises:
      ValueError: as ``prune_shape``.

    Example:
      >>> from effjax.models import Bert
      >>> module = Bert(30, 8, num_layers=2, num_heads=2, intermediate_size=16)
      >>> shapes = jax.eval_shape(module.init, jax.random.key(0), np.ones((1, 3), int))["params"]
      >>> params = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5), shapes)
      >>> magnitude_scores(module, params, group_size=4).groups.tolist()
      [[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]
    """
    shape = prune_shape(module, group_size=group_size)
    body: Any = module.encoder if isinstance(module, BertClassifier) else module
    held = params["encoder"] if isinstance(module, BertClassifier) else params
    kernel = lambda layer, name: np.asarray(_kernel(held, layer, name, body.scan_layers), np.float64) ** 2
    gates = [np.zeros(size) for size in ((shape.layers,), (shape.layers,))]
    parts = [np.zeros((shape.layers, count)) for count in (shape.heads, shape.groups)]
    blocks = (
        ("attention", ("query", "key", "value"), "output"),
        ("mlp", ("gate", "up") if shape.mlp_matrices == 3 else ("up",), "down"),
    )
    for layer in range(shape.layers):
        for place, (block, columns, rows) in enumerate(blocks):
            squares = [kernel(layer, f"{block}/{name}").T for name in columns] + [kernel(layer, f"{block}/{rows}")]
            count = parts[place].shape[1]
            each = [square.reshape(count, -1) for square in squares]  # of one element a row
            sizes = sum(part.shape[1] for part in each)
            totals = np.sum([part.sum(1) for part in each], axis=0)
            parts[place][layer] = np.sqrt(totals / sizes)
            gates[place][layer] = np.sqrt(totals.sum() / (sizes * count))
    return Gates(gates[0], gates[1], parts[0], parts[1], np.zeros(shape.layers))


def _kernel(held: PyTree, layer: int, name: str, scanned: bool) -> Any:
    block, part = name.split("/")
    return held["layers"][block][part]["kernel"][layer] if scanned else held[f"layer_{layer}"][block][part]["kernel"]
