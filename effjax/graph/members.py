"""Graph networks of two layers, several of them stacked: they train and run side by side as one program.

The members of a GEENI ensemble (``effjax.graph.geeni``).
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_choice, check_number
from effjax.core.loops import stacked_map
from effjax.core.timing import fastest
from effjax.core.tree import wide
from effjax.graph.measures import masked_cross_entropy
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.matrix import SparseMatrix, check_matrix
from effjax.graph.sparse.products import matmul, spmm

__all__ = [
    "GcnMembers",
    "ensemble_logits",
    "ensemble_macs",
    "ensemble_probabilities",
    "fastest_members_loop",
    "fold_members",
    "init_members",
    "member_probabilities",
    "members_loss",
    "prune_width",
]

Loop = Literal["columns", "vmap", "map", "unroll"]
LOOPS: tuple[Loop, ...] = ("columns", "vmap", "map", "unroll")


class GcnMembers(NamedTuple):
    """K graph convolution networks of two layers, stacked.

    Attributes:
      kernel_0: floating [K, F, H].
      bias_0: [K, H].
      kernel_1: [K, H, C].
      bias_1: [K, C].
    """

    kernel_0: jax.Array
    bias_0: jax.Array
    kernel_1: jax.Array
    bias_1: jax.Array

    @property
    def size(self) -> int:
        """K."""
        return self.kernel_0.shape[0]


def init_members(key: jax.Array, count: int, inputs: int, hidden: int, classes: int) -> GcnMembers:
    """Members that differ by their seed: Glorot uniform kernels, zero biases.

    Args:
      key: member k is drawn from the k-th of ``split(key, count)``.
      count: K.
      inputs: F, the number of features.
      hidden: H. For K members at the cost of one of width H', take H' / K.
      classes: C.

    Returns:
      ``GcnMembers`` in float32.

    Raises:
      ValueError: a number below 1.

    Example:
      >>> init_members(jax.random.key(0), 2, 2, 4, 2).kernel_0.shape
      (2, 2, 4)
    """
    for name, number in (("count", count), ("inputs", inputs), ("hidden", hidden), ("classes", classes)):
        check_number(name, number, low=1, integer=True)
    return _drawn_members(key, count, inputs, hidden, classes)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4), inline=True)
def _drawn_members(key: jax.Array, count: int, inputs: int, hidden: int, classes: int) -> GcnMembers:
    draw = jax.nn.initializers.glorot_uniform()

    def one(key: jax.Array) -> GcnMembers:
        first, second = jax.random.split(key)
        return GcnMembers(
            draw(first, (inputs, hidden)), jnp.zeros(hidden), draw(second, (hidden, classes)), jnp.zeros(classes)
        )

    return jax.vmap(one)(jax.random.split(key, count))


def mask_features(members: GcnMembers, keep: Bool[Array, "members features"]) -> GcnMembers:
    """Members that see only the kept features: other rows of the first kernel are zero, and so is their gradient.

    Raises:
      ValueError: ``keep`` is not bool [K, F].

    Example:
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> mask_features(members, jnp.array([[True, True], [True, False]])).kernel_0[1, 1].tolist()
      [0.0, 0.0, 0.0, 0.0]
    """
    check_array("keep", keep, members.kernel_0.shape[:2], "bool")
    return members._replace(kernel_0=jnp.where(keep[:, :, None], members.kernel_0, 0))


def prune_width(members: GcnMembers, width: int) -> GcnMembers:
    r"""Trained members with only their strongest hidden units.

    Strength is :math:`\lVert W_{0,\cdot h} \rVert\, \lVert W_{1,h \cdot} \rVert`.

    Args:
      members: of width H.
      width: hidden units that stay, in [1, H].

    Returns:
      Members of that width; the units keep their order.

    Raises:
      ValueError: ``width`` out of [1, H].

    Example:
      >>> prune_width(init_members(jax.random.key(0), 2, 2, 4, 2), 3).kernel_1.shape
      (2, 3, 2)
    """
    check_number("width", width, low=1, high=members.kernel_0.shape[-1], integer=True)
    return _pruned(members, width)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _pruned(members: GcnMembers, width: int) -> GcnMembers:
    strength = jnp.linalg.norm(members.kernel_0, axis=1) * jnp.linalg.norm(members.kernel_1, axis=2)
    units = jnp.sort(jax.lax.top_k(strength, width)[1], axis=1)
    return GcnMembers(
        jnp.take_along_axis(members.kernel_0, units[:, None, :], axis=2),
        jnp.take_along_axis(members.bias_0, units, axis=1),
        jnp.take_along_axis(members.kernel_1, units[:, :, None], axis=1),
        members.bias_1,
    )


def fold_members(members: GcnMembers) -> GcnMembers:
    r"""The members as ONE network of width K H, whose logits are the mean of theirs, at exactly its cost.

    .. math:: \frac{1}{K} \sum_k \left(S H_k W_{1,k} + b_{1,k}\right) = S\, [H_1 \ldots H_K]\,
       \frac{1}{K} \begin{bmatrix} W_{1,1} \\ \vdots \\ W_{1,K} \end{bmatrix} + \frac{1}{K} \sum_k b_{1,k}

    Its softmax is the normalised geometric mean of the members' probabilities (a logarithmic opinion pool), where
    ``ensemble_probabilities`` of the members themselves is the arithmetic one. The last aggregation has C columns
    instead of K C, and there is one softmax.

    Args:
      members: trained, of one graph.

    Returns:
      ``GcnMembers`` with K = 1, which every function of members takes.

    Example:
      >>> folded = fold_members(init_members(jax.random.key(0), 4, 3, 16, 2))
      >>> folded.kernel_0.shape, folded.kernel_1.shape
      ((1, 3, 64), (1, 64, 2))
    """
    return _folded(members)


@functools.partial(jax.jit, inline=True)
def _folded(members: GcnMembers) -> GcnMembers:
    count, width, hidden = members.kernel_0.shape
    return GcnMembers(
        jnp.moveaxis(members.kernel_0, 0, 1).reshape(1, width, count * hidden),
        members.bias_0.reshape(1, -1),
        members.kernel_1.reshape(1, count * hidden, -1) / count,
        jnp.mean(members.bias_1, axis=0, keepdims=True),
    )


def ensemble_logits(
    members: GcnMembers,
    features: SparseMatrix | Float[Array, "nodes features"],
    adjacency: SparseMatrix,
    *,
    last: SparseMatrix | None = None,
    propagated: bool = False,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    loop: Loop = "columns",
) -> Float[Array, "members nodes classes"]:
    r"""Logits of all members, by one of four loops over them.

    .. math:: Z_k = S_2\, \mathrm{relu}(S_1 X W_{0,k} + b_{0,k})\, W_{1,k} + b_{1,k}

    ``'columns'`` puts the members side by side: one product with X and, where they share the graph, one with S in every
    layer. ``'vmap'``, ``'map'`` and ``'unroll'`` are loops over members (``effjax.core.loops``). Which is fastest
    depends on the size: ``fastest_members_loop`` measures.

    Args:
      members: K of them.
      features: X, dense or sparse.
      adjacency: S of both layers, normalised; its values are [nnz], or [K, nnz] where members see graphs of their own.
      last: S of the second layer, if it differs.
      propagated: ``features`` are already S X, and the first layer is a plain product.
      dropout: rate on the hidden layer, in training.
      key: of the dropout; needed where the rate is above 0.
      loop: see above.

    Returns:
      [K, N, C].

    Raises:
      TypeError: an adjacency of another kind.
      ValueError: an unknown ``loop``, a dropout without key, features of another shape, or values for another number
        of members.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> ensemble_logits(members, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2)).shape
      (2, 2, 2)
    """
    check_choice("loop", loop, LOOPS)
    check_number("dropout", dropout, low=0, high=1, open_high=True)
    if dropout and key is None:
        raise ValueError(f"dropout={dropout} needs a key. Pass one, or leave dropout out when evaluating.")
    last = adjacency if last is None else last
    for name, matrix in (("adjacency", adjacency), ("last", last)):
        check_graphs(name, matrix, members)
    check_features(features, members, adjacency)
    return _logits((loop, propagated, dropout), members, features, adjacency, last, key)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _logits(how, members, features, adjacency, last, key):
    loop, propagated, dropout = how
    keys = jax.random.split(key, members.size) if dropout else None
    if loop == "columns":
        return _columns(members, features, adjacency, last, propagated, dropout, keys)
    own = tuple(matrix.values if matrix.values.ndim == 2 else None for matrix in (adjacency, last))
    return stacked_map(
        functools.partial(_one, propagated, dropout),
        (members, own, keys),
        features,
        (adjacency, last),
        size=members.size,
        loop=loop,
    )


def check_graphs(name: str, matrix: SparseMatrix, members: GcnMembers) -> None:
    """Raise where a matrix is no graph of all members, nor one graph for each."""
    values = check_matrix(name, matrix, square=True, stacked=True).values
    if values.ndim == 2 and values.shape[0] != members.size:
        raise ValueError(
            f"{name}.values has shape {values.shape}: {values.shape[0]} graphs for {members.size} members. Give one "
            "row for every member, or one vector for all."
        )


def check_features(features: SparseMatrix | jax.Array, members: GcnMembers, adjacency: SparseMatrix) -> None:
    """Raise where features are not [N, F] of the graph and the members."""
    if isinstance(features, SparseMatrix):
        check_matrix("features", features)
    wanted = (adjacency.shape[0], members.kernel_0.shape[1])
    if tuple(features.shape) != wanted:
        raise ValueError(f"features has shape {tuple(features.shape)}; the graph and the members need {list(wanted)}.")


def _one(propagated, dropout, member, features, matrices):
    """One member; its slices, and what all share."""
    (kernel_0, bias_0, kernel_1, bias_1), own, key = member
    first, last = (_with_values(given, row) for given, row in zip(matrices, own, strict=True))
    hidden = matmul(features, kernel_0)
    hidden = jax.nn.relu((hidden if propagated else spmm(first, hidden)) + bias_0[None])
    if dropout:
        hidden = _dropped(hidden, jax.random.bernoulli(key, 1 - dropout, hidden.shape), dropout)
    return spmm(last, hidden @ kernel_1) + bias_1[None]


def _with_values(matrix: SparseMatrix, values: jax.Array | None) -> SparseMatrix:
    return matrix if values is None else matrix._replace(values=values)


def _columns(members, features, first, last, propagated, dropout, keys):
    count, width, hidden_units = members.kernel_0.shape
    flat = jnp.moveaxis(members.kernel_0, 0, 1).reshape(width, count * hidden_units)
    hidden = matmul(features, flat)
    hidden = hidden.reshape(hidden.shape[0], count, hidden_units)
    hidden = jax.nn.relu((hidden if propagated else aggregate_members(first, hidden)) + members.bias_0[None])
    if dropout:
        draw = lambda key: jax.random.bernoulli(key, 1 - dropout, (hidden.shape[0], hidden_units))
        hidden = _dropped(hidden, jnp.moveaxis(jax.vmap(draw)(keys), 0, 1), dropout)
    logits = aggregate_members(last, jnp.einsum("nkh,khc->nkc", hidden, members.kernel_1)) + members.bias_1[None]
    return jnp.moveaxis(logits, 1, 0)


def aggregate_members(matrix: SparseMatrix, x: jax.Array) -> jax.Array:
    """S of every member times its slice, [N, K, ...] -> [N, K, ...]: one product where the members share the values."""
    if matrix.values.ndim == 1:
        return spmm(matrix, x)
    return jax.vmap(lambda values, x: spmm(matrix._replace(values=values), x), in_axes=(0, 1), out_axes=1)(
        matrix.values, x
    )


def _dropped(x: jax.Array, keep: jax.Array, dropout: float) -> jax.Array:
    return jnp.where(keep, x / (1 - dropout), 0)


def ensemble_probabilities(
    logits: Float[Array, "members nodes classes"],
) -> Float[Array, "nodes classes"]:
    """Mean of the members' softmax, in float32 or wider.

    Args:
      logits: [K, N, C], of ``ensemble_logits``.

    Returns:
      [N, C]; rows sum to 1.

    Example:
      >>> ensemble_probabilities(jnp.zeros((3, 1, 2))).tolist()
      [[0.5, 0.5]]
    """
    return _mean_softmax(logits)


@functools.partial(jax.jit, inline=True)
def _mean_softmax(logits: jax.Array) -> jax.Array:
    return jnp.mean(_softmax(logits), axis=0)


def member_probabilities(logits: Float[Array, "members nodes classes"]) -> Float[Array, "members nodes classes"]:
    """Softmax of every member, in float32 or wider; what ``error_scores`` takes.

    Args:
      logits: [K, N, C], of ``ensemble_logits``.

    Returns:
      [K, N, C]; rows sum to 1.

    Example:
      >>> member_probabilities(jnp.zeros((1, 1, 2))).tolist()
      [[[0.5, 0.5]]]
    """
    return _softmax(logits)


@functools.partial(jax.jit, inline=True)
def _softmax(logits: jax.Array) -> jax.Array:
    return jax.nn.softmax(wide(logits))


def members_loss(
    logits: Float[Array, "members nodes classes"],
    labels: Int[Array, "nodes"],
    mask: Bool[Array, "nodes"],
) -> Float[Array, ""]:
    """Sum over the members of their ``masked_cross_entropy``: every member trains as if it were alone.

    Args:
      logits: of ``ensemble_logits``.
      labels: integers [N]; not read outside the mask, and -1 counts nowhere.
      mask: the training nodes; ``[K, N]`` gives every member its own.

    Returns:
      A scalar, nats.

    Raises:
      ValueError: labels or a mask of another shape or kind.

    Example:
      >>> round(float(members_loss(jnp.zeros((2, 1, 4)), jnp.array([3]), jnp.array([True]))), 4)
      2.7726
    """
    return jnp.sum(masked_cross_entropy(logits, labels, mask))


def fastest_members_loop(
    members: GcnMembers,
    features: SparseMatrix | jax.Array,
    adjacency: SparseMatrix,
    *,
    training: bool = True,
) -> Loop:
    """The ``loop`` of ``ensemble_logits`` that is fastest on this graph and device, measured. Not under ``jit``.

    Args:
      members: as for ``ensemble_logits``.
      features: X, [N, F].
      adjacency: S, [N, N].
      training: time the gradient with respect to the members, not the logits.

    Returns:
      One of ``'columns'``, ``'vmap'``, ``'map'``, ``'unroll'``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> fastest_members_loop(members, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2)) in LOOPS
      True
    """
    programs: dict[Loop, Callable[[], jax.Array]] = {}
    for loop in LOOPS:
        logits = functools.partial(ensemble_logits, loop=loop)
        total = lambda *arguments, logits=logits: jnp.sum(jnp.square(logits(*arguments)))
        program = jax.jit(jax.grad(total) if training else logits).lower(members, features, adjacency).compile()
        programs[loop] = functools.partial(program, members, features, adjacency)
    return fastest(programs)


class EnsembleMacs(NamedTuple):
    """Multiply-accumulates of one forward pass of the ensemble.

    Attributes:
      features: X W, ``entries of X * K H``.
      aggregate: S times it, in both layers, ``nnz K (H + C)``.
      classes: the second kernel, ``N K H C``.
    """

    features: int
    aggregate: int
    classes: int

    @property
    def total(self) -> int:
        """Their sum."""
        return self.features + self.aggregate + self.classes


def ensemble_macs(
    members: GcnMembers, features: SparseMatrix | jax.Array, adjacency: SparseMatrix, *, propagated: bool = False
) -> EnsembleMacs:
    """What ``ensemble_logits`` multiplies and adds: isolation lowers ``aggregate``, narrow members all three.

    Args:
      members: K networks.
      features: X, [N, F]; of a sparse one only the entries count.
      adjacency: S.
      propagated: whether S X is stored, so that the first product with S is left out.

    Returns:
      ``EnsembleMacs``: multiply-adds of the products with features, adjacency and second kernel.

    Raises:
      ValueError: an adjacency that is not [N, N], or not one for all or for each member.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> ensemble_macs(members, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2))
      EnsembleMacs(features=32, aggregate=48, classes=32)
    """
    check_graphs("adjacency", adjacency, members)
    count, _, hidden = members.kernel_0.shape
    classes = members.kernel_1.shape[-1]
    entries = features.nnz if isinstance(features, SparseMatrix) else math.prod(features.shape)
    columns = classes if propagated else hidden + classes
    return EnsembleMacs(
        entries * count * hidden, count * adjacency.nnz * columns, features.shape[0] * count * hidden * classes
    )
