"""Transformers with parts left out: switches of their parts, layers of different sizes, hard attention."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax.core.errors import check_number

__all__ = ["Gates", "LayerShape", "keep_largest"]


class Gates(NamedTuple):
    """Switches of a transformer's parts: 1 where a part works as usual, 0 where it gives nothing.

    Of one layer the same without the leading axis.

    Attributes:
      attention: [layers], of what an attention block adds, its output bias included.
      mlp: [layers], of what a feed-forward block adds, its output bias included.
      heads: [layers, heads], of the heads' contexts; of a model whose query heads share keys and values (GQA), the
        groups of query heads that share them.
      groups: [layers, groups], of groups of neighbouring neurons of the feed-forward blocks.
      hard: [layers], 1 where attention is hard: each query keeps its largest probabilities (``keep_largest``).
    """

    attention: Any
    mlp: Any
    heads: Any
    groups: Any
    hard: Any


class LayerShape(NamedTuple):
    """What is left of one layer.

    Attributes:
      heads: query heads; 0 where only the block's output bias is left, None where the block is gone.
      kv_heads: heads of keys and values.
      intermediate: neurons of the feed-forward block; 0 and None as for ``heads``.
      top_k: hard attention, see ``keep_largest``; None for soft attention.
    """

    heads: int | None
    kv_heads: int | None
    intermediate: int | None
    top_k: int | float | None = None


def keep_largest(
    probabilities: Float[Array | np.ndarray, "*rows keys"], top_k: int | float
) -> Float[Array, "*rows keys"]:
    r"""Hard attention: each query keeps its largest probabilities, the others become 0.

    .. math:: \tilde p_j = p_j [p_j \ge p_{(K)}]

    with :math:`p_{(K)}` the K-th largest; nothing is normalised again. Of equals at the edge all stay. Queries with
    at most K seen keys keep their bits. It saves nothing on XLA: to find the K-th largest costs more than it thins.

    Args:
      probabilities: [..., keys], of a softmax.
      top_k: K, 1 or more (above the number of keys it is that number), or a share below 1 of the keys whose
        probability is above 0, rounded up: of the real tokens.

    Returns:
      An array like ``probabilities``.

    Raises:
      ValueError: ``top_k`` not above 0, or a number above 1 that is no integer.

    Example:
      >>> keep_largest(jnp.array([0.5, 0.2, 0.3, 0.0]), 2).tolist() == [0.5, 0.0, jnp.float32(0.3).item(), 0.0]
      True
      >>> keep_largest(jnp.array([0.5, 0.2, 0.3, 0.0]), 0.3).tolist()
      [0.5, 0.0, 0.0, 0.0]

    Reference: Nagarajan et al. 2022, "AxFormer" (arXiv 2010.03688). Its code keeps exactly K of equals and takes
    K = 30.
    """
    check_top_k(top_k)
    p = jnp.asarray(probabilities)
    keys = p.shape[-1]
    if isinstance(top_k, int):
        if top_k >= keys:
            return p
        edge = jax.lax.top_k(p, top_k)[0][..., -1:]
    else:
        ordered = jnp.sort(p, axis=-1, descending=True)
        seen = jnp.sum(p > 0, axis=-1, keepdims=True, dtype=jnp.float32)
        place = jnp.ceil(np.float32(top_k) * seen).astype(jnp.int32) - 1
        edge = jnp.take_along_axis(ordered, jnp.maximum(place, 0), axis=-1)
    return jnp.where(p >= edge, p, jnp.zeros_like(p))


def check_top_k(top_k: int | float) -> int | float:
    """Refuse what is neither a count nor a share.

    Example:
      >>> check_top_k(1.5)
      Traceback (most recent call last):
      ValueError: top_k=1.5 must be a number in (0, 1). A count of keys is an integer from 1 on.
    """
    hint = "A count of keys is an integer from 1 on."
    if isinstance(top_k, float):
        return check_number("top_k", top_k, low=0, high=1, open_low=True, open_high=True, hint=hint)
    return check_number("top_k", top_k, low=1, integer=True)


def shape_of(entry: Any) -> LayerShape:
    """A ``LayerShape`` from what a configuration file says of a layer.

    Args:
      entry: an object with the fields of ``LayerShape``.

    Raises:
      ValueError: other fields, or values that are no sizes.

    Example:
      >>> shape_of({"heads": 2, "kv_heads": 2, "intermediate": None, "top_k": None})
      LayerShape(heads=2, kv_heads=2, intermediate=None, top_k=None)
    """
    if not isinstance(entry, dict) or set(entry) != set(LayerShape._fields):
        raise ValueError(f"{entry!r:.80} must be an object with {', '.join(LayerShape._fields)}.")
    shape = LayerShape(**entry)
    for name in ("heads", "kv_heads", "intermediate"):
        value = getattr(shape, name)
        if value is not None:
            check_number(name, value, low=0, integer=True)
    if (shape.heads is None) != (shape.kv_heads is None) or bool(shape.heads) != bool(shape.kv_heads):
        raise ValueError(f"heads={shape.heads} and kv_heads={shape.kv_heads}: both are gone, 0, or neither is.")
    if shape.top_k is not None:
        check_top_k(shape.top_k)
    return shape


def check_layer_shapes(shapes: tuple[LayerShape, ...], num_layers: int) -> None:
    """Refuse shapes of another number of layers, or heads that do not share keys and values evenly.

    Raises:
      ValueError: as above.
    """
    if len(shapes) != num_layers:
        raise ValueError(f"layer_shapes hold {len(shapes)} layers, but num_layers={num_layers}.")
    for index, shape in enumerate(shapes):
        if shape.heads and shape.heads % (shape.kv_heads or math.inf):
            raise ValueError(
                f"layer_shapes[{index}]: heads={shape.heads} must be a multiple of kv_heads={shape.kv_heads}."
            )
