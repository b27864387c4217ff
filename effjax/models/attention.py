"""What the encoder and the decoder share: embeddings, attention, feed-forward blocks, stacks of layers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_choice, check_number
from effjax.core.partition import by_rows
from effjax.core.tree import wide_dtype
from effjax.models.pruned import Gates, LayerShape, check_layer_shapes, keep_largest

Tokens = Int[Array | np.ndarray, "batch length"]
Mask = Bool[Array | np.ndarray, "batch length"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}
_init = nn.initializers.normal(0.02)


class LayerSpec(NamedTuple):
    """Sizes and choices of one transformer layer; see ``Layer``.

    Without ``attention`` or ``mlp`` that block is gone: only a norm after its residual stays. With 0 heads or neurons
    only the block's output bias is left.
    """

    hidden_size: int
    num_heads: int
    intermediate_size: int
    num_kv_heads: int | None = None
    activation: str = "gelu"
    gated: bool = False
    norm: str = "layer"
    norm_eps: float = 1e-12
    norm_first: bool = False
    use_bias: bool = True
    causal: bool = False
    rope_style: str = "half"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    dtype: DTypeLike = jnp.float32
    head_size: int | None = None
    attention: bool = True
    mlp: bool = True
    top_k: int | float | None = None


def check_tokens(
    input_ids: Tokens, max_positions: int, mask: Mask | None = None, segment_ids: Tokens | None = None
) -> None:
    """Refuse token ids that the model cannot take, while it is traced.

    Args:
      input_ids: what the caller gave.
      max_positions: the longest sequence in tokens.
      mask: None or as long as ``input_ids``.
      segment_ids: None or as long as ``input_ids``.

    Raises:
      TypeError: ids that are no integers.
      ValueError: not [batch, length], longer than ``max_positions``, or shapes that differ.
    """
    shape = jnp.shape(input_ids)
    if not jnp.issubdtype(jnp.result_type(input_ids), jnp.integer):
        raise TypeError(f"input_ids of dtype {jnp.result_type(input_ids)} must be integers: tokenize the text first.")
    if len(shape) != 2:
        raise ValueError(f"input_ids of shape {shape} must be [batch, length]; write input_ids[None] for one row.")
    if shape[1] > max_positions:
        raise ValueError(
            f"input_ids of length {shape[1]} is longer than max_positions={max_positions}. "
            f"Truncate the text: tokenizer.encode(texts, max_length={max_positions})."
        )
    for name, other in (("mask", mask), ("segment_ids", segment_ids)):
        if other is not None and jnp.shape(other) != shape:
            raise ValueError(f"{name} of shape {jnp.shape(other)} must have the shape {shape} of input_ids.")


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
    if drop is None and query.dtype != jnp.float64:  # inside, the fused path is float32
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
    batch, queries, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("bqkgw,bskw->bkgqs", grouped, key, preferred_element_type=wide_dtype(query.dtype)) / width**0.5
    if causal:
        before = jnp.tril(jnp.ones((queries, key.shape[1]), bool))[None, None]
        mask = before if mask is None else mask & before
    if mask is not None:
        seen = mask if mask.ndim < 4 else mask[:, :, None]
        scores = jnp.where(seen, scores, -0.7 * jnp.finfo(scores.dtype).max)
    probabilities = jax.nn.softmax(scores, axis=-1)
    probabilities = (probabilities if drop is None else drop(probabilities)).astype(value.dtype)
    return jnp.einsum("bkgqs,bskw->bqkgw", probabilities, value).reshape(query.shape)


def rope_angles(
    positions: Int[Array | np.ndarray, "rows length"], width: int, theta: float
) -> tuple[Float[Array, "rows length half"], Float[Array, "rows length half"]]:
    """Cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

    ``angle[p, i] = p theta^(-2 i / width)`` for i < width / 2.

    Args:
      positions: [rows, length].
      width: features of a head; even.
      theta: the base.

    Returns:
      Cosines and sines, float32 [rows, length, width / 2].
    """
    frequencies = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
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


def norm_module(kind: str, eps: float, dtype: DTypeLike, name: str | None) -> nn.Module:
    """``"layer"`` or ``"rms"`` normalisation over the features, statistics in float32."""
    check_choice("norm", kind, ("layer", "rms"))
    if kind == "rms":
        return nn.RMSNorm(epsilon=eps, dtype=dtype, name=name)
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def _dense(features: int, spec: LayerSpec, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=spec.use_bias, dtype=spec.dtype, kernel_init=_init, name=name)


def _residual(
    spec: LayerSpec, x: jax.Array, change: Callable | None, train: bool, gate: jax.Array | None = None
) -> jax.Array:
    """``x + drop(change(norm(x)))`` or ``norm(x + drop(change(x)))``; of a block that is gone, ``x`` or ``norm(x)``."""
    if change is None and spec.norm_first:
        return x
    norm = norm_module(spec.norm, spec.norm_eps, spec.dtype, "norm")
    if change is None:
        return norm(x)
    drop = nn.Dropout(spec.dropout, deterministic=not train)
    gated = lambda y: drop(change(y)) if gate is None else drop(change(y)) * gate.astype(x.dtype)
    return x + gated(norm(x)) if spec.norm_first else norm(x + gated(x))


class _Attention(nn.Module):
    spec: LayerSpec
    train: bool
    cache_length: int | None

    @nn.compact
    def __call__(self, x, mask, rope, start, gates=None):
        change = (lambda y: self._attend(y, mask, rope, start, gates)) if self.spec.attention else None
        return _residual(self.spec, x, change, self.train, None if gates is None else gates.attention)

    def _attend(self, x, mask, rope, start, gates):
        spec = self.spec
        if spec.num_heads == 0:
            return _dense(spec.hidden_size, spec, "output")(x[..., :0])
        width = spec.head_size or spec.hidden_size // spec.num_heads
        kv_heads = spec.num_kv_heads or spec.num_heads
        project = lambda name, count: by_rows(_dense(count * width, spec, name)(x), inner=True)
        heads = lambda name, count: project(name, count).reshape(*x.shape[:2], count, width)
        query, key, value = heads("query", spec.num_heads), heads("key", kv_heads), heads("value", kv_heads)
        if rope is not None:
            cosine, sine = rope
            query, key = rotate(query, cosine, sine, spec.rope_style), rotate(key, cosine, sine, spec.rope_style)
        if self.cache_length is not None:
            key, value = self._cached("keys", key, start), self._cached("values", value, start)
        causal = spec.causal and self.cache_length is None
        y = attend(query, key, value, mask, causal=causal, drop=self._drop(gates))
        if gates is not None:
            y = y * jnp.repeat(gates.heads, spec.num_heads // kv_heads)[None, None, :, None].astype(y.dtype)
        y = by_rows(y.reshape(*x.shape[:2], spec.num_heads * width), inner=True)
        if not self.is_initializing():  # taps are no variables of the module
            self.sow("taps", "context", y)
        return _dense(spec.hidden_size, spec, "output")(y)

    def _drop(self, gates) -> Callable[[jax.Array], jax.Array] | None:
        """What is applied to the probabilities: dropout, then hard attention."""
        spec, steps = self.spec, []
        if self.train and spec.attention_dropout:
            steps.append(nn.Dropout(spec.attention_dropout, deterministic=False, name="probabilities"))
        if spec.top_k is not None:
            top_k = spec.top_k
            hard = lambda p: keep_largest(p, top_k)
            # A switch: only where it is on is the K-th largest looked for.
            steps.append(hard if gates is None else lambda p: jax.lax.cond(gates.hard > 0, hard, _same, p))
        elif gates is not None:
            steps.append(_same)  # by one program, whichever layers are hard
        return (lambda p: functools.reduce(lambda p, step: step(p), steps, p)) if steps else None

    def _cached(self, name, new, start):
        shape = (new.shape[0], self.cache_length, *new.shape[2:])
        cache = self.variable("cache", name, jnp.zeros, shape, new.dtype)
        cache.value = jax.lax.dynamic_update_slice(cache.value, new, (0, start, 0, 0))
        return cache.value


def _same(x: jax.Array) -> jax.Array:
    return x


class _MLP(nn.Module):
    spec: LayerSpec
    train: bool

    @nn.compact
    def __call__(self, x, gates=None):
        change = (lambda y: self._change(y, gates)) if self.spec.mlp else None
        return _residual(self.spec, x, change, self.train, None if gates is None else gates.mlp)

    def _change(self, x, gates):
        spec = self.spec
        activation = ACTIVATIONS[check_choice("activation", spec.activation, ACTIVATIONS)]
        if spec.intermediate_size == 0:
            return _dense(spec.hidden_size, spec, "down")(x[..., :0])
        up = by_rows(_dense(spec.intermediate_size, spec, "up")(x), inner=True)
        hidden = activation(_dense(spec.intermediate_size, spec, "gate")(x)) * up if spec.gated else activation(up)
        if gates is not None:
            size = spec.intermediate_size // gates.groups.shape[-1]
            hidden = hidden * jnp.repeat(gates.groups, size)[None, None].astype(hidden.dtype)
        if not self.is_initializing():
            self.sow("taps", "hidden", hidden)
        return _dense(spec.hidden_size, spec, "down")(hidden)


class Layer(nn.Module):
    """One transformer layer: attention and a feed-forward block, each with a residual and a norm.

    Args:
      spec: sizes and choices.
      train: dropout is on.
      cache_length: keys and values of that many positions are kept in the collection ``cache``;
        None keeps none.

    Returns:
      When called with x [batch, length, hidden], a mask (``attention_mask``), angles (``rope_angles``)
      or None, the first position's index in the cache, and the layer's ``Gates`` or None: the pair (array
      like x, None), as ``nn.scan`` wants it. What the output layers of both blocks read is sown in ``taps``.
    """

    spec: LayerSpec
    train: bool = False
    cache_length: int | None = None

    @nn.compact
    def __call__(self, x, mask=None, rope=None, start=0, gates: Gates | None = None):
        attention = _Attention(self.spec, self.train, self.cache_length, name="attention")
        x = by_rows(attention(by_rows(x), mask, rope, start, gates))
        return by_rows(_MLP(self.spec, self.train, name="mlp")(x, gates)), None


def shaped(spec: LayerSpec, shape: LayerShape) -> LayerSpec:
    """The layer of which ``shape`` is left; ``spec`` is the whole one.

    Example:
      >>> shaped(LayerSpec(8, 4, 16), LayerShape(3, 3, None))[:4]
      (8, 3, 0, 3)
    """
    return spec._replace(
        head_size=spec.head_size or spec.hidden_size // spec.num_heads,
        num_heads=shape.heads or 0,
        num_kv_heads=shape.kv_heads or 0,
        intermediate_size=shape.intermediate or 0,
        attention=shape.heads is not None,
        mlp=shape.intermediate is not None,
        top_k=shape.top_k,
    )


def run_layers(
    spec: LayerSpec,
    num_layers: int,
    x: Float[Array, "batch length hidden"],
    mask: jax.Array | None,
    rope: tuple[jax.Array, jax.Array] | None = None,
    start: jax.Array | int = 0,
    *,
    train: bool,
    scan_layers: bool,
    remat: bool,
    cache_length: int | None = None,
    layer_shapes: tuple[LayerShape, ...] | None = None,
) -> Float[Array, "batch length hidden"]:
    """Run a stack of layers inside the calling module's compact method.

    Unrolled, layer i's variables lie under ``layer_{i}``; scanned, all lie under ``layers`` with a
    leading layer axis, and the program holds one layer whatever the depth.

    Args:
      spec: one layer.
      num_layers: how many.
      x: what the first layer gets.
      mask: see ``Layer``, as ``rope`` and ``start``.
      rope: angles of the positions.
      start: index of the first position in the cache.
      train: dropout is on.
      scan_layers: one scanned layer instead of unrolled ones.
      remat: recompute each layer in the backward pass.
      cache_length: see ``Layer``.
      layer_shapes: what is left of each layer, where layers differ; not with ``scan_layers``.

    Returns:
      What the last layer gives.
    """
    _check_spec(spec, num_layers)
    if layer_shapes is not None:
        check_layer_shapes(layer_shapes, num_layers)
        if scan_layers:
            raise ValueError("scan_layers=True needs layers of one shape, but layer_shapes are given. Leave it False.")
    specs = [spec] * num_layers if layer_shapes is None else [shaped(spec, shape) for shape in layer_shapes]
    layer = nn.remat(Layer, prevent_cse=not scan_layers) if remat else Layer
    if scan_layers:
        layer = nn.scan(
            layer,
            variable_axes={"params": 0, "cache": 0, "taps": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=num_layers,
        )
        return layer(spec, train, cache_length, name="layers")(x, mask, rope, start)[0]
    for index, own in enumerate(specs):
        x, _ = layer(own, train, cache_length, name=f"layer_{index}")(x, mask, rope, start)
    return x


def _check_spec(spec: LayerSpec, num_layers: int) -> None:
    check_number("num_layers", num_layers, low=1, integer=True)
    kv_heads = spec.num_kv_heads or spec.num_heads
    if spec.hidden_size % spec.num_heads or spec.num_heads % kv_heads:
        raise ValueError(
            f"num_heads={spec.num_heads} must divide hidden_size={spec.hidden_size}, and be a multiple of "
            f"num_kv_heads={kv_heads}."
        )


class Embeddings(nn.Module):
    """Token, position and type embeddings; norm, dropout and projection where asked for.

    Args:
      vocab_size: number of tokens.
      features: width of the tables.
      max_positions: longest sequence; 0 for none (rotary positions).
      position_offset: rows before position 0 (Hugging Face: 2 in RoBERTa and OPT).
      type_vocab_size: number of token types; 0 for none.
      output_size: project to that width (ELECTRA); None keeps ``features``.
      norm_eps: epsilon of a LayerNorm; None for none.
      dropout: rate in training.
      dtype: compute dtype.

    Returns:
      When called with ids and positions [batch, length], types or None: [batch, length, output_size].
    """

    vocab_size: int
    features: int
    max_positions: int = 0
    position_offset: int = 0
    type_vocab_size: int = 0
    output_size: int | None = None
    norm_eps: float | None = None
    dropout: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self):
        table = lambda rows: nn.Embed(rows, self.features, dtype=self.dtype, embedding_init=_init)
        self.word = table(self.vocab_size)
        if self.max_positions:
            self.position = table(self.max_positions + self.position_offset)
        if self.type_vocab_size:
            self.token_type = table(self.type_vocab_size)
        if self.norm_eps is not None:
            self.norm = norm_module("layer", self.norm_eps, self.dtype, name=None)
        if self.output_size is not None and self.output_size != self.features:
            self.projection = nn.Dense(self.output_size, dtype=self.dtype, kernel_init=_init)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, input_ids, positions, token_type_ids=None, *, train=False):
        x = self.word(input_ids)
        if self.max_positions:
            x = x + self.position(positions + self.position_offset)
        if self.type_vocab_size:
            x = x + self.token_type(jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        if self.norm_eps is not None:
            x = self.norm(x)
        x = self.drop(x, deterministic=not train)
        return self.projection(x) if self.output_size not in (None, self.features) else x

    def attend(self, x: Float[Array, "batch length features"]) -> Float[Array, "batch length vocab"]:
        """Logits of an output layer tied to the token table."""
        return self.word.attend(x)
