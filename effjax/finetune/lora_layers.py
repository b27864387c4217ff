"""Adapters as pytree nodes in the kernels' places, for Equinox, NNX and plain functions of parameters."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core.tree import path_name
from effjax.finetune.lora import Lora, Scales, check_fit, out_first, scale_of

__all__ = ["lora_hooks", "lora_kernels"]

PyTree = Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kernel", "a", "b"), meta_fields=("transposed",))
@dataclasses.dataclass(frozen=True, eq=False)
class LoraKernel:
    """A frozen kernel with its adapter, which multiply a vector or matrix one after the other; see ``lora_kernels``.

    Attributes:
      kernel: ``[in, out]``, or ``[out, in]`` where ``transposed``.
      a: ``[in, r]``.
      b: ``[r, out]``, with the scale.
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

    def __getitem__(self, index: Any) -> "LoraKernel":
        if index is not ...:  # NNX reads `variable[...]`
            self._refuse("indexed")
        return self

    def __matmul__(self, x: jax.Array | np.ndarray) -> jax.Array:
        y = self.kernel @ x
        left, right = (self.b.T, self.a.T) if self.transposed else (self.a, self.b)
        return jnp.asarray(y) + left.astype(y.dtype) @ (right.astype(y.dtype) @ x.astype(y.dtype))

    def __rmatmul__(self, x: jax.Array | np.ndarray) -> jax.Array:
        y = x @ self.kernel
        left, right = (self.b.T, self.a.T) if self.transposed else (self.a, self.b)
        return jnp.asarray(y) + (jnp.asarray(x, y.dtype) @ left.astype(y.dtype)) @ right.astype(y.dtype)

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        # An implicit array would be W + a b, formed in silence, and so would be its gradient.
        self._refuse("turned into an array")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"A LoraKernel of shape {self.shape} was {what}, but it can only be multiplied by `@`. For nnx.Linear call "
            "lora_hooks(model) first; for the kernels of other layers use lora_merge(params, lora, scales)."
        )


def lora_kernels(params: PyTree, lora: Lora, scales: Scales) -> PyTree:
    r"""Parameters whose adapted kernels multiply in factored form, wherever a layer writes ``kernel @ x``.

    .. math:: W x + s\, b^T (a^T x), \qquad\text{or}\qquad x W + (x\, a)\, (s\, b)

    For parameters that no Linen module reads:

    - Equinox: ``eqx.nn.Linear`` (so ``eqx.nn.MLP`` and ``eqx.nn.MultiheadAttention`` too), as it is.
    - NNX: ``nnx.Linear``, after ``lora_hooks(model)``; pass ``nnx.state(model, nnx.Param)`` and merge the result.
    - Plain functions: ``x @ params["kernel"]``.

    Every other use of such a kernel raises ``TypeError`` and forms nothing. For such layers (convolutions,
    stacks of layers) use ``lora_merge`` inside the loss: the same values and gradients at the
    cost of a full weight gradient. Differentiate with respect to ``lora`` alone.

    Args:
      params: the tree that ``lora_init`` was given; kernels ``[in, out]``, or ``[out, in]`` where they are called
        ``weight``.
      lora: adapters of kernels of two axes.
      scales: of ``lora_scales``, or one number (or traced scalar) for all.

    Returns:
      A tree like ``params`` with ``LoraKernel`` nodes; nothing is copied.

    Raises:
      ValueError: an adapter without a kernel here, of another shape, or of more axes than two; a scale missing.

    Example:
      >>> params = {"kernel": jnp.zeros((3, 2))}
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> (jnp.ones((1, 3)) @ lora_kernels(params, lora, 2.0)["kernel"]).tolist()
      [[6.0, 6.0]]
    """
    check_fit(params, lora)
    for path, adapter in lora.items():
        if adapter["a"].ndim != 2:
            raise ValueError(
                f"lora: the kernel {path} has {adapter['a'].ndim} axes, but only kernels of two are multiplied by `@`. "
                "Give the others to lora_merge(params, lora, scales)."
            )

    def replace(path: Sequence[Any], kernel: Any) -> Any:
        name = path_name(path)
        if name not in lora:
            return kernel
        a, b = lora[name]["a"], lora[name]["b"]
        return LoraKernel(kernel, a, (b * scale_of(scales, name)).astype(b.dtype), out_first(name))

    return jax.tree_util.tree_map_with_path(replace, params)


def lora_hooks(model: Any) -> Any:
    """Let every ``nnx.Linear`` of a model multiply a ``LoraKernel`` in factored form.

    Sets ``promote_dtype`` and ``dot_general`` of those layers, which nnx.Linear offers for such purposes; on ordinary
    kernels they do what they did.

    Args:
      model: an ``nnx.Module``; changed in place.

    Returns:
      The same model.

    Raises:
      ValueError: a model without ``nnx.Linear``.

    Example:
      >>> from flax import nnx
      >>> model = lora_hooks(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> graph, params = nnx.split(model)
      >>> lora = {"kernel": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
      >>> nnx.merge(graph, lora_kernels(params, lora, 2.0))(jnp.ones((1, 3))).shape
      (1, 2)
    """
    from flax import nnx

    layers: list[Any] = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear)]
    if not layers:
        raise ValueError(f"model={type(model).__name__} holds no nnx.Linear, so there is nothing to hook.")
    for layer in layers:
        layer.promote_dtype = functools.partial(_promote, layer.promote_dtype)
        layer.dot_general = functools.partial(_dot_general, layer.dot_general)
    return model


def _promote(plain: Any, arrays: tuple, **keywords: Any) -> tuple:
    x, kernel, bias = arrays
    if not isinstance(kernel, LoraKernel):
        return plain(arrays, **keywords)
    x, base, bias = plain((x, kernel.kernel, bias), **keywords)
    return x, dataclasses.replace(kernel, kernel=base), bias


def _dot_general(plain: Any, x: jax.Array, kernel: Any, *arguments: Any, **keywords: Any) -> jax.Array:
    if not isinstance(kernel, LoraKernel):
        return plain(x, kernel, *arguments, **keywords)
    y = plain(x, kernel.kernel, *arguments, **keywords)
    precision = keywords.get("precision")
    narrow = jnp.matmul(x.astype(y.dtype), kernel.a.astype(y.dtype), precision=precision)
    return y + jnp.matmul(narrow, kernel.b.astype(y.dtype), precision=precision)
