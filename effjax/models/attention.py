"""Attention: which keys a query sees, positions, the products and their derivatives."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_choice
from effjax.core.tree import wide_dtype

Tokens = Int[Array | np.ndarray, "batch length"]
Mask = Bool[Array | np.ndarray, "batch length"]


def token_positions(input_ids: Tokens, segment_ids: Tokens | None = None) -> Int[Array, "rows length"]:
    """0, 1, ... along each row, from 0 again at the start of each packed segment.

    Args:
      input_ids: [batch, length].
      segment_ids: [batch, length], equal within a segment, or None for one segment a row.

    Returns:
      int32 [batch, length], or [1, length] without segments.

    Example:
      >>> token_positions(jnp.zeros((1, 5), int), jnp.array([[1, 1, 2, 2, 2]])).tolist()
      [[0, 1, 0, 1, 2]]
    """
    index = jnp.arange(jnp.shape(input_ids)[1], dtype=jnp.int32)[None]
    if segment_ids is None:
        return index
    segment_ids = jnp.asarray(segment_ids)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def attention_mask(mask: Mask | None, segment_ids: Tokens | None) -> Bool[Array, "batch 1 queries keys"] | None:
    """Which keys each query sees: real tokens, of its own segment where rows are packed.

    Args:
      mask: True at real tokens, or None.
      segment_ids: equal within a segment (0 at padding), or None.

    Returns:
      bool, broadcastable to [batch, heads, length, length]; None when everything is seen.

    Example:
      >>> attention_mask(None, jnp.array([[1, 1, 2]]))[0, 0].astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    seen = None if mask is None else jnp.asarray(mask)[:, None, None, :]
    if segment_ids is None:
        return seen
    segment_ids = jnp.asarray(segment_ids)
    same = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & (segment_ids != 0)[:, None, None, :]
    return same if seen is None else same & seen


def attend(
    query: Float[Array, "batch queries heads width"],
    key: Float[Array, "batch keys kv_heads width"],
    value: Float[Array, "batch keys kv_heads width"],
    mask: Bool[Array, "..."] | None = None,
    *,
    causal: bool = False,
    drop: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "batch queries heads width"]:
    """Scaled dot-product attention, ``softmax(q k^T / sqrt(width)) v``, softmax in float32 (float64 of such).

    On CPUs the weights before their division by the sum are kept for the gradient, in place of a second exponential.
        Heads share keys and values in groups of ``heads / kv_heads`` (GQA), which are not repeated in
    memory. A query whose keys are all masked sees them all equally: finite, as is its gradient.

    Args:
      query: [batch, queries, heads, width].
      key: [batch, keys, kv_heads, width]; ``kv_heads`` divides ``heads``.
      value: like ``key``.
      mask: bool, broadcastable to [batch, 1, queries, keys]; True where a key is seen.
      causal: besides, hide keys after the query.
      drop: applied to the probabilities (dropout in training, hard attention); the fused path is left then.

    Returns:
      [batch, queries, heads, width].

    Example:
      >>> x = jnp.ones((1, 3, 4, 2))
      >>> attend(x, x[:, :, :2], x[:, :, :2], jnp.zeros((1, 1, 1, 3), bool)).sum().item()
      24.0
    """
    if drop is None and jax.default_backend() == "cpu" and query.dtype in (jnp.float32, jnp.float64):
        return _attend_on_cpu(query, key, value, _with_causal(mask, query, key) if causal else mask)
    if drop is None and query.dtype != jnp.float64:  # inside, the fused path is float32
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
    batch, queries, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("bqkgw,bskw->bkgqs", grouped, key, preferred_element_type=wide_dtype(query.dtype)) / width**0.5
    mask = _with_causal(mask, query, key) if causal else mask
    if mask is not None:
        seen = mask if mask.ndim < 4 else mask[:, :, None]
        scores = jnp.where(seen, scores, _unseen(scores))
    probabilities = jax.nn.softmax(scores, axis=-1)
    probabilities = (probabilities if drop is None else drop(probabilities)).astype(value.dtype)
    return jnp.einsum("bkgqs,bskw->bqkgw", probabilities, value).reshape(query.shape)


def _with_causal(mask: jax.Array | None, query: jax.Array, key: jax.Array) -> jax.Array:
    before = jnp.tril(jnp.ones((query.shape[1], key.shape[1]), bool))[None, None]
    return before if mask is None else mask & before


def _unseen(scores: jax.Array) -> float:
    return -0.7 * float(jnp.finfo(scores.dtype).max)


def _attend_on_cpu(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    batch, queries, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = (query * width**-0.5).reshape(batch, queries, kv_heads, heads // kv_heads, width)
    if mask is not None:
        mask = jnp.expand_dims(mask, tuple(range(4 - mask.ndim)))[:, :, None]
    y = _weighted(grouped.transpose(0, 2, 3, 1, 4), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3), mask)
    return y.transpose(0, 3, 1, 2, 4).reshape(query.shape)


@jax.custom_jvp
def _weighted(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """``softmax(q k^T) v``, queries [batch, kv_heads, group, queries, width], keys [batch, kv_heads, keys, width]."""
    return _weights_and_sum(query, key, value, mask)[0]


@_weighted.defjvp
def _weighted_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # Linear in the tangents, so its transpose is the backward pass: of arrays as large as the scores it reads the
    # weights alone, and sums over a head's width in place of the keys.
    (query, key, value, mask), (d_query, d_key, d_value, _) = primals, tangents
    y, weights, inverse = _weights_and_sum(query, key, value, mask)
    d_scores = _scores(d_query, key) + _scores(query, d_key)
    if mask is not None:
        d_scores = jnp.where(mask, d_scores, 0.0)
    change = weights * d_scores
    d_y = _mixed(change, value) + _mixed(weights, d_value) - y * change.sum(-1, keepdims=True)
    return y, d_y * inverse


def _weights_and_sum(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The outcome, the exponentials, and one over their sums."""
    scores = _scores(query, key)
    if mask is not None:
        scores = jnp.where(mask, scores, _unseen(scores))
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jax.lax.optimization_barrier(jnp.exp(scores - top))  # or each reader computes the exponential again
    inverse = 1.0 / weights.sum(-1, keepdims=True)
    return _mixed(weights, value) * inverse, weights, inverse


def _scores(query: jax.Array, key: jax.Array) -> jax.Array:
    batch, kv_heads, group, queries, width = query.shape
    merged = query.reshape(batch, kv_heads, group * queries, width)
    return jnp.einsum("bkqw,bksw->bkqs", merged, key).reshape(batch, kv_heads, group, queries, key.shape[2])


def _mixed(weights: jax.Array, value: jax.Array) -> jax.Array:
    batch, kv_heads, group, queries, keys = weights.shape
    merged = weights.reshape(batch, kv_heads, group * queries, keys)
    return jnp.einsum("bkqs,bksw->bkqw", merged, value).reshape(batch, kv_heads, group, queries, value.shape[-1])


def in_window(queries: int, keys: int, start: jax.Array | int, window: int) -> Bool[Array, "1 1 queries keys"]:
    """Which keys a sliding window holds: the query's own and the ``window - 1`` before it.

    Args:
      queries: their number; the first one stands at ``start``.
      keys: their number, from 0 on.
      start: index of the first query among the keys.
      window: keys that a query sees at most.

    Example:
      >>> in_window(3, 3, 0, 2)[0, 0].astype(int).tolist()
      [[1, 1, 1], [1, 1, 1], [0, 1, 1]]
    """
    return (jnp.arange(keys)[None] > start + jnp.arange(queries)[:, None] - window)[None, None]


class RopeScaling(NamedTuple):
    """Slower rotary angles, for sequences longer than those of the first training.

    With ``original`` L, as in Llama 3: of a frequency f with ``r = L f / (2 pi)`` turns in L positions

    ``f' = f`` for r > high, ``f / factor`` for r < low, else
    ``(1 - s) f / factor + s f`` with ``s = (r - low) / (high - low)``.

    Without it every frequency is divided: positions count ``1 / factor``.

    Attributes:
      factor: 1 or more.
      low: turns below which a frequency is divided.
      high: turns above which it stays.
      original: positions of the first training; None divides all.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int | None = None

    def slowed(self, frequencies: Float[Array, "half"]) -> Float[Array, "half"]:
        """The frequencies, slower."""
        if self.original is None:
            return frequencies / self.factor
        turns = frequencies * (self.original / (2 * math.pi))
        share = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return frequencies * (share + (1.0 - share) / self.factor)


def rope_angles(
    positions: Int[Array | np.ndarray, "rows length"], width: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "rows length half"], Float[Array, "rows length half"]]:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

    ``angle[p, i] = p theta^(-2 i / width)`` for i < width / 2.

    Args:
      positions: [rows, length].
      width: features of a head; even.
      theta: the base.
      scaling: what slows the angles; None for nothing.

    Returns:
      Cosines and sines, float32 [rows, length, width / 2].
    """
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    frequencies = frequencies if scaling is None else scaling.slowed(frequencies)
    angles = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads width"], cosine: jax.Array, sine: jax.Array, style: str
) -> Float[Array, "batch length heads width"]:
    """Rotate pairs of features by their position's angles.

    Args:
      x: queries or keys [batch, length, heads, width].
      cosine: from ``rope_angles``.
      sine: from ``rope_angles``.
      style: which features are a pair: ``"half"`` (i and i + width/2: Hugging Face's checkpoints) or
        ``"interleaved"`` (2i and 2i + 1: Meta's).

    Returns:
      An array like ``x``.
    """
    check_choice("rope_style", style, ("half", "interleaved"))
    wide = x.astype(wide_dtype(x.dtype))
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    half = style == "half"
    a, b = jnp.split(wide, 2, axis=-1) if half else (wide[..., 0::2], wide[..., 1::2])
    turned = (a * cosine - b * sine, b * cosine + a * sine)
    joined = jnp.concatenate(turned, axis=-1) if half else jnp.stack(turned, axis=-1).reshape(x.shape)
    return joined.astype(x.dtype)
