"""The parts of FASTRAIN (``effjax.graph.fastrain``), each a function of its own.

``stage_plan`` (dynamic sizing and dynamic regularisation), ``drop_edges`` (the regulariser itself),
``select_pseudolabels`` (sampling-based filtering), ``prune_edges`` (progressive graph pruning), and ``train_stage``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from effjax.core.errors import check_number
from effjax.core.shapes import smallest_fit
from effjax.graph.measures import masked_cross_entropy
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.layers import hashed_bits
from effjax.graph.sparse.matrix import SparseMatrix, SparsePattern, check_matrix, select_entries

__all__ = ["adam_l2", "drop_edges", "prune_edges", "select_pseudolabels", "stage_plan", "train_stage"]

PyTree = Any
Apply = Callable[..., jax.Array]


class Stage(NamedTuple):
    """What one stage of self-training trains.

    Attributes:
      deep: the network with one more layer, or the shallow one.
      keep_rate: probability with which an epoch keeps an entry of the adjacency.
    """

    deep: bool
    keep_rate: float


def stage_plan(
    nodes: int,
    classes: int,
    labelled: int,
    *,
    deep_below: float = 0.025,
    deep_rate: float = 0.9,
    shallow_rate: float = 0.8,
    one_shot_rate: float = 1.0,
) -> Stage:
    r"""Dynamic sizing and dynamic regularisation: depth and edge dropping by the size of the training set.

    .. math::
        \mathrm{deep} = [\,n < 0.025\,N\,], \qquad
        \mathrm{rate} = \begin{cases} 1 & n = C \text{ and deep} \\ 0.9 & \text{deep} \\ 0.8 & \text{else} \end{cases}

    Few labels need a wide receptive field and bear little noise; many labels need neither depth nor every edge.

    Args:
      nodes: N of the graph.
      classes: C.
      labelled: n, nodes with a label or a pseudolabel, as the stage begins.
      deep_below: share of N below which (strictly) the network is deep; 0 never, 1 (as good as) always.
      deep_rate: probability of keeping an entry in deep stages.
      shallow_rate: the same in shallow stages.
      one_shot_rate: the same in deep stages where ``labelled == classes``, one label per class.

    Returns:
      A ``Stage``.

    Raises:
      ValueError: numbers out of range.

    Example:
      >>> stage_plan(2708, 7, 56), stage_plan(2708, 7, 1500)
      (Stage(deep=True, keep_rate=0.9), Stage(deep=False, keep_rate=0.8))

    The authors' program of April 2023; that of October 2022 was deep below 16 labels per class (64 on PubMed) instead.
    """
    check_number("nodes", nodes, low=1, integer=True)
    check_number("classes", classes, low=2, integer=True)
    check_number("labelled", labelled, low=1, high=nodes, integer=True, hint="Without a label nothing can be trained.")
    check_number("deep_below", deep_below, low=0, high=1)
    rates = {"deep_rate": deep_rate, "shallow_rate": shallow_rate, "one_shot_rate": one_shot_rate}
    for name, rate in rates.items():
        check_number(name, rate, low=0, high=1, open_low=True)
    if labelled < deep_below * nodes:
        return Stage(True, one_shot_rate if labelled == classes else deep_rate)
    return Stage(False, shallow_rate)


def drop_count(nnz: int, keep_rate: float) -> int:
    """Entries that the authors' program zeroes: ``int(nnz * (1 - keep_rate))`` in double precision.

    Example:
      >>> drop_count(190, 0.9)  # 1 - 0.9 is a little less than 0.1
      18
    """
    check_number("nnz", nnz, low=0, integer=True)
    check_number("keep_rate", keep_rate, low=0, high=1)
    return int(nnz * (1 - keep_rate))


def drop_edges(key: jax.Array, matrix: SparseMatrix, keep_rate: float | jax.Array) -> SparseMatrix:
    """The matrix with every entry zeroed with probability ``1 - keep_rate``; the rest is not scaled up.

    Each direction of an edge has its own draw, and self-loops may go too. It saves no time, as products still run over
    all entries; ``FastrainConfig(pool=...)`` does.

    Args:
      key: of the draw.
      matrix: normalised adjacency.
      keep_rate: probability of staying, a number or a traced scalar.

    Returns:
      A ``SparseMatrix`` of the same pattern.

    Raises:
      TypeError: no ``SparseMatrix``.
      ValueError: ``keep_rate`` out of [0, 1].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> matrix = gcn_adjacency([0, 1], [1, 0], 2)
      >>> bool((drop_edges(jax.random.key(0), matrix, 1.0).values == matrix.values).all())
      True

    The authors drop an exact number (``FastrainConfig(exact_drop=True)``), which takes a sort.

    Source: Nagarajan, Raghunathan 2023, TMLR (OpenReview 1IYJfwJtjQ).
    """
    check_matrix("matrix", matrix, stacked=True)
    check_number("keep_rate", keep_rate, low=0, high=1)
    # The upper bits, as a whole one is not below 2**32 in any integer at hand: the rate is rounded to a 65536th.
    draw = hashed_bits(key, matrix.values.shape) >> 16
    stays = draw < jnp.round(jnp.asarray(keep_rate, jnp.float32) * 65536).astype(jnp.uint32)
    return matrix._replace(values=jnp.where(stays, matrix.values, 0))


def drop_edges_exactly(key: jax.Array, matrix: SparseMatrix, dropped: int | jax.Array) -> SparseMatrix:
    """The matrix with exactly ``dropped`` of its entries zeroed, drawn without replacement; padding does not count.

    Args:
      key: of the draw.
      matrix: normalised adjacency.
      dropped: how many, ``drop_count``; a number or a traced scalar.

    Returns:
      A ``SparseMatrix`` of the same pattern.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> matrix = gcn_adjacency([0, 1, 1, 2], [1, 0, 2, 1], 3)
      >>> int((drop_edges_exactly(jax.random.key(0), matrix, 2).values == 0).sum())
      2
    """
    check_matrix("matrix", matrix)
    check_number("dropped", dropped, low=0, high=matrix.nnz, integer=True)
    draw = jnp.where(matrix.pattern.valid, jax.random.uniform(key, matrix.values.shape), 2.0)
    order = jnp.argsort(draw)
    stays = jnp.zeros(order.shape, bool).at[order].set(jnp.arange(order.size) >= dropped)
    return matrix._replace(values=jnp.where(stays, matrix.values, 0))


def edge_pool(rng: np.random.Generator, matrix: SparseMatrix, keep_rate: float, size: int) -> SparseMatrix:
    """Subsets of a matrix's entries, compacted, so that dropping edges shortens the product. Runs on the host.

    An epoch takes one of them at random (``pick_subset``) instead of drawing its own: fewer entries in every product,
    no random numbers, but only ``size`` different graphs a stage.

    Args:
      rng: of the draws.
      matrix: normalised adjacency.
      keep_rate: of the real entries; a subset holds exactly ``nnz - drop_count(nnz, keep_rate)``.
      size: number of subsets.

    Returns:
      A ``SparseMatrix`` whose arrays have a leading axis ``[size]``.

    Raises:
      ValueError: nothing would be kept, or numbers out of range.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pool = edge_pool(np.random.default_rng(0), gcn_adjacency([0, 1], [1, 0], 2), 0.75, 8)
      >>> pool.values.shape
      (8, 3)
    """
    check_number("size", size, low=1, integer=True)
    nnz = int(matrix.pattern.size)
    kept = nnz - drop_count(nnz, keep_rate)
    check_number("kept entries", kept, low=1, hint=f"keep_rate={keep_rate} leaves none of the {nnz} entries.")
    host = jax.device_get(matrix)
    subsets = []
    for _ in range(size):
        mask = np.zeros(matrix.nnz, bool)
        mask[rng.permutation(nnz)[:kept]] = True
        subsets.append(_subset(host, mask))
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves)), *subsets)


def pick_subset(key: jax.Array, pool: SparseMatrix) -> SparseMatrix:
    """One subset of an ``edge_pool`` at random."""
    index = jax.random.randint(key, (), 0, pool.values.shape[0])
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), pool)


def _subset(matrix: SparseMatrix, mask: np.ndarray) -> SparseMatrix:
    """The masked entries of a host matrix; both orders are kept, so nothing is sorted."""
    pattern = matrix.pattern
    place = np.cumsum(mask, dtype=np.int32) - 1
    t_mask = mask[pattern.t_order]
    before = lambda kept, starts: np.concatenate([[0], np.cumsum(kept)])[starts].astype(np.int32)
    return SparseMatrix(
        SparsePattern(
            indptr=before(mask, pattern.indptr),
            columns=pattern.columns[mask],
            rows=pattern.rows[mask],
            t_indptr=before(t_mask, pattern.t_indptr),
            t_rows=pattern.t_rows[t_mask],
            t_order=place[pattern.t_order[t_mask]],
            size=np.asarray(mask.sum(), np.int32),
            buckets=None,
            shape=pattern.shape,
        ),
        matrix.values[mask],
    )


def select_pseudolabels(
    confidence: Float[Array, "nodes"],
    mask: Bool[Array, "nodes"],
    threshold: float,
    sampled: Int[Array, "count nodes"] | None = None,
) -> Bool[Array, "nodes"]:
    r"""Sampling-based pseudolabel filtering: the nodes that become training nodes.

    .. math:: \mathrm{new}_i = [\,c_i > \tau\,] \wedge [\,\hat y_i^{(1)} = \dots = \hat y_i^{(m)}\,] \wedge i \notin T

    Sampled predictions are those on graphs with randomly dropped edges. As in the authors' program they must agree
    among themselves, not with the prediction on the whole graph, which becomes the label.

    Args:
      confidence: c, largest (calibrated) probability of each node.
      mask: T, nodes that have a label or pseudolabel already; those stay as they are.
      threshold: tau, exceeded strictly.
      sampled: predictions on sampled graphs; None for plain self-training.

    Returns:
      Mask of the new nodes.

    Raises:
      ValueError: ``threshold`` outside [0, 1], or arrays of unlike length.

    Example:
      >>> confidence, mask = jnp.array([0.95, 0.9, 0.9, 0.5]), jnp.array([True, False, False, False])
      >>> select_pseudolabels(confidence, mask, 0.8, jnp.array([[0, 1, 1, 0], [0, 1, 2, 0]])).tolist()
      [False, True, False, False]

    Source: Nagarajan, Raghunathan 2023, TMLR (OpenReview 1IYJfwJtjQ).
    """
    check_number("threshold", threshold, low=0, high=1)
    check_array("confidence", confidence, (None,), "floating")
    check_array("mask", mask, confidence.shape, "bool")
    new = (confidence > threshold) & ~mask
    if sampled is None:
        return new
    check_array("sampled", sampled, (None, *confidence.shape), "integers")
    return new & unanimous(sampled)


def unanimous(sampled: Int[Array, "count nodes"]) -> Bool[Array, "nodes"]:
    """Nodes for which all sampled predictions are the same.

    Example:
      >>> unanimous(jnp.array([[0, 1], [0, 2]])).tolist()
      [True, False]
    """
    return (sampled == sampled[:1]).all(0)


def prune_edges(
    pattern: SparsePattern,
    keep: Bool[Array, "nnz"],
    predictions: Int[Array, "nodes"],
    mask: Bool[Array, "nodes"],
) -> Bool[Array, "nnz"]:
    r"""Progressive graph pruning: edges between training nodes that are predicted to be of different classes go.

    .. math::
        \mathrm{keep}_{ij} \leftarrow \mathrm{keep}_{ij} \wedge
        \neg\,[\,i \in T,\ j \in T,\ \hat y_i \ne \hat y_j\,]

    Self-loops stay, and so do the values of the remaining entries. The saving comes from ``select_entries``.

    Args:
      pattern: of the adjacency.
      keep: entries that earlier stages kept.
      predictions: of the stage's network, for true labels too.
      mask: T, new pseudolabels included.

    Returns:
      The new mask of entries.

    Raises:
      ValueError: arrays of another length.

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> pattern = gcn_adjacency([0, 1], [1, 0], 2).pattern
      >>> prune_edges(pattern, jnp.ones(4, bool), jnp.array([0, 1]), jnp.array([True, True])).tolist()
      [True, False, False, True]
    """
    nodes = pattern.shape[0]
    check_array("keep", keep, (pattern.nnz,), "bool")
    check_array("predictions", predictions, (nodes,), "integers")
    check_array("mask", mask, (nodes,), "bool")
    inside = mask[pattern.rows] & mask[pattern.columns]
    return keep & ~(inside & (predictions[pattern.rows] != predictions[pattern.columns]))


def nnz_ladder(nnz: int, *, shrink: float = 0.95, least: float = 0.85) -> tuple[int, ...]:
    """Sizes that a pruned matrix is padded to: ``nnz`` times powers of ``shrink``, so that pruning rarely recompiles.

    Args:
      nnz: entries before pruning.
      shrink: ratio of neighbouring sizes.
      least: share of ``nnz`` below which there are no more sizes.

    Returns:
      Increasing sizes; the last is ``nnz``.

    Example:
      >>> nnz_ladder(1000)
      (856, 902, 950, 1000)
    """
    check_number("nnz", nnz, low=1, integer=True)
    check_number("shrink", shrink, low=0, high=1, open_low=True, open_high=True)
    check_number("least", least, low=0, high=1, open_low=True)
    sizes = [nnz]
    while (smaller := int(sizes[-1] * shrink)) >= max(1, least * nnz):
        sizes.append(smaller)
    return tuple(reversed(sizes))


def select_to_ladder(matrix: SparseMatrix, keep: np.ndarray) -> SparseMatrix:
    """The kept entries alone, padded to the ``nnz_ladder`` of the whole matrix. Runs on the host."""
    keep = np.asarray(keep)
    rungs = nnz_ladder(int(matrix.pattern.size))
    return select_entries(matrix, keep, capacity=smallest_fit(int(keep.sum()), rungs))


def train_stage(
    key: jax.Array,
    apply: Apply,
    tx: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    *,
    features: Any,
    sample: Callable[[jax.Array], SparseMatrix],
    labels: Int[Array, "nodes"],
    weights: Float[Array, "nodes"],
    epochs: int,
    first: int | jax.Array = 0,
) -> tuple[PyTree, PyTree, Float[Array, "epochs"]]:
    r"""Full-batch epochs on the labelled and pseudolabelled nodes, each on a graph of its own.

    .. math:: \min_\theta\ \frac{\sum_i w_i\, \mathrm{CE}(f_\theta(X, A_e)_i, z_i)}{\sum_i w_i}

    One ``lax.scan``, so the training set may grow without compiling anew. Map it over labelled sets with ``jax.vmap``
    on an accelerator (batched: key, state, params, labels, weights), with ``jax.lax.map`` on a CPU.

    Args:
      key: of the stage; epoch e uses ``fold_in(key, e)``.
      apply: ``(params, features, adjacency, *, key=None) -> logits [N, C]``; with a key it is in training mode.
      tx: the optimizer; the authors' is ``adam_l2``.
      state: the optimizer's state.
      params: parameters.
      features: passed on to the network.
      sample: ``key -> adjacency`` of an epoch, such as ``lambda key: drop_edges(key, matrix, 0.9)``.
      labels: z, integers [N]; not read where ``weights`` is 0.
      weights: of the nodes in the loss; 1 for members of the training set, 0 for all others.
      epochs: how many, static.
      first: number of the first epoch, for training in pieces.

    Returns:
      The optimizer's state, parameters and the loss of every epoch.

    Raises:
      ValueError: labels or weights that are not [N].

    Example:
      >>> from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
      >>> matrix, tx = gcn_adjacency([0, 1], [1, 0], 2), optax.sgd(1.0)
      >>> apply = lambda params, features, adjacency, *, key=None: adjacency @ (features @ params)
      >>> start = jnp.zeros((2, 2))
      >>> _, params, losses = train_stage(
      ...     jax.random.key(0), apply, tx, tx.init(start), start, features=jnp.eye(2), sample=lambda key: matrix,
      ...     labels=jnp.array([1, -1]), weights=jnp.array([1.0, 0.0]), epochs=3,
      ... )
      >>> bool(losses[2] < losses[0])
      True

    Source: Nagarajan, Raghunathan 2023, TMLR (OpenReview 1IYJfwJtjQ).
    """
    check_number("epochs", epochs, low=1, integer=True)
    check_array("labels", labels, (None,), "integers")
    check_array("weights", weights, labels.shape, "floating")

    def loss(params: PyTree, key: jax.Array) -> jax.Array:
        graph_key, network_key = jax.random.split(key)
        logits = apply(params, features, sample(graph_key), key=network_key)
        return masked_cross_entropy(logits, labels, weights)

    return scan_epochs(key, loss, tx, state, params, epochs=epochs, first=first)


def scan_epochs(
    key: jax.Array,
    loss: Callable[[PyTree, jax.Array], jax.Array],
    tx: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    *,
    epochs: int,
    first: int | jax.Array = 0,
) -> tuple[PyTree, PyTree, Float[Array, "epochs"]]:
    """Full-batch updates by the gradient of ``loss(params, fold_in(key, epoch))``, as one ``lax.scan``."""

    def epoch(carry: tuple[PyTree, PyTree], number: jax.Array) -> tuple[tuple[PyTree, PyTree], jax.Array]:
        state, params = carry
        value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(key, number))
        updates, state = tx.update(grads, state, params)
        return (state, optax.apply_updates(params, updates)), value

    (state, params), losses = jax.lax.scan(epoch, (state, params), first + jnp.arange(epochs))
    return state, params, losses


def evaluate_stages(
    truth: Int[Array | np.ndarray, "nodes"],
    labels: Int[Array | np.ndarray, "nodes"],
    added: Int[Array | np.ndarray, "nodes"],
    predictions: Int[Array | np.ndarray, "stages nodes"],
) -> dict[str, float]:
    """Accuracy after every stage on the nodes that had no label at the start; precision and number of pseudolabels.

    Args:
      truth: all labels, -1 where unknown; those nodes do not count.
      labels: true and pseudolabels of the last stage.
      added: the stage that labelled a node, from 1 on; 0 for given labels, -1 for none.
      predictions: after each finished stage.

    Returns:
      ``accuracy`` after the last stage; with several, ``accuracy_s`` after stage s, ``precision_s`` (1 where there are
      none) and the share of all nodes ``added_s`` of the pseudolabels that it left.

    Example:
      >>> truth, labels, added = jnp.array([0, 1, 1]), jnp.array([0, 1, -1]), jnp.array([0, 1, -1])
      >>> evaluate_stages(truth, labels, added, jnp.array([[0, 1, 0]]))
      {'accuracy': 0.5}
    """
    truth, labels, added = (np.asarray(each) for each in (truth, labels, added))
    hidden = (added != 0) & (truth >= 0)
    right = (np.asarray(predictions) == truth)[:, hidden].mean(1)
    found = {"accuracy": float(right[-1])}
    for stage in range(1, len(right)):
        new = hidden & (added == stage)
        found[f"accuracy_{stage}"] = float(right[stage - 1])
        found[f"precision_{stage}"] = float((labels == truth)[new].mean()) if new.any() else 1.0
        found[f"added_{stage}"] = float(new.mean())
    return found


def adam_l2(learning_rate: float = 0.01, weight_decay: float = 5e-4) -> optax.GradientTransformation:
    """Adam with L2 added to the gradient, of biases too, as PyTorch's ``weight_decay`` does; not AdamW.

    Args:
      learning_rate: a number.
      weight_decay: factor of the parameters in the gradient.

    Returns:
      An Optax transformation.
    """
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.adam(learning_rate))
