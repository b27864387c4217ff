"""Graph attention: GAT, GATv2, SuperGAT, and the softmax over the edges that enter a node.

Functions of parameters, features and a matrix as in ``effjax.graph.sparse.layers``. The weights are ignored, but a
zero is no edge. Attention needs self-loops in the matrix, where a node should see itself. No step scatters: sums over
edges are sparse products, one for every head, and their gradients are products with the transpose.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from effjax.core.errors import check_choice, check_number
from effjax.core.products import add_bias
from effjax.core.tree import wide
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.layers import Features, Params, check_graph, dropout, edges, project
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern
from effjax.graph.sparse.products import row_sums, spmm, take_columns, take_rows

# exp(-60) is far above the smallest normal float32, exp(-87), so a row's largest term keeps all its digits and so does
# every term that counts beside it.
_SPREAD = 60.0
# Edges in a piece of `edge_dot` on CPUs: two pieces [4096, 64] stay in the cache.
_PIECE = 4096


def edge_softmax(
    pattern: SparsePattern, logits: Float[Array, "nnz heads"], edge: Bool[Array, "nnz"] | None = None
) -> Float[Array, "nnz heads"]:
    r"""Softmax of the entries of every row.

    .. math:: \alpha_e = \frac{\exp(\ell_e - m_{row(e)})}{\sum_{e': row(e') = row(e)} \exp(\ell_{e'} - m_{row(e)})}

    m is an upper bound of the row that is within 60 of its maximum: the maximum of all logits where they spread less,
    else lowered row by row with sums of tempered exponentials, :math:`m \leftarrow m + \tau \log \sum_e \exp((\ell_e -
    m)/\tau)`. So neither the maximum nor its gradient takes a scatter.

    Args:
      pattern: of the matrix.
      logits: [nnz, H].
      edge: entries that take part; None for all but padding.

    Returns:
      [nnz, H], 0 where no edge is; every row that has an edge sums to 1.

    Example:
      >>> from effjax.graph.sparse.matrix import sparse_matrix
      >>> pattern = sparse_matrix([0, 0, 1], [0, 1, 1], None, (2, 2)).pattern
      >>> edge_softmax(pattern, jnp.array([[1.0], [1.0], [-500.0]])).tolist()
      [[0.5], [0.5], [1.0]]
    """
    check_array("logits", logits, (pattern.nnz, None))
    edge = pattern.valid if edge is None else check_array("edge", edge, (pattern.nnz,), "bool")
    terms, total = _exponentials(pattern, logits, edge)
    return terms / take_rows(pattern, total)


def _exponentials(pattern: SparsePattern, logits: jax.Array, edge: jax.Array) -> tuple[jax.Array, jax.Array]:
    """exp(logits - m) [nnz, H], 0 off the edges, and their sums over rows [R, H], 1 for rows without an edge."""
    logits, edge = wide(logits), edge[:, None]
    shift = take_rows(pattern, _upper_bounds(pattern, jax.lax.stop_gradient(logits), edge))
    # The inner `where` keeps infinities of what is no edge out of the gradient.
    terms = jnp.where(edge, jnp.exp(jnp.where(edge, logits - shift, 0)), 0)
    total = row_sums(pattern, terms)
    return terms, jnp.where(total > 0, total, 1)


def _upper_bounds(pattern: SparsePattern, logits: jax.Array, edge: jax.Array) -> jax.Array:
    """m [R, H]: at least the largest logit of the row, and at most ``_SPREAD`` more."""
    top = jnp.max(jnp.where(edge, logits, -jnp.inf), axis=0, initial=-jnp.inf)
    gap = jnp.max(top - jnp.min(jnp.where(edge, logits, jnp.inf), axis=0, initial=jnp.inf), initial=0)
    longest = jnp.max(jnp.diff(pattern.indptr), initial=1)

    def lower(state):
        bound, gap = state
        heat = gap / _SPREAD
        terms = jnp.where(edge, jnp.exp(jnp.where(edge, logits - take_rows(pattern, bound), 0) / heat), 0)
        total = row_sums(pattern, terms)
        # A row of n entries has max <= m + heat * log(total) <= max + heat * log(n).
        bound = bound + heat * jnp.log(jnp.where(total > 0, total, 1))
        return bound, heat * jnp.log(longest.astype(heat.dtype))

    start = jnp.broadcast_to(jnp.where(top == -jnp.inf, 0, top), (pattern.shape[0], logits.shape[1]))
    return jax.lax.while_loop(lambda state: state[1] > _SPREAD, lower, (start, gap))[0]


# The two products of attention. Each one's gradient is the other.


def weighted_sums(
    pattern: SparsePattern, weights: Float[Array, "nnz heads"], x: Float[Array, "columns heads width"]
) -> Float[Array, "rows heads width"]:
    r"""Sums of rows of ``x`` over the entries of every row, with weights of their own for every head.

    .. math:: Y_{rh\cdot} = \sum_{e:\, row(e) = r} w_{eh}\, X_{column(e) h \cdot}

    Args:
      pattern: of a matrix [R, C].
      weights: [nnz, H].
      x: [C, H, D].

    Returns:
      [R, H, D].

    Example:
      >>> from effjax.graph.sparse.matrix import sparse_matrix
      >>> pattern = sparse_matrix([0, 0], [0, 1], None, (2, 2)).pattern
      >>> weighted_sums(pattern, jnp.array([[1.0], [2.0]]), jnp.array([[[1.0]], [[10.0]]])).ravel().tolist()
      [21.0, 0.0]
    """
    check_array("weights", weights, (pattern.nnz, None))
    check_array("x", x, (pattern.shape[1], weights.shape[1], None))
    return _weighted_sums(pattern, weights, x)


@jax.custom_vjp
def _weighted_sums(pattern: SparsePattern, weights: jax.Array, x: jax.Array) -> jax.Array:
    if jax.default_backend() != "cpu":
        return row_sums(pattern, weights[:, :, None] * take_columns(pattern, x))
    weights = weights.T
    heads = [spmm(SparseMatrix(pattern, weights[head]), x[:, head]) for head in range(len(weights))]
    return jnp.stack(heads, axis=1)


def edge_dot(
    pattern: SparsePattern, left: Float[Array, "rows heads width"], right: Float[Array, "columns heads width"]
) -> Float[Array, "nnz heads"]:
    r"""Inner products between the two ends of every entry, head by head.

    .. math:: w_{eh} = \langle X_{row(e) h \cdot},\, Y_{column(e) h \cdot} \rangle

    On CPUs in pieces that stay in the cache, which is several times faster than all at once.

    Args:
      pattern: of a matrix [R, C].
      left: X, [R, H, D].
      right: Y, [C, H, D].

    Returns:
      [nnz, H].

    Example:
      >>> from effjax.graph.sparse.matrix import sparse_matrix
      >>> pattern = sparse_matrix([0, 1], [1, 1], None, (2, 2)).pattern
      >>> edge_dot(pattern, jnp.array([[[1.0]], [[2.0]]]), jnp.array([[[3.0]], [[4.0]]])).tolist()
      [[4.0], [8.0]]
    """
    check_array("left", left, (pattern.shape[0], None, None))
    check_array("right", right, (pattern.shape[1], *left.shape[1:]))
    return _edge_dot(pattern, left, right)


@jax.custom_vjp
def _edge_dot(pattern: SparsePattern, left: jax.Array, right: jax.Array) -> jax.Array:
    if jax.default_backend() != "cpu":
        return jnp.sum(take_rows(pattern, left) * take_columns(pattern, right), axis=-1)
    heads, width = left.shape[1:]
    left, right = left.reshape(len(left), -1), right.reshape(len(right), -1)
    ones = jnp.repeat(jnp.eye(heads, dtype=left.dtype), width, axis=0)
    missing = -pattern.nnz % _PIECE
    rows, columns = (jnp.pad(part, (0, missing)).reshape(-1, _PIECE) for part in (pattern.rows, pattern.columns))
    piece = lambda at: (left.at[at[0]].get(mode="clip") * right.at[at[1]].get(mode="clip")) @ ones
    return jax.lax.map(piece, (rows, columns)).reshape(-1, heads)[: pattern.nnz]


def _weighted_sums_backward(saved, g):
    pattern, weights, x = saved
    return None, edge_dot(pattern, g, x), weighted_sums(pattern.transpose, weights[pattern.t_order], g)


def _edge_dot_backward(saved, g):
    pattern, left, right = saved
    to_right = weighted_sums(pattern.transpose, g[pattern.t_order], left)
    return None, weighted_sums(pattern, g, right), to_right


_weighted_sums.defvjp(lambda *inputs: (_weighted_sums(*inputs), inputs), _weighted_sums_backward)
_edge_dot.defvjp(lambda *inputs: (_edge_dot(*inputs), inputs), _edge_dot_backward)


# The layers


def gat(
    params: Params,
    x: Features,
    matrix: SparseMatrix,
    *,
    concat: bool = True,
    slope: float = 0.2,
    rate: float = 0.0,
    key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Graph attention.

    .. math::
        Z &= X W, \qquad e_{ij} = \mathrm{leaky}(a_t \cdot z_i + a_s \cdot z_j), \qquad
        \alpha_{ij} = \mathrm{softmax}_{j \to i}(e_{ij}) \\
        y_i &= \textstyle\sum_{j \to i} \alpha_{ij} z_j + b

    for every head, which are concatenated or averaged.

    Args:
      params: ``kernel`` [F, H * D], ``source`` and ``target`` [H, D] and, if given, ``bias`` [H * D], or [D] where
        heads are averaged.
      x: [N, F].
      matrix: [N, N], the edges, usually with self-loops.
      concat: concatenate the heads; else average them.
      slope: of the leaky ReLU below 0, in [0, 1].
      rate: dropout of the attention, in [0, 1).
      key: PRNG key of the dropout.
      dtype: of the products' operands; the attention is float32 at least.

    Returns:
      [N, H * D] or [N, D], float32 at least.

    Raises:
      ValueError: shapes that do not fit, numbers out of range, a rate without a key.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> params = {"kernel": jnp.eye(2), "source": jnp.zeros((2, 1)), "target": jnp.zeros((2, 1))}
      >>> gat(params, jnp.eye(2), adjacency([0], [1], 2, self_loops=True)).tolist()
      [[1.0, 0.0], [0.5, 0.5]]

    Reference: Velickovic et al., "Graph attention networks", ICLR 2018.
    """
    check_number("slope", slope, low=0, high=1)
    check_graph(x, matrix)
    z = _heads(project(x, params["kernel"], dtype), params["source"].shape)
    ends = _scores(z, params["target"], params["source"])
    pattern = matrix.pattern
    logits = nn.leaky_relu(take_rows(pattern, ends[0]) + take_columns(pattern, ends[1]), slope)
    return _attend(params, matrix, logits, z, concat, rate, key, dtype)


def gatv2(
    params: Params,
    x: Features,
    matrix: SparseMatrix,
    *,
    concat: bool = True,
    slope: float = 0.2,
    rate: float = 0.0,
    key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Graph attention whose ranking of the neighbours depends on the receiver.

    .. math:: e_{ij} = a \cdot \mathrm{leaky}(W_t x_i + b_t + W_s x_j + b_s), \qquad z_j = W_s x_j + b_s

    Softmax, sum and bias as in ``gat``; the logits need all features of every edge, so it costs several times as much.

    Args:
      params: ``source_kernel``, ``target_kernel`` [F, H * D], ``source_bias``, ``target_bias`` [H * D],
        ``attention`` [H, D] and, if given, ``bias``.
      x: [N, F].
      matrix: as in ``gat``.
      concat: as in ``gat``.
      slope: as in ``gat``.
      rate: as in ``gat``.
      key: as in ``gat``.
      dtype: as in ``gat``.

    Returns:
      As ``gat``.

    Raises:
      ValueError: as ``gat``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> names = ("source_kernel", "target_kernel", "source_bias", "target_bias")
      >>> params = dict(zip(names, (jnp.eye(2), jnp.eye(2), jnp.zeros(2), jnp.zeros(2))))
      >>> params["attention"] = jnp.zeros((2, 1))
      >>> gatv2(params, jnp.eye(2), adjacency([0], [1], 2, self_loops=True)).tolist()
      [[1.0, 0.0], [0.5, 0.5]]

    Reference: Brody, Alon, Yahav, "How attentive are graph attention networks?", ICLR 2022.
    """
    check_number("slope", slope, low=0, high=1)
    check_graph(x, matrix)
    source = add_bias(project(x, params["source_kernel"], dtype), params["source_bias"])
    target = add_bias(project(x, params["target_kernel"], dtype), params["target_bias"])
    pattern, attention = matrix.pattern, params["attention"]
    hidden = nn.leaky_relu(take_rows(pattern, target) + take_columns(pattern, source), slope)
    (logits,) = _scores(_heads(hidden, attention.shape), attention)
    return _attend(params, matrix, logits, _heads(source, attention.shape), concat, rate, key, dtype)


def supergat(
    params: Params,
    x: Features,
    matrix: SparseMatrix,
    *,
    mode: str = "mixed",
    heads: int | None = None,
    concat: bool = True,
    slope: float = 0.2,
    rate: float = 0.0,
    key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Graph attention from inner products of the ends of an edge.

    .. math::
        \text{mixed: } e_{ij} &= \mathrm{leaky}((a_t \cdot z_i + a_s \cdot z_j)\, \sigma(z_i \cdot z_j)) \\
        \text{scaled: } e_{ij} &= \mathrm{leaky}(z_i \cdot z_j / \sqrt{D})

    The layer alone, without the paper's additional loss that predicts edges from the inner products (``edge_dot``).

    Args:
      params: as in ``gat``; ``"scaled"`` has no ``source`` and ``target``.
      x: [N, F].
      matrix: as in ``gat``.
      mode: ``"mixed"`` (MX of the paper) or ``"scaled"`` (SD).
      heads: H, needed by ``"scaled"`` alone.
      concat: as in ``gat``.
      slope: as in ``gat``.
      rate: as in ``gat``.
      key: as in ``gat``.
      dtype: as in ``gat``.

    Returns:
      As ``gat``.

    Raises:
      ValueError: as ``gat``, an unknown ``mode``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import adjacency
      >>> params = {"kernel": jnp.eye(2), "source": jnp.zeros((2, 1)), "target": jnp.zeros((2, 1))}
      >>> supergat(params, jnp.eye(2), adjacency([0], [1], 2, self_loops=True)).tolist()
      [[1.0, 0.0], [0.5, 0.5]]

    Reference: Kim, Oh, "How to find your friendly neighborhood: graph attention design with self-supervision", ICLR
    2021.
    """
    check_choice("mode", mode, ("mixed", "scaled"))
    check_number("slope", slope, low=0, high=1)
    check_graph(x, matrix)
    z = project(x, params["kernel"], dtype)
    if mode == "mixed":
        z = _heads(z, params["source"].shape)
    else:
        hint = "Without attention vectors nothing else tells it."
        count = check_number("heads", heads, low=1, integer=True, hint=hint)
        z = _heads(z, (count, z.shape[-1] // count))
    pattern = matrix.pattern
    logits = edge_dot(pattern, z, z)
    if mode == "mixed":
        ends = _scores(z, params["target"], params["source"])
        logits = (take_rows(pattern, ends[0]) + take_columns(pattern, ends[1])) * nn.sigmoid(logits)
    else:
        logits = logits / math.sqrt(z.shape[-1])
    return _attend(params, matrix, nn.leaky_relu(logits, slope), z, concat, rate, key, dtype)


def _heads(z: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[N, H * D] -> [N, H, D]."""
    if len(shape) != 2 or math.prod(shape) != z.shape[-1]:
        raise ValueError(
            f"The heads and their width are {shape}, but the kernel has {z.shape[-1]} columns, which must be their "
            "product: give attention vectors [heads, width]."
        )
    return z.reshape(*z.shape[:-1], *shape)


def _scores(z: jax.Array, *attention: jax.Array) -> list[jax.Array]:
    """Inner products [N, H] of every head with its part of each vector [H, D], as one matrix product."""
    heads, width = z.shape[-2:]
    own = jnp.repeat(jnp.eye(heads), width, axis=0)
    kernel = jnp.concatenate([own * wide(vector).reshape(-1, 1) for vector in attention], axis=1)
    return jnp.split(z.reshape(*z.shape[:-2], heads * width) @ kernel.astype(z.dtype), len(attention), axis=-1)


def _attend(params, matrix, logits, z, concat, rate, key, dtype) -> jax.Array:
    """Softmax of the logits, dropout, and the sum of the messages ``z`` [N, H, D]."""
    terms, total = _exponentials(matrix.pattern, logits, edges(matrix))
    if rate:
        if key is None:
            raise ValueError(f"rate={rate}, but key=None. Give a PRNG key, or rate=0 in evaluation.")
        terms = dropout(key, terms, rate)
    messages = z if dtype is None else wide(z.astype(dtype))
    y = weighted_sums(matrix.pattern, terms, messages) / total[:, :, None]
    return add_bias(y.reshape(len(y), math.prod(y.shape[1:])) if concat else jnp.mean(y, axis=1), params.get("bias"))
