"""Graphs with labelled nodes, by name or from a file of one's own."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effjax.data.facts import Facts
from effjax.data.graph_files import read_graph
from effjax.data.sets import DataSet, load

__all__ = ["GraphData", "graph_data"]


class CsrFeatures(NamedTuple):
    """Node features by row, zeros not stored.

    Attributes:
      indptr: int32 [N + 1].
      columns: int32 [nnz].
      values: float32 [nnz].
      shape: (N, F).
    """

    indptr: np.ndarray
    columns: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]


class GraphData(NamedTuple):
    """A graph whose nodes are to be classified.

    Attributes:
      name: the set's name.
      source: where it came from.
      senders: int32 [E]; of an undirected graph both directions are stored. No self-loops.
      receivers: int32 [E].
      features: float32 [N, F] or ``CsrFeatures``, as stored; None where the set has none.
      labels: int32 [N], -1 where the source knows none.
      classes: number of classes.
      train: int32 node numbers of the set's standard split; None where it has none.
      val: the same for validation.
      test: the same for the test.
      random_train: int32 [splits, n], random splits with 20 nodes per class; None where the set has none.
      random_val: the same with 30 per class; the other nodes are for the test.
      attacks: name -> (senders, receivers) of the poisoned graphs that come with the set.
      weights: float32 [E], above 0, as the edges are ordered; None where all are 1.
      facts: what a report says of a graph from the user's own files; None of a registered one.
    """

    name: str
    source: str
    senders: np.ndarray
    receivers: np.ndarray
    features: np.ndarray | CsrFeatures | None
    labels: np.ndarray
    classes: int
    train: np.ndarray | None = None
    val: np.ndarray | None = None
    test: np.ndarray | None = None
    random_train: np.ndarray | None = None
    random_val: np.ndarray | None = None
    attacks: Mapping[str, tuple[np.ndarray, np.ndarray]] = {}
    weights: np.ndarray | None = None
    facts: Facts | None = None

    @property
    def nodes(self) -> int:
        """N."""
        return len(self.labels)


def graph_data(name: str | os.PathLike, *, root: str | os.PathLike | None = None) -> GraphData:
    """A graph of ``effjax.load_data``, or of an ``.npz`` file of one's own.

    ``cora`` and ``citeseer`` come with the package; ``dblp``, ``amazon_photo``, ``amazon_computers``,
    ``coauthor_cs``, ``coauthor_physics``, ``cora_attacked`` and more are looked for in
    ``$EFFJAX_DATA/graphs``.

    Args:
      name: a registered name, or a path that ends in ``.npz``: a file in one of the layouts of
        ``effjax.data.graph_files``, such as ``edge_index`` int [2, E] (senders, receivers), ``y`` int [N], -1 where
        unknown, and ``x`` [N, F]. Masks and edge weights are read; arrays of unknown names are refused. Nothing is
        unpickled. ``effjax.data.graph_tables.graph_from_files`` has more options.
      root: the one folder to look in; see ``effjax.load_data``.

    Returns:
      A ``GraphData``. Self-loops and repeated edges of the file are dropped.

    Raises:
      ValueError: the name is not registered, or the file is damaged, has an edge outside 0..N-1 or
        features that are not finite.
      FileNotFoundError: the set is nowhere; the message says what to do.

    Example:
      >>> cora = graph_data("cora")
      >>> cora.nodes, cora.senders.shape, cora.features.shape, cora.classes
      (2708, (10556,), (2708, 1433), 7)
    """
    if os.fspath(name).lower().endswith(".npz"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"name={os.fspath(name)!r} is not a file. Give a registered name or a file's path.")
        return build_graph(path.stem, str(path), read_graph(path))
    found: DataSet = load(os.fspath(name), root=root)
    if found.modality != "graph":
        raise ValueError(f"name={name!r} is a set of {found.modality}s, not a graph, such as cora, citeseer or dblp.")
    return build_graph(found.name.removeprefix("graphs/"), found.source, found.splits["graph"])


def build_graph(
    name: str,
    source: str,
    arrays: Mapping[str, Any],
    *,
    undirected: bool = False,
    facts: Facts | None = None,
    where: str = "",
) -> GraphData:
    """A ``GraphData`` of the arrays that ``read_graph`` returns; ``undirected`` adds the reverse of every edge.

    ``where`` is the file, for messages.
    """
    labels = arrays["y"].astype(np.int32)
    if "unlabelled_idx" in arrays:
        labels[arrays["unlabelled_idx"]] = -1
    try:
        senders, receivers, weights = _edges(arrays["edge_index"], len(labels), arrays.get("edge_weight"), undirected)
    except ValueError as error:
        raise ValueError(f"{where or source or name}: {error}") from None
    attacks = {
        key.removeprefix("edge_index_"): _edges(array, len(labels), None, undirected)[:2]
        for key, array in arrays.items()
        if key.startswith("edge_index_")
    }
    optional = lambda key: arrays[key].astype(np.int32) if key in arrays else None
    return GraphData(
        name=name,
        source=source,
        senders=senders,
        receivers=receivers,
        features=_features(arrays),
        labels=labels,
        classes=int(labels.max()) + 1,
        train=optional("train_idx"),
        val=optional("val_idx"),
        test=optional("test_idx"),
        random_train=optional("rand_train_idx"),
        random_val=optional("rand_val_idx"),
        attacks=attacks,
        weights=weights,
        facts=facts,
    )


def _edges(
    edge_index: np.ndarray, nodes: int, weights: np.ndarray | None, undirected: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Senders, receivers and weights sorted by receiver, then sender, each pair once, no self-loops."""
    senders, receivers = edge_index.astype(np.int64)
    if weights is not None and (weights == 1).all():
        weights = None
    if weights is not None:
        weights = weights.astype(np.float32)
        if (loops := np.flatnonzero((senders == receivers) & (weights != 1))).size:
            raise ValueError(
                f"edge weights: the edge of node {senders[loops[0]]} to itself weighs {weights[loops[0]]:g}. Graph "
                "networks add one of weight 1 to every node; remove it, or give it weight 1."
            )
    keep = senders != receivers
    numbers = (receivers * nodes + senders)[keep]
    if undirected:
        numbers = np.concatenate([numbers, (senders * nodes + receivers)[keep]])
    unique, first = np.unique(numbers, return_index=True)
    if weights is not None:
        kept = np.concatenate([weights[keep]] * (2 if undirected else 1))
        differs = kept != kept[first][np.searchsorted(unique, numbers)]
        many = not undirected and len(unique) < len(numbers)
        if differs.any() or many:
            number = numbers[differs][0] if differs.any() else numbers[np.setdiff1d(np.arange(len(numbers)), first)[0]]
            raise ValueError(
                f"edge weights: the edge {number % nodes} to {number // nodes} stands more than once"
                f"{', with unlike weights' * bool(differs.any())}. Sum its weights first."
            )
        weights = kept[first]
    return (unique % nodes).astype(np.int32), (unique // nodes).astype(np.int32), weights


def _features(arrays: Mapping[str, np.ndarray]) -> np.ndarray | CsrFeatures | None:
    if "x" in arrays:
        return arrays["x"].astype(np.float32)
    if "x_indptr" not in arrays:
        return None
    columns = arrays["x_indices"].astype(np.int32)
    values = arrays["x_data"].astype(np.float32) if "x_data" in arrays else np.ones(len(columns), np.float32)
    rows, width = arrays["x_shape"].tolist()
    return CsrFeatures(arrays["x_indptr"].astype(np.int32), columns, values, (rows, width))
