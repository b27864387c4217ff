"""What the encoder and the decoder share: attention and feed-forward blocks, and stacks of layers."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.partition import by_rows
from effjax.models.activations import ACTIVATIONS
from effjax.models.attention import attend, in_window, rotate
from effjax.models.embeddings import norm_module
from effjax.models.pruned import Gates, LayerShape, check_layer_shapes, keep_largest

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
    qkv_bias: bool = False
    qk_norm: bool = False
    window: int | None = None

    @property
    def head_width(self) -> int:
        """Features of a head."""
        return self.head_size or self.hidden_size // self.num_heads


def _dense(features: int, spec: LayerSpec, name: str, bias: bool = False) -> nn.Dense:
    bias = bias or spec.use_bias
    return nn.Dense(features, use_bias=bias, dtype=spec.dtype, kernel_init=_init, name=name)


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
        width = spec.head_width
        kv_heads = spec.num_kv_heads or spec.num_heads
        project = lambda name, count: by_rows(_dense(count * width, spec, name, spec.qkv_bias)(x), inner=True)
        heads = lambda name, count: project(name, count).reshape(*x.shape[:2], count, width)
        query, key, value = heads("query", spec.num_heads), heads("key", kv_heads), heads("value", kv_heads)
        if spec.qk_norm:
            normed = lambda name, x: norm_module(spec.norm, spec.norm_eps, spec.dtype, name)(x)
            query, key = normed("query_norm", query), normed("key_norm", key)
        if rope is not None:
            cosine, sine = rope
            query, key = rotate(query, cosine, sine, spec.rope_style), rotate(key, cosine, sine, spec.rope_style)
        if self.cache_length is not None:
            key, value = self._cached("keys", key, start), self._cached("values", value, start)
        causal = spec.causal and self.cache_length is None
        if spec.window is not None and spec.window < key.shape[1]:
            near = in_window(query.shape[1], key.shape[1], start, spec.window)
            mask = near if mask is None else mask & near
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
        head_size=spec.head_width,
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
    unwindowed: tuple[int, ...] = (),
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
      unwindowed: layers without the window of ``spec``; not with ``scan_layers``.

    Returns:
      What the last layer gives.
    """
    _check_spec(spec, num_layers)
    if layer_shapes is not None:
        check_layer_shapes(layer_shapes, num_layers)
        if scan_layers:
            raise ValueError("scan_layers=True needs layers of one shape, but layer_shapes are given. Leave it False.")
    if unwindowed and scan_layers:
        raise ValueError(
            f"scan_layers=True needs layers of one kind, but full_layers={unwindowed} have no sliding window and the "
            "others have one. Leave it False."
        )
    specs = [spec] * num_layers if layer_shapes is None else [shaped(spec, shape) for shape in layer_shapes]
    specs = [own._replace(window=None) if index in unwindowed else own for index, own in enumerate(specs)]
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
    if (spec.hidden_size % spec.num_heads and spec.head_size is None) or spec.num_heads % kv_heads:
        raise ValueError(
            f"num_heads={spec.num_heads} must divide hidden_size={spec.hidden_size}, and be a multiple of "
            f"num_kv_heads={kv_heads}."
        )
