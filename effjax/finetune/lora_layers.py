"""Adapters as pytree nodes in the kernels' places, for Equinox, NNX and plain functions of parameters."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.tree import path_name
from effjax.finetune.lora import Lora, Scales, check_fit, only_adapters, scale_of
from effjax.finetune.lora_axes import low_rank_einsum, through_axes
from effjax.finetune.lora_layout import out_first

__all__ = ["lora_hooks", "lora_kernels"]

PyTree = Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kernel", "a", "b"), meta_fields=("transposed",))
@dataclasses.dataclass(frozen=True, eq=False)
class LoraKernel:
    """A frozen kernel with its adapter, which multiply a vector or matrix one after the other; see ``lora_kernels``.

    Attributes:
      kernel: ``[in, out]``, or ``[out, in]`` where ``transposed``; or of several axes of inputs and of outputs.
      a: ``[in, r]``, all inputs as one axis.
      b: ``[r, out]``, with the scale, all outputs as one axis.
      transposed: the layout.
    """

    kernel: jax.Array
    a: jax.Array
    b: jax.Array
    transposed: bool

    # NumPy then leaves `x @ kernel` to `__rmatmul__`.
    __array_ufunc__ = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def ndim(self) -> int:
        return self.kernel.ndim

    @property
    def dtype(self) -> Any:
        return self.kernel.dtype

    def __getitem__(self, index: Any) -> Any:
        if index is ...:  # NNX reads `variable[...]`
            return self
        if self.ndim != 2 or not isinstance(index, jax.Array) or not jnp.issubdtype(index.dtype, jnp.integer):
            self._refuse("indexed")
        left, right = (self.b.T, self.a.T) if self.transposed else (self.a, self.b)
        rows = self.kernel[index]  # as eqx.nn.Embedding reads its table
        return rows + left[index].astype(rows.dtype) @ right.astype(rows.dtype)

    def __matmul__(self, x: jax.Array | np.ndarray) -> jax.Array:
        if self.ndim != 2:
            self._refuse("multiplied by `@`")
        y = self.kernel @ x
        left, right = (self.b.T, self.a.T) if self.transposed else (self.a, self.b)
        return jnp.asarray(y) + left.astype(y.dtype) @ (right.astype(y.dtype) @ x.astype(y.dtype))

    def __rmatmul__(self, x: jax.Array | np.ndarray) -> jax.Array:
        if self.ndim != 2:
            self._refuse("multiplied by `@`")
        y = x @ self.kernel
        left, right = (self.b.T, self.a.T) if self.transposed else (self.a, self.b)
        return jnp.asarray(y) + (jnp.asarray(x, y.dtype) @ left.astype(y.dtype)) @ right.astype(y.dtype)

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        # An implicit array would be W + a b, formed in silence, and so would be its gradient.
        self._refuse("turned into an array")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"A LoraKernel of shape {self.shape} was {what}, but it can only be multiplied by `@`, where it has two "
            "axes. For nnx.Linear, nnx.LinearGeneral, nnx.Einsum and nnx.MultiHeadAttention call lora_hooks(model) "
            "first; for the kernels of other layers, such as convolutions and tables of embeddings, use "
            "lora_merge(params, lora, scales)."
        )


def lora_kernels(params: PyTree, lora: Lora, scales: Scales) -> PyTree:
    r"""Parameters whose adapted kernels multiply in factored form, wherever a layer writes ``kernel @ x``.

    .. math:: W x + s\, b^T (a^T x), \qquad\text{or}\qquad x W + (x\, a)\, (s\, b)

    For parameters that no Linen module reads:

    - Equinox: ``eqx.nn.Linear`` (so ``eqx.nn.MLP`` and ``eqx.nn.MultiheadAttention`` too) and ``eqx.nn.Embedding``, as
      they are. Of a model that was partitioned give the whole one, ``eqx.combine(arrays, static)``.
    - NNX: ``nnx.Linear``, ``nnx.LinearGeneral``, ``nnx.Einsum`` and ``nnx.MultiHeadAttention``, after
      ``lora_hooks(model)``; pass ``nnx.state(model, nnx.Param)`` and merge the result.
    - Plain functions: ``x @ params["kernel"]``.

    Every other use of such a kernel raises ``TypeError`` and forms nothing. For such layers (convolutions, tables of
    embeddings, stacks of layers) use ``lora_merge`` inside the loss: the same values and gradients at the
    cost of a full weight gradient. Differentiate with respect to ``lora`` alone.

    Args:
      params: the tree that ``lora_init`` was given; kernels ``[in, out]``, or ``[out, in]`` where they are called
        ``weight``.
      lora: adapters of kernels that are no stack.
      scales: of ``lora_scales``, or one number (or traced scalar) for all.

    Returns:
      A tree like ``params`` with ``LoraKernel`` nodes; nothing is copied.

    Raises:
      ValueError: an adapter without a kernel here, of another shape, or of a stack; a scale missing.

    Example:
      >>> params = {"kernel": jnp.zeros((3, 2))}
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> (jnp.ones((1, 3)) @ lora_kernels(params, lora, 2.0)["kernel"]).tolist()
      [[6.0, 6.0]]
    """
    check_fit(params, lora)
    for path, adapter in only_adapters(lora).items():
        if adapter["b"].ndim != 2:
            raise ValueError(
                f"lora: the kernel {path} has {adapter['b'].ndim - 2} axes of a stack of layers, but only kernels of "
                "one layer are multiplied in factored form. Give stacks to lora_merge(params, lora, scales)."
            )

    def replace(path: Sequence[Any], kernel: Any) -> Any:
        name = path_name(path)
        if name not in lora:
            return kernel
        if "whole" in lora[name]:
            return jnp.asarray(lora[name]["whole"])
        a, b = lora[name]["a"], lora[name]["b"]
        return LoraKernel(
            kernel, a.reshape(-1, a.shape[-1]), (b * scale_of(scales, name)).astype(b.dtype), out_first(name)
        )

    return jax.tree_util.tree_map_with_path(replace, params)


def lora_hooks(model: Any) -> Any:
    """Let the dense layers of an NNX model multiply a ``LoraKernel`` in factored form.

    Sets ``promote_dtype`` and ``dot_general`` of every ``nnx.Linear`` and ``nnx.LinearGeneral`` (so those of
    ``nnx.MultiHeadAttention``) and ``einsum_op`` of every ``nnx.Einsum``, which they offer for such purposes; on
    ordinary kernels they do what they did.

    Args:
      model: an ``nnx.Module``; changed in place.

    Returns:
      The same model.

    Raises:
      ValueError: a model without such layers.

    Example:
      >>> from flax import nnx
      >>> model = lora_hooks(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> graph, params = nnx.split(model)
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> nnx.merge(graph, lora_kernels(params, lora, 2.0))(jnp.ones((1, 3))).shape
      (1, 2)
    """
    from flax import nnx

    kinds = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum)
    layers: list[Any] = [module for _, module in nnx.iter_modules(model) if isinstance(module, kinds)]
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} holds no nnx.Linear, nnx.LinearGeneral or nnx.Einsum, so there is nothing "
            "to hook."
        )
    for layer in layers:
        layer.promote_dtype = functools.partial(_promote, layer.promote_dtype)
        if isinstance(layer, nnx.Einsum):
            layer.einsum_op = functools.partial(_einsum, layer.einsum_op)
        else:
            layer.dot_general = functools.partial(_dot_general, layer.dot_general or jax.lax.dot_general)
    return model


def _promote(plain: Any, arrays: tuple, **keywords: Any) -> tuple:
    x, kernel, bias = arrays
    if not isinstance(kernel, LoraKernel):
        return plain(arrays, **keywords)
    x, base, bias = plain((x, kernel.kernel, bias), **keywords)
    return x, dataclasses.replace(kernel, kernel=base), bias


def _dot_general(plain: Any, x: jax.Array, kernel: Any, numbers: Any, **keywords: Any) -> jax.Array:
    if not isinstance(kernel, LoraKernel):
        return plain(x, kernel, numbers, **keywords)
    (axes, own), (batch, _) = numbers
    if batch:
        raise ValueError(
            f"lora: a layer with batch_axis has a kernel of shape {kernel.shape} for each entry of a batch, which has "
            "no adapter. Leave it out of the rules."
        )
    y = plain(x, kernel.kernel, numbers, **keywords)
    term = kernel.a.astype(y.dtype), kernel.b.astype(y.dtype), kernel.shape[len(own) :]
    check = functools.partial(_check_sides, kernel)
    return y + through_axes(x.astype(y.dtype), tuple(axes), term, (keywords.get("precision"), check))


def _check_sides(kernel: LoraKernel, sides: tuple[int, int]) -> None:
    found = kernel.a.shape[0], kernel.b.shape[1]
    if found != sides:
        raise ValueError(
            f"lora: a layer with a kernel of shape {kernel.shape} has {sides[0]} inputs and {sides[1]} outputs, but "
            f"its adapter {found[0]} and {found[1]}. Tell its axes by LoraRule(..., inputs=, outputs=)."
        )


def _einsum(plain: Any, string: str, x: jax.Array, kernel: Any, **keywords: Any) -> jax.Array:
    if not isinstance(kernel, LoraKernel):
        return plain(string, x, kernel, **keywords)
    y = plain(string, x, kernel.kernel, **keywords)
    a, b = kernel.a.astype(y.dtype), kernel.b.astype(y.dtype)
    return y + low_rank_einsum(
        (string, kernel.shape), x.astype(y.dtype), (a, b), (keywords.get("precision"), "a layer")
    )
