"""Graph layers without attention: GCN, GraphSAGE, APPNP, SGC, GCNII, and the pieces that all graph layers share.

Layers are functions of a mapping of parameters, features ``[N, F]`` (an array, or a ``SparseMatrix`` that stays
sparse) and a matrix ``[N, N]`` whose rows receive and whose columns send. Kernels are ``[in, out]``. Results are
float32 at least; ``dtype`` is that of the products' operands alone. As modules: ``effjax.graph.sparse.modules``.
"""

import math
from collections.abc import Mapping
from typing import overload

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.products import add_bias, dot
from effjax.core.tree import wide
from effjax.graph.sparse.buckets import bucket_max
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern, check_matrix
from effjax.graph.sparse.products import row_sums, spmm, take_columns, take_rows

Params = Mapping[str, jax.Array]
Features = SparseMatrix | Float[Array | np.ndarray, "nodes features"]


@overload
def dropout(key: jax.Array, x: SparseMatrix, rate: float) -> SparseMatrix: ...
@overload
def dropout(key: jax.Array, x: jax.Array, rate: float) -> jax.Array: ...
@overload
def dropout(key: jax.Array, x: np.ndarray, rate: float) -> jax.Array | np.ndarray: ...
def dropout(
    key: jax.Array, x: SparseMatrix | Float[Array | np.ndarray, "..."], rate: float
) -> SparseMatrix | Float[Array | np.ndarray, "..."]:
    r"""Zero numbers with probability ``rate`` and divide the others by 1 - rate; of a sparse ``x``, the stored ones.

    The random bits are a hash of the position, keyed by 64 bits from ``key``: two rounds of Murmur3's finaliser, which
    vectorise, where Threefry takes fifty times as long on a CPU (more than the layer behind it).

    Args:
      key: PRNG key.
      x: floating numbers of any shape, or a ``SparseMatrix``.
      rate: in [0, 1).

    Returns:
      As ``x``.

    Raises:
      ValueError: ``rate`` out of range.

    Example:
      >>> dropped = dropout(jax.random.key(0), jnp.ones(10_000), 0.25)
      >>> [f"{number:.2f}" for number in (dropped.min(), dropped.max(), dropped.mean())]
      ['0.00', '1.33', '1.00']
    """
    check_number("rate", rate, low=0, high=1, open_high=True)
    if isinstance(x, SparseMatrix):
        return x._replace(values=dropout(key, x.values, rate))
    return x if rate == 0 else jnp.where(keep_mask(key, x.shape, rate), x / (1 - rate), 0)


def keep_mask(key: jax.Array, shape: tuple[int, ...], rate: float) -> jax.Array:
    """The bool array of ``dropout``: True with probability 1 - ``rate``."""
    return hashed_bits(key, shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def hashed_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random uint32 of a shape, by the hash of ``dropout``."""
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    position = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _mix(_mix(position + first) ^ second)


def _mix(x: jax.Array) -> jax.Array:
    """Murmur3's finaliser: a bijection of 32 bits in which every input bit flips every output bit half of the time."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def project(x: Features, kernel: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """``x @ kernel``, sparse features by their entries."""
    shape = jnp.shape(x) if not isinstance(x, SparseMatrix) else x.shape
    if len(shape) != 2 or shape[1] != kernel.shape[0]:
        raise ValueError(
            f"x has shape {shape}, but the kernel {kernel.shape} takes [nodes, {kernel.shape[0]}]. Were the parameters "
            "made for other features?"
        )
    if isinstance(x, SparseMatrix):
        return spmm(x._replace(values=_rounded(x.values, dtype)), _rounded(kernel, dtype))
    return dot(x, kernel, dtype)


def aggregate(matrix: SparseMatrix, x: jax.Array | np.ndarray, dtype: DTypeLike | None = None) -> jax.Array:
    """``matrix @ x`` of operands in ``dtype``, summed in float32 at least."""
    check_matrix("matrix", matrix, square=True)
    return spmm(matrix._replace(values=_rounded(matrix.values, dtype)), _rounded(x, dtype))


def _rounded(x: jax.Array | np.ndarray, dtype: DTypeLike | None) -> jax.Array:
    return wide(x if dtype is None else jnp.asarray(x, dtype))


def check_graph(x: Features, matrix: SparseMatrix, *, argument: str = "x") -> None:
    """Raise where ``matrix`` is no graph, or the features have not one row for every node."""
    check_matrix("matrix", matrix, square=True)
    shape = tuple(x.shape)
    if len(shape) != 2 or shape[0] != matrix.shape[0]:
        raise ValueError(f"{argument} has shape {shape}, but the graph {matrix.shape} needs [{matrix.shape[0]}, F].")


def edges(matrix: SparseMatrix) -> jax.Array:
    """bool [nnz]: entries that are edges for layers that ignore weights. Zeros (dropped edges, padding) are none."""
    return (check_matrix("matrix", matrix).values != 0) & matrix.pattern.valid


# The layers


def dense(params: Params, x: Features, *, dtype: DTypeLike | None = None) -> jax.Array:
    """``x W + b``, no graph; ``kernel`` [F, O] and, if given, ``bias`` [O]."""
    return add_bias(project(x, params["kernel"], dtype), params.get("bias"))


def gcn(params: Params, x: Features, matrix: SparseMatrix, *, dtype: DTypeLike | None = None) -> jax.Array:
    r"""Graph convolution.

    .. math:: Y = S X W + b

    multiplied in the order that moves fewer columns over the edges (sparse features first meet W).

    Args:
      params: ``kernel`` [F, O] and, if given, ``bias`` [O].
      x: [N, F].
      matrix: S [N, N], usually ``gcn_adjacency``; the values count.
      dtype: of the operands.

    Returns:
      [N, O], float32 at least.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> gcn({"kernel": jnp.eye(2)}, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2)).round(3)
      Array([[0.5, 0.5],
             [0.5, 0.5]], dtype=float32)

    Reference: Kipf, Welling, "Semi-supervised classification with graph convolutional networks", ICLR 2017.
    """
    kernel = params["kernel"]
    if not isinstance(x, SparseMatrix) and kernel.shape[0] < kernel.shape[1]:
        return add_bias(project(aggregate(matrix, x, dtype), kernel, dtype), params.get("bias"))
    return add_bias(aggregate(matrix, project(x, kernel, dtype), dtype), params.get("bias"))


def sage(
    params: Params, x: Features, matrix: SparseMatrix, *, reduce: str = "mean", dtype: DTypeLike | None = None
) -> jax.Array:
    r"""GraphSAGE: a node's own features beside the mean or the maximum of its in-neighbours'.

    .. math:: y_i = \mathrm{reduce}_{j \to i}(x_j)\, W + b + x_i W_r

    A node without in-neighbours reduces to zero. Weights of edges are ignored, but a zero is no edge; a self-loop is
    an edge like others.

    Args:
      params: ``kernel`` [F, O] of the neighbours, ``root`` [F, O] and, if given, ``bias`` [O].
      x: [N, F]; the maximum needs an array.
      matrix: [N, N], e.g. ``adjacency`` without self-loops; for the maximum best with ``buckets=True``.
      reduce: ``"mean"`` or ``"max"``.
      dtype: of the operands.

    Returns:
      [N, O], float32 at least.

    Raises:
      ValueError: shapes that do not fit, an unknown ``reduce``, sparse features with ``"max"``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> params = {"kernel": jnp.eye(1), "root": jnp.zeros((1, 1))}
      >>> sage(params, jnp.array([[1.0], [3.0], [5.0]]), adjacency([1, 2], [0, 0], 3)).tolist()
      [[4.0], [0.0], [0.0]]

    Reference: Hamilton, Ying, Leskovec, "Inductive representation learning on large graphs", NIPS 2017.
    """
    check_choice("reduce", reduce, ("mean", "max"))
    check_graph(x, matrix)
    kernel, own = params["kernel"], project(x, params["root"], dtype)
    if reduce == "max":
        if isinstance(x, SparseMatrix):
            raise ValueError("x is sparse, but reduce='max' compares all features. Give x.todense(), or take 'mean'.")
        return add_bias(project(neighbour_max(matrix, wide(x)), kernel, dtype), params.get("bias")) + own
    if isinstance(x, SparseMatrix) or kernel.shape[0] >= kernel.shape[1]:
        return add_bias(neighbour_mean(matrix, project(x, kernel, dtype), dtype), params.get("bias")) + own
    return add_bias(project(neighbour_mean(matrix, x, dtype), kernel, dtype), params.get("bias")) + own


def neighbour_mean(matrix: SparseMatrix, x: jax.Array | np.ndarray, dtype: DTypeLike | None = None) -> jax.Array:
    """Mean of ``x`` [N, F] over the in-neighbours of every node, zero without any."""
    ones = wide(edges(matrix).astype(x.dtype))
    degree = row_sums(matrix.pattern, ones)
    return aggregate(matrix._replace(values=ones), x, dtype) / jnp.maximum(degree, 1)[:, None]


def neighbour_max(matrix: SparseMatrix, x: jax.Array) -> jax.Array:
    """Maximum of ``x`` [N, F] over the in-neighbours of every node, zero without any; ties share the gradient.

    No kernel takes maxima. Where the pattern has buckets (``adjacency(..., buckets=True)``) they are found slot by
    slot; without, by this family's only scatter. The gradient is sums over the edges.
    """
    check_graph(x, matrix)
    return _row_max(matrix.pattern, edges(matrix), x)


@jax.custom_vjp
def _row_max(pattern: SparsePattern, edge: jax.Array, x: jax.Array) -> jax.Array:
    if pattern.buckets is not None:
        found = bucket_max(pattern.buckets[0], edge, x)
    else:
        messages = jnp.where(edge[:, None], take_columns(pattern, x), -jnp.inf)
        found = jax.ops.segment_max(messages, pattern.rows, pattern.shape[0], indices_are_sorted=True)
    return jnp.where(found == -jnp.inf, 0, found)


def _row_max_forward(pattern, edge, x):
    found = _row_max(pattern, edge, x)
    return found, (pattern, edge, x, found)


def _row_max_backward(saved, g):
    pattern, edge, x, found = saved
    first = edge[:, None] & (take_columns(pattern, x) == take_rows(pattern, found))
    share = g / jnp.maximum(row_sums(pattern, first.astype(g.dtype)), 1)
    _, pull = jax.vjp(lambda x: take_columns(pattern, x), x)
    return None, None, *pull(jnp.where(first, take_rows(pattern, share), 0))


_row_max.defvjp(_row_max_forward, _row_max_backward)


def appnp(
    h: Float[Array, "nodes classes"], matrix: SparseMatrix, *, steps: int = 10, alpha: float = 0.1
) -> Float[Array, "nodes classes"]:
    r"""Personalised propagation of predictions.

    .. math:: Z_0 = H, \qquad Z_{t+1} = (1 - \alpha) S Z_t + \alpha H

    Args:
      h: predictions of a network that saw no edges, [N, C].
      matrix: S [N, N], usually ``gcn_adjacency``.
      steps: T, 1 or more.
      alpha: teleport probability in [0, 1).

    Returns:
      :math:`Z_T`, [N, C].

    Raises:
      ValueError: arguments out of range, shapes that do not fit.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> appnp(jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2), steps=1, alpha=0.5).astype(jnp.float16)
      Array([[0.75, 0.25],
             [0.25, 0.75]], dtype=float16)

    Reference: Gasteiger, Bojchevski, Guennemann, "Predict then propagate", ICLR 2019.
    """
    check_number("steps", steps, low=1, integer=True)
    check_number("alpha", alpha, low=0, high=1, open_high=True, hint="At 1 the graph would do nothing.")
    check_graph(h, matrix, argument="h")
    h = wide(h)
    return jax.lax.scan(lambda z, _: ((1 - alpha) * aggregate(matrix, z) + alpha * h, None), h, length=steps)[0]


def sgc(
    params: Params, x: Features, matrix: SparseMatrix, *, hops: int = 2, dtype: DTypeLike | None = None
) -> jax.Array:
    r"""Simple graph convolution: K propagations and one linear map, in the cheaper order.

    .. math:: Y = S^K X W + b

    Args:
      params: ``kernel`` [F, O] and, if given, ``bias`` [O].
      x: [N, F].
      matrix: S [N, N], usually ``gcn_adjacency``.
      hops: K, 1 or more.
      dtype: of the operands.

    Returns:
      [N, O], float32 at least.

    Raises:
      ValueError: ``hops`` below 1, shapes that do not fit.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> sgc({"kernel": jnp.eye(2)}, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2)).shape
      (2, 2)

    Reference: Wu et al., "Simplifying graph convolutional networks", ICML 2019.
    """
    check_number("hops", hops, low=1, integer=True)
    kernel = params["kernel"]
    propagate = lambda z: jax.lax.fori_loop(0, hops, lambda _, z: aggregate(matrix, z, dtype), z)
    if not isinstance(x, SparseMatrix) and kernel.shape[0] < kernel.shape[1]:
        return add_bias(project(propagate(wide(x)), kernel, dtype), params.get("bias"))
    return add_bias(propagate(project(x, kernel, dtype)), params.get("bias"))


def gcnii(
    params: Params,
    x: Float[Array, "nodes features"],
    first: Float[Array, "nodes features"],
    matrix: SparseMatrix,
    *,
    layer: int,
    alpha: float = 0.1,
    theta: float = 0.5,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""A layer of GCNII: initial residual and identity mapping, for deep stacks.

    .. math::
        P = (1 - \alpha) S X + \alpha X_0, \qquad Y = (1 - \beta) P + \beta P W, \qquad \beta = \log(\theta / l + 1)

    Args:
      params: ``kernel`` [F, F].
      x: output of the layer before, [N, F].
      first: :math:`X_0`, input of the stack, [N, F].
      matrix: S [N, N], usually ``gcn_adjacency``.
      layer: l, from 1.
      alpha: share of the first features, in [0, 1].
      theta: above 0.
      dtype: of the operands.

    Returns:
      [N, F], float32 at least.

    Raises:
      ValueError: numbers out of range, shapes that do not fit.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> graph, x = gcn_adjacency([0, 1], [1, 0], 2), jnp.eye(2)
      >>> gcnii({"kernel": x}, x, x, graph, layer=1, alpha=0.5).astype(jnp.float16)
      Array([[0.75, 0.25],
             [0.25, 0.75]], dtype=float16)

    Reference: Chen et al., "Simple and deep graph convolutional networks", ICML 2020; one kernel for both terms, as
    ``GCN2Conv`` of PyTorch Geometric with shared weights.
    """
    check_number("layer", layer, low=1, integer=True)
    check_number("alpha", alpha, low=0, high=1)
    check_number("theta", theta, low=0, open_low=True)
    beta = math.log(theta / layer + 1)
    if jnp.shape(first) != jnp.shape(x):
        raise ValueError(f"first has shape {jnp.shape(first)}, but x has {jnp.shape(x)}; they must be alike.")
    mixed = (1 - alpha) * aggregate(matrix, x, dtype) + alpha * wide(first)
    return (1 - beta) * mixed + beta * project(mixed, params["kernel"], dtype)


def released_gat(params: Params, x: Features, matrix: SparseMatrix, *, dtype: DTypeLike | None = None) -> jax.Array:
    r"""The layer that the released FASTRAIN and CaGCN code calls GAT: heads of a GCN, without attention.

    .. math:: Y = \mathrm{elu}(S X W), \qquad W = [W_1, \dots, W_H]

    Heads concatenated are one kernel. Numbers made with it say nothing about graph attention (``gat``).

    Args:
      params: ``kernel`` [F, H * D].
      x: [N, F].
      matrix: S [N, N], usually ``gcn_adjacency``.
      dtype: of the operands.

    Returns:
      [N, H * D], float32 at least.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> released_gat({"kernel": jnp.eye(2)}, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2)).shape
      (2, 2)

    Reference: repositories amrnag/FASTRAIN-GNN and BUPT-GAMMA/CaGCN, whose attention is commented out.
    """
    return nn.elu(gcn({"kernel": params["kernel"]}, x, matrix, dtype=dtype))
