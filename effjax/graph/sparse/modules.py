"""Graph layers with their parameters, as Linen modules over the functions of ``layers`` and ``attention``."""

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from effjax.core.errors import check_choice, check_number
from effjax.graph.sparse.attention import gat, gatv2, supergat
from effjax.graph.sparse.layers import Features, dense, gcn, gcnii, released_gat, sage, sgc
from effjax.graph.sparse.matrix import SparseMatrix

__all__ = ["GATConv", "GCNConv", "GCNIIConv", "SAGEConv", "SGCConv"]

Initializer = Callable[..., jax.Array]


def released_init(key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Uniform on [-1/sqrt(out), 1/sqrt(out)), weights and biases alike, as in Kipf's and FASTRAIN's PyTorch code."""
    bound = 1 / math.sqrt(shape[-1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


INITIALIZERS: Mapping[str, tuple[Initializer, Initializer]] = {
    "glorot": (nn.initializers.glorot_uniform(), nn.initializers.zeros),
    "released": (released_init, released_init),
}
"""By name, the initialisers of kernels and of biases."""


class Linear(nn.Module):
    """``dense`` with its parameters."""

    features: int
    use_bias: bool = True
    initializer: str = "glorot"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Features) -> jax.Array:
        return dense(kernel_and_bias(self, x.shape[-1]), x, dtype=self.dtype)


class GCNConv(nn.Module):
    """``gcn`` with its parameters.

    Args:
      features: O.
      use_bias: with a bias.
      initializer: ``"glorot"`` (zero biases) or ``"released"`` (``released_init``).
      dtype: of the operands.

    Returns:
      When called with features [N, F] and a matrix [N, N]: [N, O].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> graph = gcn_adjacency([0, 1], [1, 0], 3)
      >>> variables = GCNConv(4).init(jax.random.key(0), jnp.ones((3, 2)), graph)
      >>> GCNConv(4).apply(variables, jnp.ones((3, 2)), graph).shape
      (3, 4)
    """

    features: int
    use_bias: bool = True
    initializer: str = "glorot"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Features, matrix: SparseMatrix) -> jax.Array:
        return gcn(kernel_and_bias(self, x.shape[-1]), x, matrix, dtype=self.dtype)


class SAGEConv(nn.Module):
    """``sage`` with its parameters.

    Args:
      features: O.
      reduce: ``"mean"`` or ``"max"``.
      use_bias: with a bias.
      initializer: as in ``GCNConv``.
      dtype: of the operands.

    Returns:
      When called with features [N, F] and a matrix [N, N]: [N, O].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> graph = adjacency([0, 1], [1, 0], 3)
      >>> variables = SAGEConv(4).init(jax.random.key(0), jnp.ones((3, 2)), graph)
      >>> SAGEConv(4).apply(variables, jnp.ones((3, 2)), graph).shape
      (3, 4)
    """

    features: int
    reduce: str = "mean"
    use_bias: bool = True
    initializer: str = "glorot"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Features, matrix: SparseMatrix) -> jax.Array:
        params = kernel_and_bias(self, x.shape[-1])
        params["root"] = self.param("root", initializers(self)[0], (x.shape[-1], self.features))
        return sage(params, x, matrix, reduce=self.reduce, dtype=self.dtype)


class SGCConv(nn.Module):
    """``sgc`` with its parameters; ``hops`` as its argument, the rest as in ``GCNConv``."""

    features: int
    hops: int = 2
    use_bias: bool = True
    initializer: str = "glorot"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Features, matrix: SparseMatrix) -> jax.Array:
        return sgc(kernel_and_bias(self, x.shape[-1]), x, matrix, hops=self.hops, dtype=self.dtype)


class GCNIIConv(nn.Module):
    """``gcnii`` with its parameters; fields as its arguments.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> graph, x = gcn_adjacency([0, 1], [1, 0], 3), jnp.ones((3, 4))
      >>> variables = GCNIIConv(layer=1).init(jax.random.key(0), x, x, graph)
      >>> GCNIIConv(layer=1).apply(variables, x, x, graph).shape
      (3, 4)
    """

    layer: int
    alpha: float = 0.1
    theta: float = 0.5
    initializer: str = "glorot"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, first: jax.Array, matrix: SparseMatrix) -> jax.Array:
        params = {"kernel": self.param("kernel", initializers(self)[0], (x.shape[-1], x.shape[-1]))}
        return gcnii(params, x, first, matrix, layer=self.layer, alpha=self.alpha, theta=self.theta, dtype=self.dtype)


class ReleasedGATConv(nn.Module):
    """``released_gat`` with its parameters; ``features`` are of all heads together."""

    features: int
    initializer: str = "glorot"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Features, matrix: SparseMatrix) -> jax.Array:
        params = {"kernel": self.param("kernel", initializers(self)[0], (x.shape[-1], self.features))}
        return released_gat(params, x, matrix, dtype=self.dtype)


class GATConv(nn.Module):
    """``gat``, ``gatv2`` or ``supergat`` with its parameters.

    Args:
      features: D, of one head.
      heads: H.
      attention: ``"gat"``, ``"gatv2"`` or ``"supergat"`` (mixed).
      concat: concatenate the heads; else average them.
      slope: of the leaky ReLU below 0.
      dropout: of the attention in training, from the stream ``"dropout"``.
      use_bias: with a bias after the sum.
      initializer: as in ``GCNConv``; attention vectors have that of kernels.
      dtype: of the products' operands.

    Returns:
      When called with features [N, F] and a matrix [N, N]: [N, H * D], or [N, D] averaged.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> graph = adjacency([0, 1], [1, 0], 3, self_loops=True)
      >>> variables = GATConv(4, heads=2).init(jax.random.key(0), jnp.ones((3, 5)), graph)
      >>> GATConv(4, heads=2).apply(variables, jnp.ones((3, 5)), graph).shape
      (3, 8)
    """

    features: int
    heads: int = 8
    attention: str = "gat"
    concat: bool = True
    slope: float = 0.2
    dropout: float = 0.0
    use_bias: bool = True
    initializer: str = "glorot"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Features, matrix: SparseMatrix, train: bool = False) -> jax.Array:
        check_number("features", self.features, low=1, integer=True)
        check_number("heads", self.heads, low=1, integer=True)
        layer, kernels, biases, vectors = _ATTENTION[check_choice("attention", self.attention, tuple(_ATTENTION))]
        kernel, bias = initializers(self)
        width = self.heads * self.features
        params = {name: self.param(name, kernel, (x.shape[-1], width)) for name in kernels}
        params |= {name: self.param(name, bias, (width,)) for name in biases}
        params |= {name: self.param(name, kernel, (self.heads, self.features)) for name in vectors}
        if self.use_bias:
            params["bias"] = self.param("bias", bias, (width if self.concat else self.features,))
        options = {"concat": self.concat, "slope": self.slope, "dtype": self.dtype}
        if train and self.dropout:
            options |= {"rate": self.dropout, "key": self.make_rng("dropout")}
        return layer(params, x, matrix, **options)


_ATTENTION: Mapping[str, tuple[Callable[..., jax.Array], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "gat": (gat, ("kernel",), (), ("source", "target")),
    "gatv2": (gatv2, ("source_kernel", "target_kernel"), ("source_bias", "target_bias"), ("attention",)),
    "supergat": (supergat, ("kernel",), (), ("source", "target")),
}


def initializers(module: nn.Module) -> tuple[Initializer, Initializer]:
    """Of the kernels and the biases of a module with a field ``initializer``."""
    return INITIALIZERS[check_choice("initializer", module.initializer, tuple(INITIALIZERS))]


def kernel_and_bias(module: nn.Module, inputs: int) -> dict[str, jax.Array]:
    """The parameters ``kernel`` and ``bias`` of a module with ``features`` and ``use_bias``."""
    check_number("features", module.features, low=1, integer=True)
    kernel, bias = initializers(module)
    params = {"kernel": module.param("kernel", kernel, (inputs, module.features))}
    if module.use_bias:
        params["bias"] = module.param("bias", bias, (module.features,))
    return params
