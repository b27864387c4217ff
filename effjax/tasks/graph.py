"""Node classification on one graph: data, matrices, loss, and splits that nothing can leak through."""

import functools
import os
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from effjax.core.errors import check_choice, check_number
from effjax.data.graphs import CsrFeatures, GraphData, graph_data
from effjax.graph.measures import masked_accuracy, masked_cross_entropy
from effjax.graph.sparse.adjacency_matrices import gcn_adjacency
from effjax.graph.sparse.adjacency_matrices import row_normalize as divide_rows
from effjax.graph.sparse.checks import check_array
from effjax.graph.sparse.matrix import SparseMatrix, sparse_matrix
from effjax.tasks.task import Metric, Task, Variables

__all__ = ["draw_labelled", "draw_split", "node_data", "node_task"]


class NodeData(NamedTuple):
    """A graph ready for a network.

    Attributes:
      name: of the data, with the attack if there is one.
      source: where the data came from.
      data: the graph as read.
      features: float32 [N, F], or a ``SparseMatrix`` where few are not zero.
      adjacency: ``gcn_adjacency``: symmetric normalisation, with self-loops.
      labels: int32 [N], -1 where unknown.
      classes: number of classes.
    """

    name: str
    source: str
    data: GraphData
    features: jax.Array | SparseMatrix
    adjacency: SparseMatrix
    labels: jax.Array
    classes: int


def node_data(
    name: str | os.PathLike | GraphData,
    *,
    row_normalize: bool | Literal["auto"] = "auto",
    sparse_below: float = 0.1,
    attack: str | None = None,
    root: str | os.PathLike | None = None,
) -> NodeData:
    """Load a graph and build the matrices of a graph network.

    Args:
      name: of ``effjax.data.graphs.graph_data``, or a ``GraphData``.
      row_normalize: divide every row of the features by its sum. ``'auto'`` does so where they are sparse and none is
        negative, as the citation benchmarks do; dense rows, such as the hundreds of words of Amazon Photo, would leave
        entries so small that a network hardly trains.
      sparse_below: features with a smaller share of non-zeros stay sparse.
      attack: one of ``data.attacks`` in place of the clean graph, such as ``'meta_0.15'``.
      root: as for ``graph_data``.

    Returns:
      A ``NodeData``. A graph without features gets the identity.

    Raises:
      ValueError: an attack that the set has not, an edge outside 0..N-1, features that are not finite.

    Example:
      >>> cora = node_data("cora")
      >>> cora.features.shape, cora.adjacency.nnz
      ((2708, 1433), 13264)
    """
    check_number("sparse_below", sparse_below, low=0, high=1)
    check_choice("row_normalize", row_normalize, (True, False, "auto"))
    data = graph_data(name, root=root) if isinstance(name, (str, os.PathLike)) else name
    if attack is not None:
        check_choice("attack", attack, tuple(data.attacks))
        senders, receivers = data.attacks[attack]
        if data.weights is not None:
            raise ValueError(f"attack={attack!r}: {data.name!r} has edge weights, and its attacks have none.")
        data = data._replace(name=f"{data.name}-{attack}", senders=senders, receivers=receivers)
    return NodeData(
        name=data.name,
        source=data.source,
        data=data,
        features=_features(data, row_normalize, sparse_below),
        adjacency=gcn_adjacency(data.senders, data.receivers, data.nodes, weights=data.weights),
        labels=jnp.asarray(data.labels),
        classes=data.classes,
    )


def _features(data: GraphData, normalize: bool | str, sparse_below: float) -> jax.Array | SparseMatrix:
    features = data.features
    if features is None:
        nodes = np.arange(data.nodes)
        return sparse_matrix(nodes, nodes, None, (data.nodes, data.nodes))
    matrix = _sparse(features)
    values = np.asarray(matrix.values)
    if not np.isfinite(values).all():
        rows = np.unique(np.asarray(matrix.pattern.rows)[~np.isfinite(values)])
        raise ValueError(
            f"features of {len(rows)} nodes, the first {rows[0]}, are not finite. Replace NaN and infinity, or drop "
            "these nodes."
        )
    sparse = matrix.nnz / max(1, matrix.shape[0] * matrix.shape[1]) < sparse_below
    automatic = sparse and bool((values >= 0).all())
    matrix = divide_rows(matrix) if (automatic if normalize == "auto" else normalize) else matrix
    return matrix if sparse else matrix.todense()


def _sparse(features: np.ndarray | CsrFeatures) -> SparseMatrix:
    if isinstance(features, CsrFeatures):
        rows = np.repeat(np.arange(features.shape[0]), np.diff(features.indptr))
        return sparse_matrix(rows, features.columns, features.values, features.shape)
    rows, columns = np.nonzero(features)
    return sparse_matrix(rows, columns, features[rows, columns], features.shape)


def node_task(
    data: str | os.PathLike | GraphData | NodeData,
    module: nn.Module,
    *,
    train: ArrayLike | None = None,
    test: ArrayLike | None = None,
    per_class: int | None = None,
    seed: int = 0,
) -> Task:
    """The classification of a graph's nodes by a network of one's own.

    Args:
      data: a graph, or a name or path for ``node_data``.
      module: Linen, called as ``module(features, adjacency, train=...)``, returning logits [N, C], such as
        ``NodeClassifier``. It may keep running statistics.
      train: nodes to train on, bool [N] or node numbers. None takes the data's standard split, or where there is none
        draws 20 per class.
      test: nodes to evaluate on. None takes those of the standard split where its training nodes are taken too, else
        all other nodes that have a label.
      per_class: draw this many training nodes per class instead.
      seed: of that draw.

    Returns:
      A ``Task`` whose ``train`` is the whole graph, with a mask of the training nodes as ``weight``; ``infer`` takes
      ``(nodes, features, adjacency)`` and returns the logits of these nodes.

    Raises:
      ValueError: masks that are empty, overlap, have another length or take in nodes without a label.

    Example:
      >>> from effjax.models.gnn import NodeClassifier
      >>> task = node_task("cora", NodeClassifier(classes=7), per_class=8)
      >>> int(task.train["weight"].sum()), task.metric.name
      (56, 'accuracy')
    """
    data = data if isinstance(data, NodeData) else node_data(data)
    train, test = _splits(data, train, test, per_class, seed)
    columns = {"features": data.features, "adjacency": data.adjacency, "labels": data.labels}
    whole = {part: {**columns, "weight": jnp.asarray(mask)} for part, mask in (("train", train), ("test", test))}

    def init(key: jax.Array) -> Variables:
        return module.init(key, data.features, data.adjacency)

    def loss(variables: Variables, batch: Any, key: jax.Array | None = None, *, train: bool = True) -> Any:
        streams = {} if key is None else {"dropout": key}
        state = [name for name in variables if name != "params"] if train else []
        logits, state = module.apply(
            variables, batch["features"], batch["adjacency"], train=train, rngs=streams, mutable=state
        )
        value = masked_cross_entropy(logits, batch["labels"], batch["weight"])
        return value, (state, {"loss": value, "accuracy": masked_accuracy(logits, batch["labels"], batch["weight"])})

    def infer(variables: Variables, inputs: tuple[Any, Any, SparseMatrix]) -> Any:
        nodes, features, matrix = inputs
        return module.apply(variables, features, matrix, train=False)[nodes]

    judge = jax.jit(lambda variables, batch: loss(variables, batch, train=False)[1][1])

    def evaluate(variables: Variables) -> dict[str, float]:
        found = judge(variables, whole["test"])
        return {"accuracy": float(found["accuracy"]), "nll": float(found["loss"])}

    dtype = getattr(module, "dtype", None)
    return Task(
        name=f"{data.name}/{type(module).__name__}",
        source=data.source,
        metric=Metric("accuracy", "max", "accuracy on test nodes"),
        init=init,
        loss=loss,
        infer=infer,
        evaluate=evaluate,
        train=whole["train"],
        example_inputs=(np.arange(data.data.nodes, dtype=np.int32), data.features, data.adjacency),
        test=whole["test"],
        classes=data.classes,
        module=module,
        full_batch=True,
        dtype="float32" if dtype is None else jnp.dtype(dtype).name,
    )


def _splits(data: NodeData, train: Any, test: Any, per_class: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the training and of the test nodes."""
    labels, own = np.asarray(data.labels), data.data
    if train is not None and per_class is not None:
        raise ValueError(f"per_class={per_class} draws the training nodes, which train gives already. Leave one out.")
    held_out = np.zeros(len(labels), bool)
    if train is None and per_class is None and own.train is not None:
        train = own.train
        held_out = held_out if own.val is None else _mask("val", own.val, labels)
        test = own.test if test is None else test
    if train is None:
        drawn = check_number("per_class", 20 if per_class is None else per_class, low=1, integer=True)
        train = np.asarray(draw_labelled(jax.random.key(seed), data.labels, data.classes, drawn))
    train = _mask("train", train, labels)
    test = _mask("test", (labels >= 0) & ~train & ~held_out if test is None else test, labels)
    if both := int((train & test).sum()):
        raise ValueError(f"train and test share {both} nodes. Take them out of one of the two.")
    return train, test


def _mask(argument: str, given: Any, labels: np.ndarray) -> np.ndarray:
    given = np.asarray(given)
    if given.dtype != bool:
        if given.dtype.kind not in "iu" or given.ndim != 1:
            raise ValueError(
                f"{argument} is {given.dtype}{list(given.shape)}; bool [{len(labels)}] or node numbers are needed."
            )
        wrong = given[(given < 0) | (given >= len(labels))]
        if wrong.size:
            raise ValueError(f"{argument} holds {wrong[0]}; nodes are 0..{len(labels) - 1}.")
        mask = np.zeros(len(labels), bool)
        mask[given] = True
        given = mask
    if given.shape != labels.shape:
        raise ValueError(f"{argument} has shape {list(given.shape)}, but there are {len(labels)} nodes.")
    if not given.any():
        raise ValueError(f"{argument} holds no node. Give at least one.")
    if unknown := int((labels[given] < 0).sum()):
        raise ValueError(f"{argument} holds {unknown} nodes without a label. Leave them out.")
    return given


def draw_labelled(key: jax.Array, labels: jax.Array, classes: int, per_class: int) -> jax.Array:
    """A random labelled set with the same number of nodes of every class.

    Args:
      key: the same key draws the same nodes.
      labels: int [N], -1 for nodes without a class, which are never drawn.
      classes: C.
      per_class: nodes of a class; all of a class that has fewer.

    Returns:
      bool [N].

    Example:
      >>> labels = jnp.array([0, 1, 0, 1, 0, -1])
      >>> int(draw_labelled(jax.random.key(0), labels, 2, 2).sum())
      4
    """
    return _rank_in_class(key, labels, classes) < per_class


def draw_split(
    key: jax.Array, labels: jax.Array, classes: int, train_per_class: int, val_per_class: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random train, validation and test masks; every other node with a class is for the test.

    The training set is that of ``draw_labelled`` with the same key.

    Args:
      key: the same key draws the same nodes.
      labels: int [N], -1 for nodes without a class, which are in no set.
      classes: C.
      train_per_class: training nodes of a class.
      val_per_class: validation nodes of a class.

    Returns:
      Three bool [N] without common nodes.
    """
    rank = _rank_in_class(key, labels, classes)
    train, known = rank < train_per_class, rank < train_per_class + val_per_class
    return train, known & ~train, (labels >= 0) & ~known


def _rank_in_class(key: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """Place of every node in a random order of its class; beyond all nodes for those without one."""
    labels = check_array("labels", labels, (None,), "integers", "One class for each node, -1 for none.")
    return _ranks(key, labels, classes)


@functools.partial(jax.jit, static_argnums=2)
def _ranks(key: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    order = jax.random.permutation(key, labels.shape[0])
    member = (labels[order][:, None] == jnp.arange(classes)[None]).astype(jnp.int32)
    before = jnp.cumsum(member, axis=0) - member
    rank = jnp.where(labels[order] >= 0, jnp.sum(before * member, axis=1), labels.shape[0])
    return jnp.zeros(labels.shape, jnp.int32).at[order].set(rank)
