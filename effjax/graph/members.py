"""Graph networks of two layers, several of them stacked: they train and run side by side as one program.

The members of a GEENI ensemble (``effjax.graph.geeni``).
"""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_choice, check_number
from effjax.core.loops import stacked_map
from effjax.core.timing import time_interleaved
from effjax.graph.sparse.matrix import SparseMatrix, matmul, spmm

__all__ = [
    "GcnMembers",
    "ensemble_logits",
    "ensemble_macs",
    "ensemble_probabilities",
    "fastest_members_form",
    "fold_members",
    "init_members",
    "mask_features",
    "member_probabilities",
    "members_loss",
    "prune_width",
]

Form = Literal["columns", "vmap", "map", "unroll"]
FORMS = ("columns", "vmap", "map", "unroll")


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
    def count(self) -> int:
        """K."""
        return self.kernel_0.shape[0]


def init_members(key: jax.Array, count: int, features: int, hidden: int, classes: int) -> GcnMembers:
    """Members that differ by their seed: Glorot uniform kernels, zero biases.

    Args:
      key: member k is drawn from the k-th of ``split(key, count)``.
      count: K.
      features: F.
      hidden: H. For K members at the cost of one of width H', take H' / K.
      classes: C.

    Returns:
      ``GcnMembers`` in float32.

    Example:
      >>> init_members(jax.random.key(0), 2, 2, 4, 2).kernel_0.shape
      (2, 2, 4)
    """
    for name, number in (("count", count), ("features", features), ("hidden", hidden), ("classes", classes)):
        check_number(name, number, low=1, integer=True)
    draw = jax.nn.initializers.glorot_uniform()

    def one(key: jax.Array) -> GcnMembers:
        first, second = jax.random.split(key)
        return GcnMembers(
            draw(first, (features, hidden)), jnp.zeros(hidden), draw(second, (hidden, classes)), jnp.zeros(classes)
        )

    return jax.vmap(one)(jax.random.split(key, count))


def mask_features(members: GcnMembers, keep: Bool[Array, "members features"]) -> GcnMembers:
    """Members that do not see some of the features: those rows of the first kernel are zero, and so is their gradient.

    Example:
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> mask_features(members, jnp.array([[True, True], [True, False]])).kernel_0[1, 1].tolist()
      [0.0, 0.0, 0.0, 0.0]
    """
    return members._replace(kernel_0=jnp.where(keep[:, :, None], members.kernel_0, 0))


def prune_width(members: GcnMembers, width: int) -> GcnMembers:
    r"""Trained members with only their strongest hidden units, those of largest
    :math:`\lVert W_{0,\cdot h} \rVert\, \lVert W_{1,h \cdot} \rVert`.

    Args:
      members: of width H.
      width: hidden units that stay, in [1, H].

    Returns:
      Members of that width; the units keep their order.

    Example:
      >>> prune_width(init_members(jax.random.key(0), 2, 2, 4, 2), 3).kernel_1.shape
      (2, 3, 2)
    """
    check_number("width", width, low=1, high=members.kernel_0.shape[-1], integer=True)
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
    matrix: SparseMatrix,
    *,
    last: SparseMatrix | None = None,
    propagated: bool = False,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    form: Form = "columns",
) -> Float[Array, "members nodes classes"]:
    r"""Logits of all members, in one of four forms of one computation.

    .. math:: Z_k = S_2\, \mathrm{relu}(S_1 X W_{0,k} + b_{0,k})\, W_{1,k} + b_{1,k}

    ``'columns'`` puts the members side by side: one product with X and, where they share the graph, one with S in every
    layer. ``'vmap'``, ``'map'`` and ``'unroll'`` are loops over members (``effjax.core.loops``). Which is fastest
    depends on the size: ``fastest_members_form`` measures.

    Args:
      members: K of them.
      features: X, dense or sparse.
      matrix: S of both layers, normalised; its values are [nnz], or [K, nnz] where members see graphs of their own.
      last: S of the second layer, if it differs.
      propagated: ``features`` are already S X, and the first layer is a plain product.
      dropout: rate on the hidden layer, in training.
      key: of the dropout; needed where the rate is above 0.
      form: see above.

    Returns:
      [K, N, C].

    Raises:
      ValueError: an unknown ``form``, a dropout without key, or values for another number of members.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> ensemble_logits(members, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2)).shape
      (2, 2, 2)
    """
    check_choice("form", form, FORMS)
    check_number("dropout", dropout, low=0, high=1, open_high=True)
    if dropout and key is None:
        raise ValueError(f"dropout={dropout} needs a key. Pass one, or leave dropout out when evaluating.")
    last = matrix if last is None else last
    for name, given in (("matrix", matrix), ("last", last)):
        if given.values.ndim == 2 and given.values.shape[0] != members.count:
            raise ValueError(
                f"{name}.values has shape {given.values.shape}: {given.values.shape[0]} graphs for {members.count} "
                "members. Give one row for every member, or one vector for all."
            )
    keys = jax.random.split(key, members.count) if dropout else None
    if form == "columns":
        return _columns(members, features, matrix, last, propagated, dropout, keys)
    own = tuple(given.values if given.values.ndim == 2 else None for given in (matrix, last))
    return stacked_map(
        functools.partial(_one, propagated, dropout),
        (members, own, keys),
        features,
        (matrix, last),
        size=members.count,
        loop=form,
    )


def _one(propagated, dropout, member, features, matrices):
    """One member; its slices, and what all share."""
    (kernel_0, bias_0, kernel_1, bias_1), own, key = member
    first, last = (_with_values(given, row) for given, row in zip(matrices, own, strict=True))
    hidden = matmul(features, kernel_0)
    hidden = jax.nn.relu((hidden if propagated else spmm(first, hidden)) + bias_0)
    if dropout:
        hidden = _dropped(hidden, jax.random.bernoulli(key, 1 - dropout, hidden.shape), dropout)
    return spmm(last, hidden @ kernel_1) + bias_1


def _with_values(matrix: SparseMatrix, values: jax.Array | None) -> SparseMatrix:
    return matrix if values is None else matrix._replace(values=values)


def _columns(members, features, first, last, propagated, dropout, keys):
    count, width, hidden_units = members.kernel_0.shape
    flat = jnp.moveaxis(members.kernel_0, 0, 1).reshape(width, count * hidden_units)
    hidden = matmul(features, flat)
    hidden = hidden.reshape(hidden.shape[0], count, hidden_units)
    hidden = jax.nn.relu((hidden if propagated else aggregate_members(first, hidden)) + members.bias_0)
    if dropout:
        draw = lambda key: jax.random.bernoulli(key, 1 - dropout, (hidden.shape[0], hidden_units))
        hidden = _dropped(hidden, jnp.moveaxis(jax.vmap(draw)(keys), 0, 1), dropout)
    logits = aggregate_members(last, jnp.einsum("nkh,khc->nkc", hidden, members.kernel_1)) + members.bias_1
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

    Example:
      >>> ensemble_probabilities(jnp.zeros((3, 1, 2))).tolist()
      [[0.5, 0.5]]
    """
    return jnp.mean(member_probabilities(logits), axis=0)


def member_probabilities(logits: Float[Array, "members nodes classes"]) -> Float[Array, "members nodes classes"]:
    """Softmax of every member, in float32 or wider; what ``error_scores`` takes.

    Example:
      >>> member_probabilities(jnp.zeros((1, 1, 2))).tolist()
      [[[0.5, 0.5]]]
    """
    return jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))


def members_loss(
    logits: Float[Array, "members nodes classes"],
    labels: Int[Array, "nodes"],
    mask: Bool[Array, "nodes"],
) -> Float[Array, ""]:
    """Sum over the members of their mean cross-entropy: every member trains as if it were alone.

    Args:
      logits: of ``ensemble_logits``.
      labels: not read outside the mask.
      mask: the training nodes; ``[K, N]`` gives every member its own.

    Returns:
      A scalar, nats.

    Example:
      >>> round(float(members_loss(jnp.zeros((2, 1, 4)), jnp.array([3]), jnp.array([True]))), 4)
      2.7726
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    weights = jnp.broadcast_to(mask, logits.shape[:2]).astype(log_p.dtype)
    # A sum over classes, as the gradient of a gather would be a scatter.
    picked = jnp.sum(log_p * jax.nn.one_hot(labels, logits.shape[-1], dtype=log_p.dtype), axis=-1)
    return -jnp.sum(jnp.sum(weights * picked, 1) / jnp.maximum(jnp.sum(weights, 1), 1))


def fastest_members_form(
    members: GcnMembers,
    features: SparseMatrix | jax.Array,
    matrix: SparseMatrix,
    *,
    training: bool = True,
    rounds: int = 5,
) -> str:
    """The form of ``ensemble_logits`` that is fastest on this graph and device, measured. Not under ``jit``.

    Args:
      members: as for ``ensemble_logits``.
      features: likewise.
      matrix: likewise.
      training: time the gradient with respect to the members, not the logits.
      rounds: of the measurement; the forms take turns.

    Returns:
      One of ``'columns'``, ``'vmap'``, ``'map'``, ``'unroll'``.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> fastest_members_form(members, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2), rounds=1) in FORMS
      True
    """
    programs = {}
    for form in FORMS:
        logits = functools.partial(ensemble_logits, form=form)
        total = lambda *arguments, logits=logits: jnp.sum(jnp.square(logits(*arguments)))
        program = jax.jit(jax.grad(total) if training else logits)
        programs[form] = functools.partial(program, members, features, matrix)
    times = time_interleaved(programs, rounds=rounds)
    return min(times, key=lambda form: min(times[form].samples_ms))


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
    members: GcnMembers, features: SparseMatrix | jax.Array, matrix: SparseMatrix, *, propagated: bool = False
) -> EnsembleMacs:
    """What ``ensemble_logits`` multiplies and adds: isolation lowers ``aggregate``, narrow members all three.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> members = init_members(jax.random.key(0), 2, 2, 4, 2)
      >>> ensemble_macs(members, jnp.eye(2), gcn_adjacency([0, 1], [1, 0], 2))
      EnsembleMacs(features=32, aggregate=48, classes=32)
    """
    count, _, hidden = members.kernel_0.shape
    classes = members.kernel_1.shape[-1]
    entries = features.nnz if isinstance(features, SparseMatrix) else math.prod(features.shape)
    columns = classes if propagated else hidden + classes
    return EnsembleMacs(
        entries * count * hidden, count * matrix.nnz * columns, features.shape[0] * count * hidden * classes
    )
