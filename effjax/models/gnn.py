"""Node classifiers: stacks of one kind of graph layer."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number
from effjax.graph.sparse.layers import Features, appnp, dropout
from effjax.graph.sparse.matrix import SparseMatrix
from effjax.graph.sparse.modules import GATConv, GCNConv, GCNIIConv, Linear, ReleasedGATConv, SAGEConv, SGCConv

__all__ = ["NodeClassifier"]

ATTENTION = ("gat", "gatv2", "supergat")
LAYERS = ("gcn", "sage", "sage-max", *ATTENTION, "released-gat", "appnp", "sgc", "gcnii", "mlp")
# Those whose papers and code drop inputs too.
_INPUTS_DROPPED = (*ATTENTION, "released-gat", "appnp")


class NodeClassifier(nn.Module):
    """A classifier of the nodes of one graph, of ``depth`` layers of one kind with dropout between them.

    ====================  ============================================================================================
    ``layer``             what it does
    ====================  ============================================================================================
    gcn                   relu between layers; the values of ``adjacency`` count
    sage, sage-max        relu between layers; the edges of ``adjacency`` count, self-loops too
    gat, gatv2, supergat  elu; ``heads`` heads, together ``hidden`` wide, one head in the last layer; attention dropout
    released-gat          elu, behind the last layer too; no attention (``effjax.graph.sparse.layers.released_gat``)
    appnp                 a perceptron of ``depth`` layers, then ten propagations with teleport 0.1
    sgc                   ``depth`` propagations and one linear map; ``hidden`` and ``dropout`` play no part
    gcnii                 linear, ``depth - 2`` layers of GCNII (alpha 0.1, theta 0.5), linear
    mlp                   no graph
    ====================  ============================================================================================

    Args:
      classes: C.
      hidden: width of the hidden layers.
      depth: layers with parameters, ``conv_0`` ... ``conv_{depth-1}``. One more is a middle layer
        ``[hidden, hidden]`` more.
      layer: from the table.
      dropout: rate behind hidden layers, and of the attention.
      input_dropout: rate of the features, for sparse ones of the stored numbers; by default ``dropout`` for
        attention, released-gat and appnp, 0 for the others.
      heads: of attention.
      initializer: ``"glorot"``, or ``"released"`` as in the released FASTRAIN code.
      dtype: of the products' operands; parameters, sums and logits are float32.

    Returns:
      When called with features ([N, F], or a ``SparseMatrix``), adjacency (a ``SparseMatrix`` [N, N], usually
      ``gcn_adjacency``) and ``train`` (with the stream ``"dropout"``): logits [N, C], float32 at least.

    Raises:
      ValueError: an unknown layer, sizes or rates out of range, heads that do not divide ``hidden``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> graph, x = gcn_adjacency([0, 1], [1, 0], 3), jax.numpy.ones((3, 5))
      >>> model = NodeClassifier(classes=2, hidden=8, depth=3)
      >>> variables = model.init(jax.random.key(0), x, graph)
      >>> sorted(variables["params"]), model.apply(variables, x, graph).shape
      (['conv_0', 'conv_1', 'conv_2'], (3, 2))
    """

    classes: int
    hidden: int = 64
    depth: int = 2
    layer: str = "gcn"
    dropout: float = 0.5
    input_dropout: float | None = None
    heads: int = 8
    initializer: str = "glorot"
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, features: Features, adjacency: SparseMatrix, train: bool = False
    ) -> Float[Array, "nodes classes"]:
        self._check()
        rate = self.input_dropout
        if rate is None:
            rate = self.dropout if self.layer in _INPUTS_DROPPED else 0.0
        x: Any = self._drop(features, rate, train)
        if self.layer == "sgc":
            conv = SGCConv(self.classes, self.depth, initializer=self.initializer, dtype=self.dtype, name="conv_0")
            return conv(x, adjacency)
        activation = nn.elu if self.layer in (*ATTENTION, "released-gat") else nn.relu
        first: Any = None
        for index in range(self.depth):
            x = self._conv(index, x, first, adjacency, train)
            if index < self.depth - 1:
                # The released layer ends with its elu.
                x = x if self.layer == "released-gat" else activation(x)
                first = x if index == 0 else first
                x = self._drop(x, self.dropout, train)
        out: Any = x
        return appnp(out, adjacency) if self.layer == "appnp" else out

    def _check(self) -> None:
        check_choice("layer", self.layer, LAYERS)
        check_number("classes", self.classes, low=1, integer=True)
        check_number("hidden", self.hidden, low=1, integer=True)
        check_number("depth", self.depth, low=3 if self.layer == "gcnii" else 1, integer=True)
        check_number("dropout", self.dropout, low=0, high=1, open_high=True)
        if self.input_dropout is not None:
            check_number("input_dropout", self.input_dropout, low=0, high=1, open_high=True)
        if self.layer in ATTENTION and self.hidden % self.heads:
            raise ValueError(
                f"hidden={self.hidden} is not a multiple of heads={self.heads}. The heads of a layer are hidden wide "
                f"together: try hidden={self.heads * max(1, round(self.hidden / self.heads))}."
            )

    def _drop(self, x: Features, rate: float, train: bool) -> Features:
        return dropout(self.make_rng("dropout"), x, rate) if train and rate else x

    def _conv(self, index: int, x: Any, first: Any, adjacency: SparseMatrix, train: bool):
        last = index == self.depth - 1
        width = self.classes if last else self.hidden
        options = {"initializer": self.initializer, "dtype": self.dtype, "name": f"conv_{index}"}
        if self.layer == "gcn":
            return GCNConv(width, **options)(x, adjacency)
        if self.layer in ("sage", "sage-max"):
            return SAGEConv(width, "max" if self.layer == "sage-max" else "mean", **options)(x, adjacency)
        if self.layer in ATTENTION:
            heads = 1 if last else self.heads
            conv = GATConv(width // heads, heads, self.layer, dropout=self.dropout, **options)
            return conv(x, adjacency, train)
        if self.layer == "released-gat":
            return ReleasedGATConv(width, **options)(x, adjacency)
        if self.layer == "gcnii" and 0 < index < self.depth - 1:
            return GCNIIConv(index, **options)(x, first, adjacency)
        return Linear(width, **options)(x)


def sized_networks(
    module: Callable[..., nn.Module], features: Features, adjacency: SparseMatrix, *, shallow: int = 2, deep: int = 3
) -> tuple[Callable[[jax.Array, bool], Any], Callable[..., jax.Array]]:
    """``init`` and ``apply`` of ``fastrain``, for networks of two depths; the parameters tell which one they are of.

    Args:
      module: ``depth -> module``, of ``depth`` entries of parameters: a partial ``NodeClassifier``.
      features: X, for the shapes.
      adjacency: S, for the shapes.
      shallow: depth of the shallow network.
      deep: of the deep one.

    Returns:
      ``(key, deep) -> params`` and ``(params, features, adjacency, *, key=None) -> logits``; ``key`` is of dropout.

    Example:
      >>> import functools
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> graph, x = gcn_adjacency([0, 1], [1, 0], 3), jax.numpy.ones((3, 5))
      >>> init, apply = sized_networks(functools.partial(NodeClassifier, 2, hidden=8), x, graph)
      >>> params = init(jax.random.key(0), True)
      >>> len(params), apply(params, x, graph).shape
      (3, (3, 2))
    """

    def init(key: jax.Array, is_deep: bool) -> Any:
        return module(depth=deep if is_deep else shallow).init(key, features, adjacency)["params"]

    def apply(params: Any, features: Features, adjacency: SparseMatrix, *, key: jax.Array | None = None) -> jax.Array:
        streams = {} if key is None else {"dropout": key}
        network: Any = module(depth=len(params))
        return network.apply({"params": params}, features, adjacency, train=key is not None, rngs=streams)

    return init, apply
